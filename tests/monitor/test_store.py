from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
from store_data import N_TOKENS, record_run, step_record, tokens

from monitor.errors import StoreError, UnknownRunError
from monitor.metrics import cell_bounds
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store.catalog import CATALOG, ensure_catalog
from monitor.store.check import check_store
from monitor.store.reader import open_store
from monitor.store.runs import get_run, list_runs
from monitor.store.segments import list_segments

# What a user's shell does: open store.duckdb read-only in a process of its own and hold it open, asking on demand.
SHELL = """
import sys, duckdb
con = duckdb.connect(sys.argv[1], read_only=True)
print("open", flush=True)
for line in sys.stdin:
    print(con.execute(line).fetchall(), flush=True)
"""


class Shell:
    def __init__(self, store: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SHELL, str(store / CATALOG)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "open\n"

    def ask(self, query: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(query, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.communicate()


def test_a_shell_held_open_sees_new_steps_of_a_run_that_starts_later(tmp_path: Path) -> None:
    record_run(tmp_path, "first", range(1, 3))
    shell = Shell(tmp_path)
    try:
        with Recorder(tmp_path, RunInfo("second"), flush_s=0.0) as recorder:
            for step in (1, 2, 3):
                recorder.record(step_record(step), tokens(step))
                while recorder.acknowledged != step:
                    time.sleep(0.002)
                assert shell.ask("SELECT max(step) FROM steps WHERE run = 'second'") == f"[({step},)]"
            assert (
                shell.ask("SELECT run, status FROM runs ORDER BY run")
                == "[('first', 'finished'), ('second', 'running')]"
            )
        assert shell.ask("SELECT count(*) FROM tokens") == f"[({(2 + 3) * N_TOKENS},)]"
    finally:
        shell.close()


def test_every_query_during_a_run_is_consistent(tmp_path: Path) -> None:
    with (
        Recorder(
            tmp_path, RunInfo("a"), flush_s=0.0, queue_steps=1000
        ) as recorder,  # no thinning, however slow the disk
        open_store(tmp_path) as store,
    ):
        for step in range(1, 30):
            recorder.record(step_record(step), tokens(step))
            acknowledged = recorder.acknowledged or 0
            seen = store.sql("SELECT step, count(*) FROM tokens GROUP BY step").rows
            assert {count for _, count in seen} <= {N_TOKENS}
            missing = set(range(1, acknowledged + 1)) - {step for step, _ in seen}
            assert not missing, (step, acknowledged)


def test_the_catalog_can_be_opened_by_duckdb_1(tmp_path: Path) -> None:
    record_run(tmp_path, steps=range(1, 2))
    with duckdb.connect(str(tmp_path / CATALOG), read_only=True) as con:
        [(tags,)] = con.execute("SELECT tags FROM duckdb_databases() WHERE database_name = 'store'").fetchall()
    assert tags["storage_version"].startswith("v1.2.0")


def test_the_catalog_follows_its_folder(tmp_path: Path) -> None:
    old, new = tmp_path / "old [1]*", tmp_path / "new 'store'"
    record_run(old, steps=range(1, 4))
    with open_store(old) as store:
        assert store.sql("SELECT count(*) FROM tokens").rows == [(3 * N_TOKENS,)]
    shutil.move(old, new)
    with open_store(new) as store:
        assert store.sql("SELECT count(*) FROM tokens").rows == [(3 * N_TOKENS,)]
    shell = Shell(new)
    assert shell.ask("SELECT count(*) FROM tokens") == f"[({3 * N_TOKENS},)]"
    shell.close()
    before = (new / CATALOG).stat().st_ino
    assert ensure_catalog(new).stat().st_ino == before  # up to date: left alone
    (new / CATALOG).write_text("not a database")
    assert ensure_catalog(new).stat().st_ino != before
    assert not list(new.glob("*.tmp*"))


def test_check_finds_flipped_bytes(tmp_path: Path) -> None:
    record_run(tmp_path)
    assert [finding for finding in check_store(tmp_path) if finding.damage] == []
    _, path = list_segments(tmp_path, "a", "tokens")[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    [finding] = [finding for finding in check_store(tmp_path) if finding.damage]
    assert finding.kind == "checksum" and finding.path == str(path)


def test_check_reports_leftovers_and_lost_steps(tmp_path: Path) -> None:
    record_run(tmp_path, steps=range(1, 3))
    folder = tmp_path / "runs/a/data/tokens/g0"
    (folder / "1-0-3-3.parquet.tmp").write_text("half")
    found = check_store(tmp_path)
    assert [(one.kind, one.damage) for one in found] == [("leftover", False)]
    for _, path in list_segments(tmp_path, "a", "steps"):
        path.unlink()
    kinds = {one.kind: one.damage for one in check_store(tmp_path)}
    assert kinds == {"leftover": False, "uncommitted": False, "lost_step": True}


def test_unknown_runs_and_stores_are_refused_with_a_hint(tmp_path: Path) -> None:
    record_run(tmp_path, "uniform-s0", range(1, 2))
    with pytest.raises(UnknownRunError, match="Did you mean 'uniform-s0'"):
        get_run(tmp_path, "unifrm-s0")
    with pytest.raises(StoreError, match="No store at"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="Give its folder"):
        open_store(tmp_path / CATALOG)
    with pytest.raises(StoreError, match="has no 'runs' folder"):
        open_store(tmp_path / "runs" / "uniform-s0")


@pytest.mark.parametrize(
    ("beat", "status"),
    [
        ({}, "running"),
        ({"pid": 2**22 + 1}, "crashed"),
        ({"ts": -30.0, "last_step_ts": -30.0}, "running"),
        ({"ts": -70.0, "last_step_ts": -70.0}, "crashed"),
        ({"ts": -30.0, "last_step_ts": -80.0}, "running"),  # 50 s without a step when it last beat
        ({"last_step_ts": -70.0, "busy": "evaluation"}, "running"),
        ({"last_step_ts": -70.0, "active_ts": -10.0}, "running"),
        ({"last_step_ts": -70.0}, "stalled"),
        ({"last_step_ts": -70.0, "median_step_s": 20.0}, "running"),
        ({"last_step_ts": -500.0, "median_step_s": None}, "running"),  # one step, so no pace is known: 600 s
        ({"last_step_ts": -700.0, "median_step_s": None}, "stalled"),
        ({"last_step_ts": None, "started": -300.0}, "running"),
        ({"last_step_ts": None, "started": -700.0}, "stalled"),
        ({"last_step_ts": None, "started": -700.0, "active_ts": -10.0}, "running"),
        ({"status": "stopped", "ts": -1e6}, "stopped"),
    ],
)
def test_status_from_a_heartbeat(tmp_path: Path, beat: dict, status: str) -> None:
    record_run(tmp_path, steps=range(1, 2))
    (tmp_path / "runs/a/rank-000.lock").unlink()  # as on a file system without locks
    path, now = tmp_path / "runs/a/heartbeat-r000-a001.json", time.time()
    stored = json.loads(path.read_text()) | {"status": "running", "ts": now, "last_step_ts": now, "median_step_s": 1.0}
    stored |= {"lock": False}
    for key, value in beat.items():
        is_time = key in ("ts", "last_step_ts", "started", "active_ts") and value is not None
        stored[key] = now + value if is_time else value
    path.write_text(json.dumps(stored))
    assert list_runs(tmp_path)[0].status == status
    with open_store(tmp_path) as store:
        in_sql = store.sql("SELECT status FROM runs").rows[0][0]
    assert in_sql == status


def test_quantiles_in_sql_are_those_of_the_records(tmp_path: Path) -> None:
    record_run(tmp_path, steps=range(1, 4))
    with open_store(tmp_path) as store:
        for q in (0.0, 0.1, 0.5, 0.9, 1.0):
            got = store.sql(
                f"SELECT hist_quantile(counts, edges_id, {q}, min, max) FROM histograms "
                "WHERE split = 'all' ORDER BY step"
            ).frame()
            truth = [step_record(step).histograms[0].quantiles([q])[0] for step in (1, 2, 3)]
            np.testing.assert_allclose(next(iter(got.values())), truth, rtol=1e-12)
        [(lows, highs)] = store.sql("SELECT lows, highs FROM edges WHERE edges_id = 'weight'").rows
        np.testing.assert_array_equal([lows, highs], cell_bounds("weight"))


def test_results_have_plain_types(tmp_path: Path) -> None:
    record_run(tmp_path, steps=range(1, 2))
    with open_store(tmp_path) as store:
        result = store.sql(
            "SELECT sum(n) AS total, 0.5 AS half, NULL::INTEGER AS nothing, counts FROM histograms GROUP BY ALL"
        )
        assert {type(value) for row in result.rows for value in row} == {int, float, type(None), list}
        frame = result.frame()
        assert frame["total"].dtype == np.int64 and frame["counts"][0].dtype == np.int64
        assert store.sql("SELECT ? + ?", [1, 2]).rows == [(3,)]
        with pytest.raises(duckdb.Error, match="nothing_here"):
            store.sql("SELECT * FROM nothing_here")
