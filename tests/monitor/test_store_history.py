"""One line of history after a resume, and steps of any size, in every reader."""

from __future__ import annotations

import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest
from store_data import record_run, samples, step_record, tokens

from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord
from monitor.store.catalog import commits_query, ensure_catalog, steps_query
from monitor.store.compact import compact_run
from monitor.store.reader import open_store
from monitor.store.schema import SegmentName
from monitor.store.tail import Tail

SCHEMA_1 = Path(__file__).parent / "files" / "schema-1"  # a run of November 2026, whose steps are INTEGER


def record(store: Path, run: str, steps: list[int] | range, attempt: int = 1, rank: int = 0) -> None:
    with Recorder(store, RunInfo(run), resume=attempt > 1, rank=rank) as recorder:
        for step in steps:
            scalars = {"reward": float(attempt)}
            recorder.record(
                StepRecord(step, scalars, step_record(step % 1000).histograms), tokens(step % 1000), samples(1)
            )


def shown(store: Path, query: str) -> list[tuple]:
    """What a query on views gives in our reader, in a shell of another client and, where it has the table, the tail."""
    with open_store(store) as opened:
        ours = opened.sql(query).rows
    with duckdb.connect(str(ensure_catalog(store)), read_only=True) as shell:
        assert shell.execute(query).fetchall() == ours
    if "tokens" not in query and "samples" not in query:
        tail = Tail(store)
        tail.poll()
        assert tail.cursor().execute(query).fetchall() == ours
        tail.close()
    return ours


def attempts(store: Path, table: str, run: str = "a") -> dict[int, int]:
    rows = shown(store, f"SELECT DISTINCT step, attempt FROM {table} WHERE run = '{run}' ORDER BY ALL")
    assert len(dict(rows)) == len(rows), "a step of two attempts"
    return dict(rows)


def test_a_branch_that_was_left_is_not_shown(tmp_path: Path) -> None:
    record(tmp_path, "a", range(1, 21))
    record(tmp_path, "a", range(6, 9), attempt=2)
    truth = {**dict.fromkeys(range(1, 6), 1), **dict.fromkeys(range(6, 9), 2)}
    for table in ("steps", "histograms", "tokens", "samples"):
        assert attempts(tmp_path, table) == truth
    assert shown(tmp_path, "SELECT count(DISTINCT step) FROM steps_all WHERE attempt = 1") == [(20,)]
    record(tmp_path, "a", range(3, 5), attempt=3)  # further back, past the branch of the second attempt too
    assert attempts(tmp_path, "steps") == {1: 1, 2: 1, 3: 3, 4: 3}
    record(tmp_path, "a", range(10, 12), attempt=4)
    assert attempts(tmp_path, "steps") == {1: 1, 2: 1, 3: 3, 4: 3, 10: 4, 11: 4}
    compact_run(tmp_path, "a", grace_s=0.0)
    assert attempts(tmp_path, "tokens") == {1: 1, 2: 1, 3: 3, 4: 3, 10: 4, 11: 4}


@pytest.mark.parametrize("seed", range(5))
def test_the_history_is_its_definition(seed: int) -> None:
    """Of each attempt the steps below the first one of any later attempt of the run, whatever its ranks have."""
    rng = np.random.default_rng(seed)
    names = ("run", "attempt", "step", "rank")
    drawn = zip(*(rng.integers(low, high, 60).tolist() for low, high in ((0, 3), (1, 5), (0, 12), (0, 2))), strict=True)
    rows = {(f"r{run}", attempt, step, rank) for run, attempt, step, rank in drawn}
    firsts = {}
    for run, attempt, step, _ in rows:
        firsts[run, attempt] = min(step, firsts.get((run, attempt), step))
    kept = {
        (run, attempt, step, rank)
        for run, attempt, step, rank in rows
        if all(step < first for (of, later), first in firsts.items() if of == run and later > attempt)
    }
    assert 0 < len(kept) < len(rows)
    with duckdb.connect() as con:
        con.execute("CREATE TABLE steps_all (run VARCHAR, attempt SMALLINT, step BIGINT, rank SMALLINT, value DOUBLE)")
        con.executemany("INSERT INTO steps_all VALUES ($1, $2, $3, $4, 1), ($1, $2, $3, $4, 2)", sorted(rows))
        found = con.execute(f"SELECT {', '.join(names)} FROM ({commits_query()})").fetchall()
        assert len(found) == len(kept) and set(found) == kept
        [(n,)] = con.execute(f"SELECT count(*) FROM ({steps_query()})").fetchall()
        assert n == 2 * len(kept)  # two values of each


def test_an_attempt_without_a_step_leaves_the_history_alone(tmp_path: Path) -> None:
    record(tmp_path, "a", range(1, 5))
    record(tmp_path, "a", [], attempt=2)
    assert attempts(tmp_path, "steps") == dict.fromkeys(range(1, 5), 1)


def test_the_history_is_the_runs_not_a_ranks(tmp_path: Path) -> None:
    for rank in (0, 1):
        record(tmp_path, "a", range(1, 9), rank=rank)
    record(tmp_path, "a", range(4, 6), attempt=2)  # resumed with one rank
    rows = shown(tmp_path, "SELECT DISTINCT step, rank, attempt FROM steps ORDER BY ALL")
    assert rows == [*((s, r, 1) for s in (1, 2, 3) for r in (0, 1)), (4, 0, 2), (5, 0, 2)]


def test_the_tail_leaves_a_branch_while_it_watches(tmp_path: Path) -> None:
    record(tmp_path, "a", range(1, 9))
    tail = Tail(tmp_path, min_interval_s=0.0)
    tail.poll()
    record(tmp_path, "a", range(3, 5), attempt=2)
    tail.poll()
    assert tail.cursor().execute("SELECT max(step) FROM steps").fetchall() == [(4,)]
    assert tail.files("a", "tokens", 7) == [] and len(tail.files("a", "tokens", 4)) == 1


@pytest.mark.parametrize("steps", [[1, 123_456_789], [2**31 - 1, 2**31, 3_000_000_000], [10**12, 10**12 + 1]])
def test_steps_of_any_size_are_recorded_and_read(tmp_path: Path, steps: list[int]) -> None:
    record(tmp_path, "a", steps)
    for table in ("steps", "tokens", "samples", "histograms"):
        assert list(attempts(tmp_path, table)) == steps
    tail = Tail(tmp_path)
    tail.poll()
    assert all(len(tail.files("a", "tokens", step)) == 1 for step in steps)
    assert tail.steps_with("a", "tokens") == set(steps)
    tail.close()
    compact_run(tmp_path, "a", grace_s=0.0)
    assert list(attempts(tmp_path, "tokens")) == steps


def test_runs_of_schema_1_and_2_stand_side_by_side(tmp_path: Path) -> None:
    """`a-new` sorts before the old run and `z-new` after it."""
    shutil.copytree(SCHEMA_1 / "runs/explosion", tmp_path / "runs/explosion", symlinks=True)
    with open_store(tmp_path) as store:  # of schema 1 alone
        alone = store.sql("SELECT *, typeof(step) FROM steps ORDER BY ALL LIMIT 50").rows
        assert store.sql("SELECT DISTINCT typeof(step) FROM tokens").rows == [("BIGINT",)]
    record(tmp_path, "a-new", [3_000_000_000])
    record(tmp_path, "z-new", [3_000_000_001])
    query = "SELECT run, max(step) FROM steps GROUP BY run ORDER BY run"
    assert shown(tmp_path, query) == [
        ("a-new", 3_000_000_000), ("explosion", 60), ("z-new", 3_000_000_001),
    ]  # fmt: skip
    assert shown(tmp_path, "SELECT count(*) FROM tokens WHERE run IN ('a-new', 'z-new')") == [(400,)]
    with open_store(tmp_path) as store:
        query = "SELECT *, typeof(step) FROM steps WHERE run = 'explosion' ORDER BY ALL LIMIT 50"
        assert store.sql(query).rows == alone
        compact_run(tmp_path, "explosion", grace_s=0.0)
        assert store.sql(query).rows == alone


def test_seeds_of_an_older_version_do_no_harm(tmp_path: Path) -> None:
    old = tmp_path / "runs/_seed/data/steps"
    old.mkdir(parents=True)
    duckdb.sql(
        "SELECT 'x' AS run, 1::SMALLINT AS attempt, 1::INTEGER AS step, 0::SMALLINT AS rank WHERE false"
    ).write_parquet(str(old / "seed.parquet"))
    (tmp_path / "runs/_seed/seed-run.json").write_text("{}")
    (tmp_path / "runs/_seed/seed-heartbeat-r000.json").write_text("{}")
    record_run(tmp_path, "a", range(1, 3))
    assert shown(tmp_path, "SELECT max(step) FROM steps") == [(2,)]
    assert [path.name for path in old.glob("seed*")] == ["seed.parquet"]


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("a001-r000-s00000001-00000002-0000000a.parquet", SegmentName(1, 0, 1, 2, 10)),
        (
            "a1000-r000-s123456789-9223372036854775807-ffffffff.parquet",
            SegmentName(1000, 0, 123456789, 2**63 - 1, 2**32 - 1),
        ),
        ("copy of a001-r000-s00000001-00000002-0000000a.parquet", None),
        ("a001-r000-s00000001-00000002-0000000a (1).parquet", None),
        ("a001-r000-s00000001-00000002-0000000a.parquet\n", None),
        ("a001-r000-s0000001-00000002-0000000a.parquet", None),
        ("a001-r000-s0000000١-00000002-0000000a.parquet", None),
    ],
)
def test_names_of_segments(name: str, parsed: SegmentName | None) -> None:
    assert SegmentName.parse(name) == parsed
    assert parsed is None or str(parsed) == name
