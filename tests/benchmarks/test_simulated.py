"""benchmarks/bench_alerts.py: what a simulated run is, and how a shape is scored."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import bench_alerts
from benchmarks.bench_alerts import DAMAGED, HEALTHY, Shape, linear, measure, settled_at, simulate
from monitor.alerts.rules import RULES

BY_NAME = {shape.name: shape for shape in HEALTHY + DAMAGED}


def test_names_are_unique_and_every_rule_is_right_in_some_shape():
    assert len(BY_NAME) == len(HEALTHY + DAMAGED)
    assert {rule for shape in DAMAGED for rule in shape.right} == set(RULES)
    assert not any(shape.right for shape in HEALTHY)


def test_damage_is_done_at_95_percent_of_the_way_in_logarithms():
    # 1 to e^-2 over 101 rows: the way is 2, 95 % of it 1.9 at row 95
    assert settled_at(np.exp(-0.02 * np.arange(101))) == 95
    assert settled_at(np.where(np.arange(50) < 30, 1.0, 0.4)) == 30


def test_the_same_seed_is_the_same_run_and_its_length_goes_by_the_seed():
    shape = BY_NAME["flat, noise 0.10, phi 0.5"]
    first, again = simulate(shape, 10_000)[0], simulate(shape, 10_000)[0]
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert [len(simulate(shape, seed)[0]["step"]) for seed in (0, 1, 2)] == [120, 200, 400]


def test_rows_go_missing_break_and_thin_out_as_the_shape_says():
    missing = simulate(BY_NAME["missing points: a fifth of all values"], 2)[0]
    assert 0.1 < np.mean([value is None for value in missing["entropy"]]) < 0.3
    broken = simulate(BY_NAME["non-finite points: single rows of nan and inf"], 0)[0]["entropy"].astype(float)
    rows = np.flatnonzero(~np.isfinite(broken))
    assert len(rows) >= 7 and np.diff(rows).min() > 1
    steps = simulate(BY_NAME["logged every step, then every fifth"], 0)[0]["step"]
    assert list(steps[58:62]) == [58, 59, 60, 65] and steps[-1] == 115


@pytest.mark.parametrize("right, fired, false", [(("reward_lost",), 2, 0), (("kl_runaway",), 0, 2), ((), "", 2)])
def test_an_alert_of_a_rule_that_is_not_right_is_a_false_alarm(right, fired, false):
    shape = Shape(
        "x", right, {"reward": linear(0.6, 0.1, 0.4, 0.5)}, "reward", only=("entropy", "reward"), steps=(120,)
    )
    row = measure(shape, range(2))
    assert (row["fired"], row["false_alarms"], row["by_rule"]) == (fired, false, "reward_lost:2")


def test_the_lead_is_from_the_first_right_alert_to_the_damage(monkeypatch):
    monkeypatch.setattr(bench_alerts, "REWARD_NOISE", 0.01)
    # reward falls from step 48 to 60 of 120 (0.4 and 0.5 of 119), 95 % of ln(0.6 / 0.1) at reward 0.109, step 60
    shape = Shape("x", ("reward_lost",), {"reward": linear(0.6, 0.1, 0.4, 0.5)}, "reward", steps=(120,))
    assert simulate(shape, 0)[1] == 60
    assert 0 < measure(shape, range(1))["lead_median_steps"] < 12
