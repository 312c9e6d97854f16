"""The plan of the study: every run of it can be started, and none twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.study_weightings import ARMS, PARTS, SETTINGS, USUAL, Run, best_rates, part_of_study, score


@pytest.mark.parametrize("part", PARTS)
def test_every_run_of_a_part_has_a_configuration_of_its_own(part, tmp_path):
    setting = part.rpartition("-")[0]
    runs = list(part_of_study(part, {(setting, arm): "3e-5" for arm in ARMS}))
    assert len(set(runs)) == len({run.name for run in runs}) == len(runs) > 0
    for run in {run.arm: run for run in runs}.values():  # one seed and rate of each arm
        config = run.job(tmp_path).config
        assert (config.seed, config.optim.lr, config.steps) == (run.seed, float(run.lr), 150)
        assert config.weighting.kind == run.text.partition(":")[0]
        assert config.task == ("paths" if setting == "paths" else "chain")


def test_an_arm_whose_best_rate_is_the_usual_one_is_not_trained_again():
    assert not list(part_of_study("off-policy-best", {("off-policy", arm): USUAL["off-policy"] for arm in ARMS}))


def test_the_best_rate_is_that_of_the_highest_sum():
    def rows(accuracy: float, distinct: float) -> list[dict[str, str]]:
        last = {"heldout/pass@1": str(accuracy), "heldout/distinct": str(distinct)}
        return [{"step": "0", "heldout/pass@1": "9", "heldout/distinct": "9"}] + [
            last | {"step": str(step)} for step in (120, 135, 150)
        ]

    # .9 + 4 / 16 = 1.15 at 1e-4, .6 + 12 / 16 = 1.35 at 3e-5, .95 + 2 / 16 = 1.075 at 3e-4
    assert score(rows(0.9, 4)) == pytest.approx(1.15)
    known = {
        Run("off-policy", "uniform", lr, 100): rows(*ends)
        for lr, ends in {"1e-4": (0.9, 4), "3e-5": (0.6, 12), "3e-4": (0.95, 2)}.items()
    }
    assert best_rates(known) == {("off-policy", "uniform"): "3e-5"}
    known.pop(Run("off-policy", "uniform", "3e-4", 100))
    assert best_rates(known) == {}  # not before all three are there


def test_settings_name_presets_that_ship():
    presets = Path(__file__).parents[2] / "trainer" / "presets"
    assert {preset for preset, *_ in SETTINGS.values()} <= {path.stem for path in presets.glob("*.toml")}
