"""What a page keeps of a run equals what the store holds, however the run grew."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from monitor.metrics import n_cells
from monitor.queries.distributions import count_matrix, pooled, summed
from monitor.queries.followed import Followed, thinned
from monitor.queries.series import scalar_series, series_of
from monitor.recorder import Recorder
from monitor.records import Histogram, RunInfo, StepRecord
from monitor.store.tail import Tail

CELLS = n_cells("nats96")


def record(step: int, *, base: float = 0.0) -> StepRecord:
    counts = np.zeros(CELLS, np.int64)
    counts[step % CELLS] = step
    histogram = Histogram("entropy", "all", "nats96", counts, step, 0, float(step), float(step), 0.1 * step, 0.2 * step)
    scalars = {"entropy": base + step} | ({"eval/heldout/pass@1": 0.5} if step % 3 == 0 else {})
    return StepRecord(step, scalars, (histogram,))


def agrees(followed: Followed, tail: Tail) -> None:
    con, run = tail.cursor(), followed.run
    followed.look(con, tail.runs[run].basis)
    for key in ("entropy", "eval/heldout/pass@1", "never"):
        steps, values = series_of(scalar_series(con, [run], [key], max_points=None), run, key)
        np.testing.assert_array_equal(followed.series(key)[0], steps)
        np.testing.assert_array_equal(followed.series(key)[1], values)
    kept, held = followed.counts(con, "entropy", "all"), count_matrix(con, run, "entropy", max_columns=10**9)
    for name in ("step", "counts", "n", "sum", "min", "max"):
        np.testing.assert_array_equal(kept[name], held[name], err_msg=name)


def test_it_grows_with_the_run_and_starts_anew_with_an_attempt(tmp_path: Path) -> None:
    followed, tail = Followed("grows"), Tail(tmp_path, min_interval_s=0.0)
    with Recorder(tmp_path, RunInfo(name="grows"), flush_s=0.0) as recorder:
        for step in range(1, 12):
            recorder.record(record(step))
            if step in (1, 2, 7, 11):
                recorder.flush()
                tail.poll()
                agrees(followed, tail)
    assert {"entropy", "eval/heldout/pass@1"} <= set(followed.keys) and followed.newest_step == 11
    with Recorder(tmp_path, RunInfo(name="grows"), flush_s=0.0, resume=True) as recorder:
        recorder.record(record(6, base=100.0))  # a branch: what came after step 5 is no longer the run's line
    tail.poll()
    agrees(followed, tail)
    assert list(followed.series("entropy")[1]) == [1, 2, 3, 4, 5, 106]


def test_a_rank_that_comes_late_is_added(tmp_path: Path) -> None:
    followed, tail = Followed("ranks"), Tail(tmp_path, min_interval_s=0.0)
    info = RunInfo(name="ranks")
    with Recorder(tmp_path, info, flush_s=0.0) as zero, Recorder(tmp_path, info, rank=1, flush_s=0.0) as one:
        for step in (1, 2, 3):
            zero.record(record(step))
        one.record(record(1))
        for recorder in (zero, one):
            recorder.flush()
        tail.poll()
        agrees(followed, tail)
        for step in (2, 3):
            one.record(record(step))
        one.flush()
        tail.poll()
        agrees(followed, tail)
    assert list(followed.counts(tail.cursor(), "entropy", "all")["n"]) == [2, 4, 6]  # each rank has `step` tokens


def test_a_segment_that_vanishes_takes_its_rows_along(tmp_path: Path) -> None:
    followed, tail = Followed("torn"), Tail(tmp_path, min_interval_s=0.0)
    with Recorder(tmp_path, RunInfo(name="torn"), flush_s=0.0) as recorder:
        for step in (1, 2, 3):
            recorder.record(record(step))
            recorder.flush()
    tail.poll()
    agrees(followed, tail)
    (gone,) = (tmp_path / "runs/torn/data/steps/g0").glob("*-s00000002-*.parquet")
    shutil.move(gone, tmp_path / "elsewhere.parquet")
    tail.poll()
    agrees(followed, tail)
    assert list(followed.series("entropy")[0]) == [1, 3]


def test_thinned_points_keep_extremes_and_what_is_drawn_already() -> None:
    rng = np.random.default_rng(0)
    steps, values = np.arange(1, 5001), rng.normal(size=5000)
    values[[777, 4321]] = 9.0, -9.0
    values[100:140] = np.nan
    few_steps, few = thinned((steps, values), 600)
    assert 200 < len(few) < 650
    assert np.nanmax(few) == 9.0 and np.nanmin(few) == -9.0 and few_steps[-1] == 5000
    # 3 * 5000 / 600 = 25, so bins have 32 steps; those complete at 4,900 steps are the same at 5,000
    before, _ = thinned((steps[:4900], values[:4900]), 600)
    whole = 4900 // 32 * 32
    np.testing.assert_array_equal(before[before <= whole], few_steps[few_steps <= whole])
    assert len(thinned((steps[:500], values[:500]), 600)[0]) == 500


@pytest.mark.parametrize(("n", "most", "sizes"), [(10, 20, [1] * 10), (10, 5, [2] * 5), (11, 5, [4, 4, 3])])
def test_columns_pool_a_power_of_two_of_steps(n: int, most: int, sizes: list[int]) -> None:
    up, counts = np.arange(n) * 1.0, np.eye(n, CELLS, dtype=np.int64)
    rows = {"step": np.arange(n), "counts": counts, "n": np.ones(n), "sum": up, "min": -up, "max": up}
    rows["edges_id"] = np.array(["nats96"] * n, object)
    found = pooled(rows, most)
    assert list(found["n"]) == sizes and found["counts"].sum() == n
    assert found["sum"].sum() == n * (n - 1) / 2 and found["max"][-1] == n - 1 and found["min"][0] == 1 - sizes[0]
    whole = pooled(rows, most, whole=True)
    assert list(whole["n"]) == [size for size in sizes if size == sizes[0]]
    assert not len(pooled(summed({name: column[:0] for name, column in rows.items()}), most)["step"])
