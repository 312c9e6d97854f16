"""Robust levels, noise and trends of short, noisy, correlated series."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

Direction = Literal["rising", "flat", "falling", "unknown"]

MIN_TREND_ROWS = 10
TREND_T = 3.0  # |t| from which a trend counts: above the 2 of independent noise, because steps are correlated
TINY_NATS = 1e-6  # entropies are clipped from below by it before the logarithm


@dataclass(frozen=True, slots=True)
class Trend:
    """A least-squares line through a few rows. slope: per step; t: slope / its standard error; rows: how many."""

    slope: float
    t: float
    rows: int

    @property
    def direction(self) -> Direction:
        """rising or falling if |t| >= TREND_T, flat if less, unknown with fewer than MIN_TREND_ROWS rows."""
        if self.rows < MIN_TREND_ROWS:
            return "unknown"
        if abs(self.t) < TREND_T:
            return "flat"
        return "rising" if self.slope > 0 else "falling"

    @property
    def error(self) -> float:
        """Standard error of the slope, per step."""
        return abs(self.slope / self.t) if self.t else math.inf


def fit_trend(steps: np.ndarray, values: np.ndarray) -> Trend:
    """Least-squares line of values [n] over steps [n], ignoring non-finite values.

    slope = Sxy / Sxx, t = slope / sqrt(residual variance / Sxx * (1 + r) / (1 - r)) with r >= 0 the lag-1
    autocorrelation of the residuals: steps of one run are not independent. An exact line has t = +-inf, a constant 0.
    """
    keep = np.isfinite(values)
    if not keep.all():
        steps, values = steps[keep], values[keep]
    n = len(values)
    if n < 3:
        return Trend(0.0, 0.0, n)
    x, sxx = _centred(steps)
    y = values - mean(values)
    slope = float(x @ y) / sxx
    residual = y - slope * x
    total = float(residual @ residual)
    error = math.sqrt(total / (n - 2) / sxx * _variance_inflation(residual, total))
    if abs(slope) * float(x.max() - x.min()) < 1e-12:  # rounding error of a constant is not a trend
        return Trend(0.0, 0.0, n)
    return Trend(slope, slope / error if error > 0 else math.copysign(math.inf, slope), n)


def mean(values: np.ndarray) -> float:
    """Mean of values [n], n > 0: np.mean's sum, which takes a tenth of its time for a few of them."""
    return float(np.add.reduce(values) / len(values))


def median(values: np.ndarray) -> float:
    """Median of finite values [n], n > 0; np.median takes ten times as long for a few of them."""
    ordered, middle = sorted(values.tolist()), len(values) // 2
    return float(ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2)


def log_noise(values: np.ndarray) -> float:
    """Robust standard deviation of ln(values) [n] around their line, widened for correlated rows.

    1.4826 * median |residual| * sqrt((1 + r) / (1 - r)), r the lag-1 autocorrelation of the residuals, or 0 if it is
    under its 2 / sqrt(n) of chance: a line through a few rows of a series that wanders takes most of its wandering for
    its course. The values are clipped from below at TINY_NATS.
    """
    y = np.log(np.maximum(values, TINY_NATS))
    x = np.arange(len(y)) - (len(y) - 1) / 2
    residual = y - y.mean() - (x @ y) / (x @ x) * x
    spread = 1.4826 * np.median(np.abs(residual - np.median(residual)))
    return float(spread * np.sqrt(_variance_inflation(residual, float(residual @ residual), 2 / np.sqrt(len(y)))))


def steps_to(level: float, target: float, slope: float) -> float:
    """Steps until level * exp(slope * steps) has fallen to target; 0 if it is there, inf if it does not fall."""
    if level <= target:
        return 0.0
    return math.log(target / level) / slope if slope < 0 else math.inf


def reach(level: float, target: float, trend: Trend) -> tuple[float, float, float]:
    """(soonest, expected, latest) steps until level falls to target, for a `trend` of logarithms that falls.

    Each is ln(target / level) / slope, with the slope's 95 % interval -+ 1.96 standard errors; inf where it rises.
    """
    slopes = (trend.slope - 1.96 * trend.error, trend.slope, trend.slope + 1.96 * trend.error)
    soonest, expected, latest = (steps_to(level, target, slope) for slope in slopes)
    return soonest, expected, latest


def _centred(steps: np.ndarray) -> tuple[np.ndarray, float]:
    """(float64 steps [n] less their mean, the sum of their squares); steps increase."""
    n = len(steps)
    if steps[-1] - steps[0] == n - 1:  # in a row, as nearly always
        return _in_a_row(n)
    x = steps.astype(np.float64)
    x -= mean(x)
    return x, float(x @ x)


@cache
def _in_a_row(n: int) -> tuple[np.ndarray, float]:
    x = np.arange(n) - (n - 1) / 2
    x.flags.writeable = False
    return x, float(x @ x)


def _variance_inflation(residual: np.ndarray, total: float, least: float = 0.0) -> float:
    """(1 + r) / (1 - r) of AR(1) residuals, r in [0, 0.9], 0 if under `least`; small windows underestimate r.

    total: the residuals' sum of squares.
    """
    r = float(residual[1:] @ residual[:-1]) / total if total > 0 else 0.0
    r = min(r, 0.9) if r >= least else 0.0
    return (1 + r) / (1 - r)
