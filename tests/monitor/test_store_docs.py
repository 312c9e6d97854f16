"""What docs/store.md shows works: its SQL on a recorded store, and its writer that knows nothing of this package."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from store_data import samples, step_record, tokens

from monitor.recorder import Recorder
from monitor.records import Alert, RunInfo
from monitor.store.check import check_store
from monitor.store.compact import compact_run
from monitor.store.reader import Store, open_store
from monitor.store.runs import get_run
from monitor.store.schema import SCHEMA_VERSION, TABLES
from monitor.store.tail import Tail

PAGE = (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8")
[WRITER] = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
QUERIES = re.findall(r"^```sql\n(.*?)^```", PAGE, re.M | re.S)


class OneAlert:
    def observe(self, step: int, scalars: Mapping[str, float]) -> list[Alert]:
        return (
            [Alert("entropy_collapse", "critical", "firing", 9, 9, 0.1, 1.0, 0.5, "low", "stop")] if step == 9 else []
        )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    path = tmp_path_factory.mktemp("documented")
    for run in ("uniform-s0", "ict-s0"):
        with Recorder(path, RunInfo(run, weighting=run.split("-")[0]), engine=OneAlert()) as recorder:
            for step in range(1, 25):
                recorder.record(step_record(step), tokens(step), samples(step))
    with open_store(path) as opened:
        yield opened


def test_there_are_thirteen_queries() -> None:
    assert len(QUERIES) == 13


@pytest.mark.parametrize("query", QUERIES, ids=range(len(QUERIES)))
def test_query_returns_rows(store: Store, query: str) -> None:
    result = store.sql(query)
    assert len(result) > 0
    last = dict(zip(result.columns, result.rows[-1], strict=True))
    assert [name for name, value in last.items() if value is None and name != "step"] == []  # events may have no step


def test_the_page_names_every_column(store: Store) -> None:
    columns = {name for table in (*TABLES, "edges") for name in store.sql(f"SELECT * FROM {table} LIMIT 0").columns}
    assert {name for name in columns if f"`{name}`" not in PAGE} == set()


def test_a_writer_with_pyarrow_alone(tmp_path: Path) -> None:
    assert "monitor" not in re.findall(r"import (\w+)", WRITER) and f'"schema_version": {SCHEMA_VERSION},' in WRITER
    subprocess.run([sys.executable, "-W", "error::SyntaxWarning", "-c", WRITER], cwd=tmp_path, check=True)
    path = tmp_path / "STORE"
    state = get_run(path, "mine")
    assert (state.status, state.acknowledged, state.faults) == ("finished", 5, ())
    assert check_store(path) == []
    # reward is step / 5, entropy 1 / step
    expected = [
        (step, name, value) for step in range(1, 6) for name, value in (("entropy", 1 / step), ("reward", step / 5))
    ]
    query = "SELECT step, name, value FROM steps WHERE attempt = 1 ORDER BY step, name"
    with open_store(path) as opened:
        assert opened.sql(query).rows == expected
    tail = Tail(path)
    tail.poll()
    assert tail.cursor().execute(query).fetchall() == expected
    tail.close()
    with Recorder(path, RunInfo("mine"), resume=True) as recorder:
        recorder.record(step_record(6), tokens(6), samples(6))
    assert compact_run(path, "mine", grace_s=0.0).files_after == 6  # one for each table and attempt, but no alerts
    with open_store(path) as opened:
        assert opened.sql(query).rows == expected
        assert opened.sql("SELECT count(*) FROM tokens WHERE step = 6").rows[0][0] > 0
    assert check_store(path) == []
