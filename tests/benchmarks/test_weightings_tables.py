"""The study's statistics: known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.weightings_tables import AT_LAST, curve, summary


def run_of(accuracy: list[float], distinct: list[float]) -> dict[str, np.ndarray]:
    rows = [
        dict.fromkeys(AT_LAST, "0.5")
        | {
            "step": str(15 * i),
            "heldout/pass@1": str(a),
            "heldout/distinct": str(d),
            "first_warning": "40" if min(distinct) < 8 else "",
        }
        for i, (a, d) in enumerate(zip(accuracy, distinct, strict=True))
    ]
    return dict(curve(rows[::-1]))  # rows of any order


def test_an_arm_that_keeps_its_answers():
    uniform = {seed: run_of([0.4, 0.8, 0.8, 0.8], [8, 12, 6, 6]) for seed in (0, 1, 2)}
    arm = {seed: run_of([0.4, 0.6, 0.8, 0.8], [8, 12, 12, 12 + seed]) for seed in (0, 1, 2)}
    rows = summary("off-policy", "usual", {"uniform": uniform, "budget": arm}, {"uniform": "1e-4", "budget": "1e-4"})
    found = {(row["way"], row["figure"], row["arm"]): row for row in rows}

    last = found["last", "heldout/distinct", "budget"]
    # Means of the last three: uniform 24 / 3 = 8; the arm 36 / 3 + seed / 3 = 12, 12.33, 12.67.
    assert (last["uniform"], last["mean"]) == (8.0, pytest.approx(12 + 1 / 3))
    assert last["difference"] == pytest.approx(4 + 1 / 3)
    assert last["low"] > 0
    assert last["pairs"] == 3
    assert found["last", "warned", "uniform"]["mean"] == 1 and found["last", "warned", "budget"]["mean"] == 0
    assert found["last", "first_warning", "uniform"]["mean"] == 40

    # Both reach .8, uniform at step 15 with 12 answers, the arm at step 30 with 12.
    equal = found["equal", "heldout/distinct", "budget"]
    assert (equal["uniform"], equal["mean"], equal["difference"]) == (12.0, 12.0, 0.0)
    assert found["equal", "step", "budget"]["difference"] == 15

    # Frontier: uniform has 12 up to .8; the arm has 14, 13 or 12 up to .8.
    area = found["frontier", "area of distinct", "budget"]
    assert area["uniform"] == pytest.approx(0.8 * 12 / 16)
    assert area["mean"] == pytest.approx(0.8 * 13 / 16)
    assert found["frontier", "distinct at 0.9", "budget"]["n"] == 0  # nobody reached .9
    assert math.isnan(found["last", "heldout/distinct", "uniform"]["difference"])
