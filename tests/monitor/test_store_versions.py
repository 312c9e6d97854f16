"""A run that a later version recorded is said to be one, is left as it is, and does not get in the way of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from store_data import record_run

from monitor.errors import StoreError
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store.check import check_store
from monitor.store.compact import compact_run
from monitor.store.export import export_run, merge
from monitor.store.reader import open_store
from monitor.store.schema import SCHEMA_VERSION
from monitor.store.tail import Tail

SAID = f"recorded by a later version (schema 99, this one reads {SCHEMA_VERSION}): update rlvr-monitor"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Run a of a later version beside run b of this one."""
    record_run(tmp_path, "a", range(1, 4))
    record_run(tmp_path, "b", range(1, 4))
    path = tmp_path / "runs/a/run.json"
    info = json.loads(path.read_text())
    assert info["schema_version"] == SCHEMA_VERSION
    path.write_text(json.dumps(info | {"schema_version": 99}))
    return tmp_path


def test_every_reader_says_so_and_reads_the_others(store: Path) -> None:
    with open_store(store) as opened:
        assert opened.sql("SELECT count(DISTINCT step) FROM steps WHERE run = 'b'").rows == [(3,)]
        assert opened.sql("SELECT run FROM runs ORDER BY run").rows == [("a",), ("b",)]
        assert [SAID in one.reason for one in opened.unreadable() if one.run == "a"] == [True]
    tail = Tail(store)
    tail.poll()
    assert tail.quarantined() == {"a": ["run.json"]}
    tail.close()
    found = check_store(store)
    assert [(one.kind, one.run, one.damage) for one in found] == [("later_version", "a", False)] and SAID in str(found)


def test_it_is_not_changed(store: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in (store / "runs/a").rglob("*"))
    with pytest.raises(StoreError, match=r"Cannot resume run 'a'.*schema 99"):
        Recorder(store, RunInfo("a"), resume=True)
    for attempt in (lambda: compact_run(store, "a"), lambda: export_run(store, "a", store / "a.duckdb")):
        with pytest.raises(StoreError, match=r"Run 'a' is left alone.*schema 99"):
            attempt()
    done, refused = merge(store / "other", store)
    assert done == ["b"] and len(refused) == 1 and SAID in refused[0]
    assert sorted((path, path.stat().st_mtime_ns) for path in (store / "runs/a").rglob("*")) == before
