"""The study of weightings in numbers: arms against uniform, paired by seed. Reads rows of study_weightings.py.

Each arm is compared at its setting's usual learning rate and at its own best one, in three ways:
- last: mean of the last three evaluations.
- equal: where the arm and uniform first reach the lower of their two best held-out pass@1.
- frontier: area below the most distinct answers (as a share of 16), or the highest pass@16, at each held-out pass@1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.frontier import at_equal_accuracy, frontier_area, most_at
from monitor.stats.paired import holm, paired_difference

BASELINE = "uniform"
SAMPLES = 16
LAST = 3  # evaluations that "last" is the mean of
LEVEL, DISTINCT, PASS16 = "heldout/pass@1", "heldout/distinct", "heldout/pass@16"
AT_LAST = (LEVEL, PASS16, DISTINCT, "ood/pass@1", "ood/pass@16", "ood/distinct", "multipath/pass@1",
           "multipath/distinct", "entropy")  # fmt: skip
AT_EQUAL = (PASS16, DISTINCT, "ood/pass@1", "multipath/distinct", "entropy")
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)  # of pass@1, at which the frontier is shown

Curve = Mapping[str, np.ndarray]  # name of a figure -> its values [evaluations], and "step"
Values = dict[str, float]


def curve(rows: Sequence[Mapping[str, str]]) -> Curve:
    """The evaluations of one run, in the order of steps; nan where a figure is missing."""
    ordered = sorted(rows, key=lambda row: int(row["step"]))
    names = ("step", *AT_LAST, "first_warning")
    return {name: np.array([float(row[name] or "nan") for row in ordered]) for name in names}


def at_last(run: Curve) -> Values:
    """The figures at the end, whether an alert of severity warning or worse fired in the run, and at which step."""
    warned = run["first_warning"][-1]
    figures = {name: float(run[name][-LAST:].mean()) for name in AT_LAST}
    return figures | {"warned": float(np.isfinite(warned)), "first_warning": float(warned)}


def on_frontier(run: Curve) -> Values:
    """Areas, and the most distinct answers at each level of pass@1."""
    accuracy, share = run[LEVEL], run[DISTINCT] / SAMPLES
    areas = {
        "area of distinct": frontier_area(accuracy, share),
        "area of pass@16": frontier_area(accuracy, run[PASS16]),
    }
    return areas | {f"distinct at {level}": most_at(level, accuracy, run[DISTINCT]) for level in LEVELS}


def summary(
    setting: str, rate: str, arms: Mapping[str, Mapping[int, Curve]], lrs: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row for each way, figure and arm. arms: {arm: {seed: curve}}, uniform among them; lrs: {arm: its rate}."""
    about = {"setting": setting, "rate": rate}
    rows: list[dict[str, Any]] = []
    for way, measure in (("last", at_last), ("frontier", on_frontier)):
        rows += _against_baseline(way, {arm: _each(measure, of) for arm, of in arms.items()})
    for arm, of in arms.items():
        if arm != BASELINE:
            pairs = {seed: _equal(of[seed], arms[BASELINE][seed]) for seed in of if seed in arms[BASELINE]}
            mine = {seed: pair[0] for seed, pair in pairs.items()}
            theirs = {seed: pair[1] for seed, pair in pairs.items()}
            rows += [row for row in _against_baseline("equal", {BASELINE: theirs, arm: mine}) if row["arm"] == arm]
    _correct(rows)
    return [about | {"lr": lrs[row["arm"]]} | row for row in rows]


def _each(measure: Callable[[Curve], Values], runs: Mapping[int, Curve]) -> dict[int, Values]:
    return {seed: measure(run) for seed, run in runs.items()}


def _equal(mine: Curve, theirs: Curve) -> tuple[Values, Values]:
    figures = [{name: run[name] for name in AT_EQUAL} for run in (mine, theirs)]
    return at_equal_accuracy((mine["step"], theirs["step"]), (mine[LEVEL], theirs[LEVEL]), (figures[0], figures[1]))


def _against_baseline(way: str, arms: Mapping[str, Mapping[int, Values]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    baseline = arms[BASELINE]
    for arm, of in arms.items():
        for name in next(iter(of.values())):
            values = np.array([of[seed][name] for seed in sorted(of)])
            known = values[np.isfinite(values)]
            row: dict[str, Any] = {"way": way, "figure": name, "arm": arm, "seeds": len(values), "n": len(known)}
            row |= {"mean": _mean(known), "sd": float(known.std(ddof=1)) if len(known) > 1 else np.nan}
            both = sorted(of.keys() & baseline.keys())
            base = np.array([baseline[seed][name] for seed in both])
            gap = paired_difference(base, np.array([of[seed][name] for seed in both]))
            own = arm == BASELINE
            row |= {"uniform": _mean(base[np.isfinite(base)]), "pairs": gap.n}
            row |= {key: np.nan if own else getattr(gap, "mean" if key == "difference" else key) for key in
                    ("difference", "low", "high", "p", "p_t")}  # fmt: skip
            rows.append(row)
    return rows


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _correct(rows: Sequence[dict[str, Any]]) -> None:
    """Adds p_t_holm: p of the paired t test, corrected over the arms for each way and figure."""
    for key in {(row["way"], row["figure"]) for row in rows}:
        own = [row for row in rows if (row["way"], row["figure"]) == key]
        tested = [row for row in own if np.isfinite(row["p_t"])]
        corrected = dict(
            zip([row["arm"] for row in tested], holm(np.array([row["p_t"] for row in tested])), strict=True)
        )
        for row in own:
            row["p_t_holm"] = float(corrected.get(row["arm"], np.nan))
