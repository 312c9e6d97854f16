"""Arms compared by what they reach together: accuracy against variety. Pure functions of evaluation curves.

A run that learns faster loses variety sooner, so one step tells little. Its frontier asks instead: of all evaluations
of the run with at least this pass@1, which had the most distinct answers? Whoever may stop a run early gets that.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from monitor.queries.differences import crossing


def most_at(level: float, accuracy: np.ndarray, variety: np.ndarray) -> float:
    """F(level): the largest `variety` [evaluations] among evaluations with `accuracy` >= level; nan where none is.

    Example: accuracy .4 .7 .8, variety 7 11 9: F(.5) = 11, F(.75) = 9, F(.9) = nan.
    """
    reached = accuracy >= level
    return float(variety[reached].max()) if reached.any() else float("nan")


def frontier_area(accuracy: np.ndarray, variety: np.ndarray) -> float:
    """The area below the frontier, the integral of F(level) from 0 to 1, with 0 where no evaluation reaches the level.

    accuracy, variety: [evaluations], both in [0, 1] -> a number in [0, 1]. It is the hypervolume of the evaluations
    with reference point (0, 0), the usual size of a Pareto front. Source: Zitzler and Thiele 1999.
    Example: accuracy .4 .7 .8, variety .5 .7 .6: F is .7 up to .7 and .6 from there to .8: .7 * .7 + .1 * .6 = .55.
    """
    order = np.argsort(accuracy)
    levels, best = accuracy[order], np.maximum.accumulate(variety[order][::-1])[::-1]
    return float((np.diff(levels, prepend=0.0) * best).sum())


def at_equal_accuracy(
    steps: tuple[np.ndarray, np.ndarray],
    accuracy: tuple[np.ndarray, np.ndarray],
    figures: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Two runs where each first reaches the lower of their two best accuracies, on straight lines between evaluations.

    Each argument holds the one and the other run's values, [evaluations] each. Returns for both {name: value} with
    "step" and "accuracy", the common level.
    """
    level = min(float(values.max()) for values in accuracy)
    found = []
    for i in (0, 1):
        step = crossing(steps[i], accuracy[i], level)
        values = {name: float(np.interp(step, steps[i], series)) for name, series in figures[i].items()}
        found.append({"step": step, "accuracy": level, **values})
    return found[0], found[1]
