"""Frontiers of accuracy against variety: known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from benchmarks.frontier import at_equal_accuracy, frontier_area, most_at

ACCURACY, VARIETY = np.array([0.4, 0.8, 0.7]), np.array([0.5, 0.6, 0.7])
unit = st.floats(0, 1)


def test_the_most_among_evaluations_that_reach_the_level():
    assert most_at(0.5, ACCURACY, VARIETY) == 0.7
    assert most_at(0.75, ACCURACY, VARIETY) == 0.6
    assert math.isnan(most_at(0.9, ACCURACY, VARIETY))


def test_the_area_is_the_sum_of_its_steps():
    # .7 up to accuracy .7, then .6 to .8: .49 + .06. The first evaluation lies below and adds nothing.
    assert frontier_area(ACCURACY, VARIETY) == pytest.approx(0.55)
    assert frontier_area(np.array([0.5]), np.array([0.4])) == pytest.approx(0.2)


@settings(deadline=None)  # a busy machine is slow
@given(arrays.arrays(np.float64, (2, 6), elements=unit))
def test_the_area_is_the_integral_of_the_frontier(points):
    accuracy, variety = points
    middles = (np.arange(4000) + 0.5) / 4000
    integral = np.mean([np.nan_to_num(most_at(level, accuracy, variety)) for level in middles])
    assert frontier_area(accuracy, variety) == pytest.approx(
        integral, abs=6 / 4000
    )  # each edge is off by a cell at most


@settings(deadline=None)
@given(arrays.arrays(np.float64, (2, 5), elements=unit), unit, unit)
def test_another_evaluation_never_makes_the_area_smaller(points, accuracy, variety):
    more = np.append(points, [[accuracy], [variety]], axis=1)
    assert frontier_area(*more) >= frontier_area(*points) - 1e-12


def test_equal_accuracy_is_the_lower_of_the_two_best():
    steps = np.array([0.0, 10.0, 20.0])
    one, other = np.array([0.2, 0.6, 0.5]), np.array([0.2, 0.4, 0.8])
    mine, theirs = at_equal_accuracy(
        (steps, steps), (one, other), ({"distinct": np.array([4.0, 8.0, 6.0])}, {"distinct": np.array([4.0, 6.0, 2.0])})
    )
    # The level is .6. The one is there at step 10, the other at 10 + 10 * (.6 - .4) / (.8 - .4) = 15, between 6 and 2.
    assert mine == {"step": 10.0, "accuracy": 0.6, "distinct": 8.0}
    assert theirs == pytest.approx({"step": 15.0, "accuracy": 0.6, "distinct": 4.0})
