"""Every SQL block of docs/store.md runs on a recorded store and returns rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from store_data import samples, step_record, tokens

from monitor.recorder import Recorder
from monitor.records import Alert, RunInfo
from monitor.store.reader import Store, open_store
from monitor.store.schema import TABLES

PAGE = (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8")
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
