"""Where a run stands beside its start: known answers on series made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from monitor.alerts.outlook import outlook, vitals, window_of
from monitor.alerts.trends import Trend, reach

STEPS = np.arange(1, 101)


def test_a_fall_to_the_floor() -> None:
    # 40 steps at 1 nat, then 3 % less each step: at step 100 exp(-.03 * 60) = .165, the median of the last five .176
    entropy = np.exp(-0.03 * np.maximum(STEPS - 40, 0))
    found = outlook(window_of({"entropy": (STEPS, entropy)}))
    assert found is not None
    assert (found.baseline, found.floor) == (1.0, 0.1)
    assert found.level == pytest.approx(math.exp(-0.03 * 58))
    assert found.direction == "falling" and found.slope == pytest.approx(-0.03)
    assert found.steps_left == pytest.approx(math.log(0.1 / found.level) / -0.03)  # 18.8
    assert found.since == 10  # the first ten steps already had the highest mean
    assert found.soonest == pytest.approx(found.steps_left, rel=1e-3)  # an exact line has no spread


def test_since_is_the_end_of_the_best_rows() -> None:
    entropy = np.where(STEPS <= 50, 0.5 + STEPS / 100, 1.5 - STEPS / 100)  # up to 1 at step 50, then down to .5
    found = outlook(window_of({"entropy": (STEPS, entropy)}, warmup_steps=20))
    assert found is not None and found.baseline == pytest.approx(0.5 + 0.305)  # median of steps 21 to 40
    assert found.since == 55  # the mean of ten rows is highest over 46 to 55
    rises = outlook(window_of({"entropy": (STEPS, 1 + STEPS / 100)}))
    assert rises is not None and rises.since is None and math.isnan(rises.steps_left)


def test_no_outlook_before_the_baseline() -> None:
    assert outlook(window_of({"entropy": (STEPS[:19], np.ones(19))})) is None
    assert outlook(window_of({"entropy": (STEPS[:24], np.ones(24))}, warmup_steps=5)) is None
    assert outlook(window_of({})) is None


def test_reach_widens_with_the_slopes_error() -> None:
    # ln 2 = .693 at .02 a step, -+ 1.96 * .005
    soonest, expected, latest = reach(0.2, 0.1, Trend(-0.02, -4.0, 20))
    assert expected == pytest.approx(math.log(2) / 0.02)
    assert soonest == pytest.approx(math.log(2) / 0.0298) and latest == pytest.approx(math.log(2) / 0.0102)
    assert reach(0.2, 0.1, Trend(-0.02, -1.0, 20))[2] == math.inf  # the interval holds rising slopes


def test_vitals_say_how_a_series_stands_to_its_start() -> None:
    ripple = 0.01 * (-1.0) ** STEPS
    late = STEPS > 60
    window = window_of(
        {
            "reward": (STEPS, 0.4 + 0.4 * late + ripple),
            "truncated_share": (STEPS, 0.1 + 0.3 * late + ripple),
            "grad_norm": (STEPS, 1.0 + ripple),
            "response_length": (STEPS, 20.0 + 10 * late + ripple),
            "kl": (STEPS[:8], np.zeros(8)),
            "eval/heldout/distinct": (STEPS[::20], np.array([4.0, 8.0, 10.0, 9.0, 5.0])),
            "eval/heldout/pass@1": (STEPS[::20], np.array([0.2, 0.4, 0.5, 0.6, 0.7])),
        }
    )
    keys = (*window.series, "never_recorded")
    found = {vital.key: (vital.judgement, vital.word) for vital in vitals(window, keys, {})}
    assert found == {
        "reward": ("better", "up from 0.4"),
        "truncated_share": ("worse", "up from 10%"),
        "grad_norm": ("as before", "as at its start"),
        "response_length": ("changed", "up from 20"),  # neither good nor bad by itself
        "kl": ("too early", "8 of 20 rows"),
        "eval/heldout/distinct": ("worse", "best 10"),  # 5 is under .8 * 10
        "eval/heldout/pass@1": ("as before", "at its best"),
    }
    fires = vitals(window, ("grad_norm",), {"grad_norm": ("critical", "Gradients burst")})
    assert [(vital.judgement, vital.word) for vital in fires] == [("critical", "Gradients burst")]
