"""The macros of a store give the known answers, here, in store.duckdb and on a locked store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import duckdb
import numpy as np
import pytest
from store_data import N_TOKENS, Scripted, histogram, samples, step_record, tokens

from monitor.errors import StoreError
from monitor.metrics import cell_bounds
from monitor.queries.distributions import count_matrix
from monitor.recorder import Recorder
from monitor.records import Alert, Histogram, RunInfo, StepRecord, quantiles_from_counts
from monitor.store.compact import compact_run
from monitor.store.macros import MACROS, VIEW_COMMENTS
from monitor.store.reader import Store, open_store
from monitor.store.schema import TABLES
from monitor.store.segments import list_segments
from monitor.store.tail import Tail

SCRIPT = {
    3: [("entropy_collapse", "pending", "warning")],
    4: [("entropy_collapse", "firing", "warning"), ("reward_drop", "pending", "info")],
    6: [("entropy_collapse", "firing", "critical")],
    8: [("entropy_collapse", "resolved", "critical")],
    9: [("kl_jump", "firing", "warning")],
}
KINDS = ("store", "locked", "native")


class OneEpisode(Scripted):
    """All transitions of a rule belong to the alert that began at step 3."""

    def observe(self, step: int, scalars: Mapping[str, float]) -> list[Alert]:
        return [replace(alert, first_step=min(3, step)) for alert in super().observe(step, scalars)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("macros")
    for run, last in (("a", 10), ("b", 8)):
        with Recorder(path, RunInfo(run), engine=OneEpisode(SCRIPT), flush_s=0.0) as recorder:
            for step in range(1, last + 1):
                recorder.record(step_record(step), tokens(step), samples(step))
                assert recorder.flush(60)
    with Recorder(path, RunInfo("a"), resume=True, flush_s=0.0) as recorder:  # goes back to step 9
        recorder.record(StepRecord(9, {"reward": 7.0}), tokens(109))
    return path


class Native:
    """Any DuckDB client on store.duckdb."""

    def __init__(self, folder: Path) -> None:
        self.con = duckdb.connect(str(folder / "store.duckdb"), read_only=True)

    def sql(self, query: str) -> SimpleNamespace:
        found = self.con.execute(query)
        return SimpleNamespace(columns=[column[0] for column in found.description], rows=found.fetchall())


@pytest.fixture(scope="module", params=KINDS)
def store(folder: Path, request: pytest.FixtureRequest) -> Iterator[Store | Native]:
    if request.param == "native":
        yield Native(folder)
        return
    with open_store(folder, locked=request.param == "locked") as opened:
        yield opened


def test_the_entropy_fan_is_that_of_the_histogram(store: Store) -> None:
    found = store.sql("FROM entropy_fan('a')")
    assert found.columns == ["step", "n", "mean", "p05", "p25", "p50", "p75", "p95"]
    assert [row[0] for row in found.rows] == list(range(1, 9))  # step 9 is of the new attempt, without a histogram
    made = histogram(tokens(3).entropy)
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    wanted = quantiles_from_counts(made.counts, "nats96", shares, low=made.min, high=made.max)
    step, n, mean, *quantiles = found.rows[2]
    assert (step, n) == (3, N_TOKENS) and mean == pytest.approx(made.sum / N_TOKENS, rel=1e-12)
    np.testing.assert_allclose(quantiles, wanted, rtol=1e-12)
    [selected] = store.sql("SELECT n FROM fan('a', 'entropy', 'selected') WHERE step = 3").rows
    assert selected == (50,)


def test_a_quantile_on_the_border_of_a_cell_lies_in_it(tmp_path: Path) -> None:
    """1 of 20 tokens in cell 3, 19 in cell 50: rank 0.05 x 20 = 1 is the end of cell 3, 0.95 x 20 = 19 lies in 50."""
    lows, highs = cell_bounds("nats96")
    counts = np.zeros(len(lows), np.int64)
    counts[3], counts[50] = 1, 19
    made = Histogram("entropy", "all", "nats96", counts, n=20, sum=1.0, sumsq=1.0, min=0.0, max=9.0)
    with Recorder(tmp_path, RunInfo("a")) as recorder:
        recorder.record(StepRecord(1, {"reward": 1.0}, (made,)))
    with open_store(tmp_path) as opened:
        [(n, p05, p95)] = opened.sql("SELECT n, p05, p95 FROM entropy_fan('a')").rows
    assert (n, p05) == (20, highs[3])
    assert p95 == pytest.approx(lows[50] + 18 / 19 * (highs[50] - lows[50]), rel=1e-14)


@pytest.mark.parametrize("n_ranks", [1, 2, 8])
def test_histograms_of_ranks_add_up_to_that_of_all_tokens(tmp_path: Path, n_ranks: int) -> None:
    """Counts, n, min and max are the same bits; the sum is one of float64 in another order."""
    values = np.concatenate([tokens(step).entropy for step in range(1, 5)])
    whole = histogram(values)
    for rank, part in enumerate(np.array_split(values, n_ranks)):
        with Recorder(tmp_path, RunInfo("a"), rank=rank) as recorder:
            recorder.record(StepRecord(1, {"reward": 1.0}, (histogram(part),)))
    tail = Tail(tmp_path)
    tail.poll()
    found = count_matrix(tail.cursor(), "a", "entropy")
    tail.close()
    np.testing.assert_array_equal(found["counts"], whole.counts[None])
    assert (found["n"][0], found["min"][0], found["max"][0]) == (whole.n, whole.min, whole.max)
    assert found["sum"][0] == pytest.approx(whole.sum, rel=1e-14)
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    wanted = quantiles_from_counts(whole.counts, "nats96", shares, low=whole.min, high=whole.max)
    with open_store(tmp_path) as opened:
        [(step, n, mean, *quantiles)] = opened.sql("FROM entropy_fan('a')").rows
    assert (step, n, mean) == (1, whole.n, pytest.approx(whole.sum / whole.n, rel=1e-14))
    np.testing.assert_allclose(quantiles, wanted, rtol=1e-12)


def test_two_runs_are_compared_step_by_step(store: Store) -> None:
    found = store.sql("FROM compare('a', 'b') WHERE name = 'reward'")
    assert found.columns == ["name", "step", "a", "b", "difference"]
    # reward is step / 100 in both; step 9 of a is that of its second attempt, and b ends at 8
    assert found.rows == [*(("reward", step, step / 100, step / 100, 0.0) for step in range(1, 9)),
                          ("reward", 9, 7.0, None, None)]  # fmt: skip


def test_the_tokens_of_a_rollout_have_their_texts(store: Store) -> None:
    found = store.sql("SELECT position, text, entropy FROM tokens_of('a', 5, 3)").rows
    assert [(position, text) for position, text, _ in found[:3]] == [(0, "2"), (1, " "), (2, "é")]
    assert [entropy for *_, entropy in found] == tokens(5).entropy[75:100].tolist()  # 25 positions of sample 3
    assert store.sql("SELECT count(*) FROM tokens_of('a', 5, 99)").rows == [(0,)]
    assert store.sql("SELECT count(*) FROM tokens_of('nobody', 5, 3)").rows == [(0,)]
    # of a resumed run those of the attempt that counts, which recorded no texts
    again = store.sql("SELECT text, entropy FROM tokens_of('a', 9, 3)").rows
    assert [entropy for _, entropy in again] == tokens(109).entropy[75:100].tolist() and again[0][0] is None
    assert store.sql("SELECT count(*) FROM tokens_at('a', 10)").rows == [(0,)]  # of the attempt that was left


@pytest.mark.parametrize("metric", ["entropy", "deviation", "weight", "logprob"])
def test_the_tokens_of_a_bin_are_those_that_it_counts(store: Store, metric: str) -> None:
    made = tokens(5)
    values = getattr(made, metric)
    low, high = np.float32(np.quantile(values, 0.4)), np.float32(np.quantile(values, 0.9)) + np.float32(1e-3)
    found = store.sql(f"SELECT sample, position, value FROM bin_tokens('a', 5, '{metric}', {low!s}, {high!s})").rows
    mask = (values >= low) & (values < high)
    assert mask.any()
    assert found == list(zip(made.sample[mask], made.position[mask], values[mask].tolist(), strict=True))


def test_a_cell_of_a_histogram_counts_the_tokens_of_its_bin(store: Store) -> None:
    counts = histogram(tokens(5).entropy).counts
    lows, highs = cell_bounds("nats96")
    cell = int(np.argmax(counts[10:])) + 10
    query = f"SELECT count(*) FROM bin_tokens('a', 5, 'entropy', {lows[cell]}::FLOAT, {highs[cell]}::FLOAT)"
    assert store.sql(query).rows == [(int(counts[cell]),)]


def test_a_metric_that_tokens_have_not_is_an_error(store: Store) -> None:
    with pytest.raises((duckdb.Error, StoreError), match="of_metric is none of entropy, deviation"):
        store.sql("FROM bin_tokens('a', 5, 'reward', 0, 1)")


def test_episodes_are_alerts_from_firing_to_end(store: Store) -> None:
    found = store.sql("FROM episodes('a')")
    assert found.columns == ["rule", "severity", "first_step", "worst_step", "end_step", "message"]
    assert found.rows == [("entropy_collapse", "critical", 3, 6, 8, "low")]  # kl_jump was of the attempt that was left
    assert store.sql("SELECT rule, end_step FROM episodes('b')").rows == [("entropy_collapse", 8)]


def test_the_database_says_what_it_holds(folder: Path) -> None:
    for opened in (Native(folder), open_store(folder)):
        found = dict(opened.sql("SELECT function_name, comment FROM duckdb_functions() WHERE comment <> ''").rows)
        assert found == {name: macro.comment for name, macro in MACROS.items()}
        views = dict(opened.sql("SELECT view_name, comment FROM duckdb_views() WHERE comment <> ''").rows)
        assert {name: views.get(name) for name in ("tokens", "steps", "commits")} == {
            name: VIEW_COMMENTS[name] for name in ("tokens", "steps", "commits")
        }


@pytest.mark.parametrize("kind", ["store", "native"])
def test_a_macro_that_names_a_step_opens_the_files_of_that_step_alone(folder: Path, tmp_path: Path, kind: str) -> None:
    """The others are broken behind the reader's back, after it has checked them."""
    copy = tmp_path / "store"
    shutil.copytree(folder, copy, symlinks=True)
    with open_store(copy) as opened:  # also makes store.duckdb anew, for it has moved
        opened.con = opened._session.con  # type: ignore[union-attr]
        opened.con.execute("SET parquet_metadata_cache = false")
        assert opened.sql("SELECT count(*) FROM tokens WHERE run = 'b'").rows == [(8 * N_TOKENS,)]
        for name, path in list_segments(copy, "b", "tokens"):
            if name.first_step != 5:
                path.write_bytes(b"broken")
        reader = Native(copy) if kind == "native" else opened
        found = reader.con.execute("SELECT entropy FROM tokens_of('b', 5, 3)").fetchall()
        assert [entropy for (entropy,) in found] == tokens(5).entropy[75:100].tolist()
        assert reader.con.execute("SELECT count(*) FROM bin_tokens('b', 5, 'weight', 0, 2)").fetchall() == [(N_TOKENS,)]
        with pytest.raises(duckdb.Error):  # a condition on `step` alone looks into every file
            reader.con.execute("SELECT count(*) FROM tokens WHERE run = 'b' AND step = 5 AND entropy >= 0").fetchall()


@pytest.mark.parametrize("kind", ["store", "native"])
def test_a_condition_on_the_run_opens_the_files_of_that_run_alone(folder: Path, tmp_path: Path, kind: str) -> None:
    copy = tmp_path / "store"
    shutil.copytree(folder, copy, symlinks=True)
    with open_store(copy) as opened:
        opened.con = opened._session.con  # type: ignore[union-attr]
        opened.con.execute("SET parquet_metadata_cache = false")
        for table in TABLES:
            opened.sql(f"SELECT count(*) FROM {table}")
            for _, path in list_segments(copy, "b", table):
                path.write_bytes(b"broken")
        reader = Native(copy) if kind == "native" else opened
        for query, rows in {
            "SELECT count(DISTINCT step) FROM steps WHERE run = 'a' AND name = 'reward'": 9,
            "SELECT count(*) FROM tokens WHERE run = 'a'": 9 * N_TOKENS,
            "SELECT count(*) FROM entropy_fan('a')": 8,  # the second attempt, from step 9 on, has none
        }.items():
            assert reader.con.execute(query).fetchall() == [(rows,)]


def test_steps_of_nine_digits_are_found(tmp_path: Path) -> None:
    """Their names are longer, so the digits of a step stand elsewhere."""
    steps = (7, 99_999_999, 100_000_000, 123_456_789)
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0) as recorder:
        for step in steps:
            recorder.record(step_record(step), tokens(step % 1000), samples(step))
            assert recorder.flush(60)
        recorder.record(step_record(123_456_790), tokens(1))
    with open_store(tmp_path) as opened:
        for step in steps:
            found = opened.sql(f"SELECT entropy FROM tokens_of('a', {step}, 0)").rows
            assert [entropy for (entropy,) in found] == tokens(step % 1000).entropy[:25].tolist()
    compact_run(tmp_path, "a", grace_s=0.0)
    with open_store(tmp_path) as opened:
        assert [opened.sql(f"SELECT count(*) FROM tokens_at('a', {step})").rows for step in steps] == [
            [(N_TOKENS,)]
        ] * 4
