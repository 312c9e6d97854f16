"""The corpus of real runs: its settings, how outcomes are labelled, and that what is packed is what was drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.corpus import load, pack
from benchmarks.corpus.grid import RUNS, SECOND, corpus_run
from benchmarks.corpus.labels import DISTINCT, PASS, Outcome, outcome
from benchmarks.corpus.load import PARTS, Recorded, packed_runs
from trainer.config import TrainConfig

STEPS = np.arange(0, 101, 10)


def series(passed: list[float], distinct: list[float] | None = None) -> dict[str, np.ndarray]:
    found = {"step": STEPS, PASS: np.array(passed)}
    return found | ({} if distinct is None else {DISTINCT: np.array(distinct)})


def test_every_run_is_drawn_the_same_and_parts_alternate() -> None:
    runs = [corpus_run(number) for number in range(RUNS)]
    assert [run.part for run in runs[:4]] == ["development", "test", "development", "test"]
    assert runs == [corpus_run(number) for number in range(RUNS)]
    assert {run.config.steps for run in runs[:SECOND]} == {100} and {run.config.steps for run in runs[SECOND:]} == {120}
    assert len({run.config.model for run in runs}) == 2 and len({run.config.weighting.kind for run in runs}) >= 6


def test_packed_runs_are_those_of_the_grid_with_every_step() -> None:
    found = {part: list(packed_runs(part)) for part in PARTS}
    names = [run.name for runs in found.values() for run in runs]
    assert len(names) == len(set(names)) >= 131
    for part, runs in found.items():
        for run in runs:
            drawn = corpus_run(run.about["number"])
            assert (run.name, part) == (drawn.name, drawn.part)
            assert TrainConfig.of_run(run.about["config"]) == drawn.config
            if not run.about["error"]:
                assert run.series["step"].tolist() == list(range(drawn.config.steps + 1))
            assert np.isfinite(run.series[PASS]).sum() == len(run.series["step"][:: drawn.config.eval.every])
            tokens = run.series["tokens"][1::4]  # of the steps whose histograms are kept
            assert run.counts["entropy/all"].sum(1).tolist() == tokens.tolist()


def test_a_reward_that_is_lost() -> None:
    # 0.6 * 0.5 = 0.30: the median of (.45 .28 .1) at step 50 is the first at or below it, after 40
    passed = [0.3, 0.4, 0.5, 0.5, 0.45, 0.28, 0.1, 0.05, 0.02, 0.0, 0.0]
    assert outcome(series(passed)) == Outcome("reward_lost", 50, 40)
    # one bad evaluation labels nothing, because the median of three ignores it
    assert outcome(series([0.3, 0.4, 0.5, 0.05, 0.5, 0.5, 0.52, 0.5, 0.55, 0.5, 0.5])).kind == "healthy"
    # it comes back
    assert not outcome(series([0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.4, 0.5, 0.5, 0.5, 0.5])).damaged


def test_answers_that_are_lost_while_the_reward_climbs() -> None:
    passed = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.9, 0.95, 0.95]
    distinct = [4.0, 6, 8, 9, 9, 8, 7, 5, 4, 2, 2]  # 0.6 * 9 = 5.4: the median of (7 5 4) at step 70
    assert outcome(series(passed, distinct)) == Outcome("diversity_lost", 70, 60)
    assert outcome(series(passed, [4.0, 6, 8, 9, 9, 8, 8, 7.5, 7, 7, 7])).kind == "healthy"  # ends at 78 % of its peak
    assert outcome(series(passed, [4.0, 6, 8, 9, 9, 8, 7, 7, 6.5, 6, 6])).kind == "unclear"  # at 69 %


def test_the_other_outcomes() -> None:
    assert outcome(series([0.0, 0.01] + [0.0] * 9)).kind == "no_signal"
    assert outcome(series([0.3] * 11)).kind == "stall"
    assert outcome(series([0.3] * 8 + [0.45] * 3)).kind == "healthy"  # 0.15 over standard errors of about 0.03
    # a weak base policy can lose what it has: .08 of 192 samples is three standard errors above nothing
    assert outcome(series([0.08] + [0.0] * 10)).kind == "reward_lost"
    assert outcome(series([0.04] + [0.0] * 10)).kind == "stall"  # too little to lose


def test_packing_keeps_what_was_packed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "PACKED", tmp_path)

    def run(name: str, value: float, **more: np.ndarray) -> Recorded:
        columns = {"step": np.arange(5), "reward": np.full(5, value)} | more
        return Recorded({"name": name}, columns, {"entropy/all": np.full((5, 3), int(10 * value))})

    def packed(runs: list[Recorded]) -> list[Recorded]:
        path = tmp_path / "test-series.parquet"
        for target, table in (
            (path, pack.series_table(runs)),
            (tmp_path / f"histograms-{path.name}", pack.histogram_table(runs)),
        ):
            pack.pq.write_table(pack.joined(target, table, {one.name for one in runs}), target)
        return list(packed_runs("test"))

    packed([run("c001", 0.5), run("c003", 0.25)])
    found = packed([run("c003", 0.75), run("c005", 1.0, kl=np.ones(5))])
    assert [(one.name, one.series["reward"][0]) for one in found] == [("c001", 0.5), ("c003", 0.75), ("c005", 1.0)]
    assert ["kl" in one.series for one in found] == [False, False, True]
    assert [one.counts["entropy/all"].tolist() for one in found] == [[[5] * 3], [[7] * 3], [[10] * 3]]  # of step 1
