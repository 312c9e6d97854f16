"""What became of a run, from its held-out evaluations alone: no series that a detector sees of training is used.

The rule, for each of pass@1 and the number of distinct correct answers (of 16 samples of 12 held-out prompts, every 10
steps):

- The evaluations are smoothed by a running median of three, so that one lucky or unlucky evaluation labels nothing.
- A run is damaged at the first evaluation from which the smoothed value stays at or below 60 % of its running peak to
  the end, if the fall is more than three standard errors of the difference between the peak and the mean of what
  follows, and if two evaluations or more say so. Peaks under 5 % (pass@1) or one answer (distinct) have nothing to
  lose.
- The true step lies after the evaluation before that one: (earliest, damage_step].
- A run that ends between 60 and 75 % of its peak, or whose fall is not yet certain, is "unclear" and counts on neither
  side.

Of the undamaged runs: "no_signal" never gets above 3 % pass@1; "stall" does not gain two standard errors over its
start; "healthy" does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.corpus.grid import PROMPTS, SAMPLES

LOST, SAFE = 0.60, 0.75  # shares of the peak: damaged at or below the first, undamaged at or above the second
STANDARD_ERRORS = 3.0
PASS, DISTINCT = "eval/heldout/pass@1", "eval/heldout/distinct"
LEAST_PEAK = {PASS: 0.05, DISTINCT: 1.0}
NO_SIGNAL = 0.03
KINDS = ("healthy", "stall", "no_signal", "reward_lost", "diversity_lost", "unclear")


@dataclass(frozen=True, slots=True)
class Outcome:
    """kind: one of KINDS. damage_step: first evaluation that shows the damage; earliest: the one before it."""

    kind: str
    damage_step: int | None = None
    earliest: int | None = None

    @property
    def damaged(self) -> bool:
        return self.damage_step is not None


def outcome(series: Mapping[str, np.ndarray]) -> Outcome:
    """The outcome of a run. series: "step", PASS and DISTINCT as columns of equal length, nan between evaluations."""
    known = np.isfinite(series[PASS])
    steps, passed = series["step"][known], series[PASS][known]
    found = [_fall(steps, passed, PASS)]
    if DISTINCT in series:
        found.append(_fall(steps, series[DISTINCT][known], DISTINCT))
    damages = [fall for fall in found if fall.damaged]
    if damages:
        return min(damages, key=lambda fall: fall.damage_step or 0)
    if any(fall.kind == "unclear" for fall in found):
        return Outcome("unclear")
    smooth = smoothed(passed)
    if smooth.max() < NO_SIGNAL:
        return Outcome("no_signal")
    gain = passed[-3:].mean() - passed[:2].mean()
    error = math.sqrt(_variance(passed[-3:].mean(), PASS) / 3 + _variance(passed[:2].mean(), PASS) / 2)
    return Outcome("healthy" if gain >= 2 * error else "stall")


def smoothed(values: np.ndarray) -> np.ndarray:
    """Running median of three [n]; the first value stays (the base policy's), the last is the mean of the last two."""
    inner = [float(np.median(values[i - 1 : i + 2])) for i in range(1, len(values) - 1)]
    return np.array([values[0], *inner, values[-2:].mean()])


def _fall(steps: np.ndarray, values: np.ndarray, key: str) -> Outcome:
    smooth = smoothed(values)
    peaks = np.maximum.accumulate(smooth)
    if peaks[-1] < LEAST_PEAK[key]:
        return Outcome("undamaged")
    low = (smooth <= LOST * peaks) & (peaks >= LEAST_PEAK[key])
    start = len(low) - int(np.argmin(low[::-1])) if not low.all() else 0
    if start < len(low):
        peak, after = peaks[start], values[start:]
        error = math.sqrt(_variance(peak, key) / 2 + _variance(after.mean(), key) / len(after))
        certain = len(after) >= 2 and peak - after.mean() > STANDARD_ERRORS * error
        if certain and start > 0:
            kind = "reward_lost" if key == PASS else "diversity_lost"
            return Outcome(kind, int(steps[start]), int(steps[start - 1]))
        return Outcome("unclear")
    return Outcome("undamaged" if values[-3:].mean() >= SAFE * peaks[-1] else "unclear")


def _variance(mean: float, key: str) -> float:
    """Variance of one evaluation's value, from above: prompts are the same each time, so only sampling is left."""
    if key == PASS:
        return max(mean * (1 - mean), 1 / (PROMPTS * SAMPLES)) / (PROMPTS * SAMPLES)
    return max(mean * (1 - mean / SAMPLES), 0.1) / PROMPTS  # of a count of distinct forms: at most that of a binomial
