"""What a rule sees of a run: the last rows, the baselines, and trends fitted to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Direction = Literal["rising", "flat", "falling", "unknown"]

BASELINE_ROWS = 20  # rows after warm-up whose median is the baseline
LEVEL_ROWS = 5  # rows whose median is the smoothed level: two outliers cannot move it
SLOPE_ROWS = 20  # rows of the entropy's log-slope
TREND_ROWS = 40  # rows of the trends of reward and length, which are noisier; also the window's size
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


def fit_trend(steps: np.ndarray, values: np.ndarray) -> Trend:
    """Least-squares line of values [n] over steps [n], ignoring non-finite values.

    slope = Sxy / Sxx, t = slope / sqrt(residual variance / Sxx * (1 + r) / (1 - r)) with r >= 0 the lag-1
    autocorrelation of the residuals: steps of one run are not independent. An exact line has t = +-inf, a constant 0.
    """
    keep = np.isfinite(values)
    x, y = steps[keep].astype(np.float64), values[keep]
    n = len(x)
    if n < 3:
        return Trend(0.0, 0.0, n)
    x, y = x - x.mean(), y - y.mean()
    sxx = float(x @ x)
    slope = float(x @ y) / sxx
    residual = y - slope * x
    error = float(np.sqrt(residual @ residual / (n - 2) / sxx * _variance_inflation(residual)))
    if abs(slope) * float(np.ptp(x)) < 1e-12:  # rounding error of a constant is not a trend
        return Trend(0.0, 0.0, n)
    return Trend(slope, slope / error if error > 0 else float(np.copysign(np.inf, slope)), n)


def baseline_noise(entropies: np.ndarray) -> float:
    """Robust standard deviation of ln(entropy) [n] around its line: 1.4826 * median |residual|."""
    y = np.log(np.maximum(entropies, TINY_NATS))
    x = np.arange(len(y)) - (len(y) - 1) / 2
    residual = y - y.mean() - (x @ y) / (x @ x) * x
    return float(1.4826 * np.median(np.abs(residual - np.median(residual))))


def _variance_inflation(residual: np.ndarray) -> float:
    """(1 + r) / (1 - r) of AR(1) residuals, r in [0, 0.9]; small windows underestimate r, never below 0 here."""
    total = float(residual @ residual)
    r = float(residual[1:] @ residual[:-1]) / total if total > 0 else 0.0
    r = min(max(r, 0.0), 0.9)
    return (1 + r) / (1 - r)


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """The last rows of a run, oldest first, for one evaluation of the rules.

    steps [n] int64, n <= TREND_ROWS; columns: key -> float64 [n], nan where the row has no value. Only rows with a
    finite entropy are kept. `baseline` is the median entropy in nats of the first BASELINE_ROWS rows after warm-up,
    nan until there are as many; `noise` the robust standard deviation of their logarithms around their line;
    `nonfinite_rows` counts the newest consecutive rows whose entropy was nan or inf.
    """

    steps: np.ndarray
    columns: dict[str, np.ndarray]
    baseline: float
    noise: float = 0.0
    nonfinite_rows: int = 0

    def level(self, key: str = "entropy") -> float:
        """Median of the last LEVEL_ROWS values of `key`; nan without any."""
        values = self.columns.get(key, np.empty(0))[-LEVEL_ROWS:]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else float("nan")

    def log_slope(self) -> Trend:
        """Trend of ln(entropy) over the last SLOPE_ROWS rows: 0.02 means about 2 % up per step."""
        entropy = self.columns["entropy"][-SLOPE_ROWS:]
        return fit_trend(self.steps[-SLOPE_ROWS:], np.log(np.maximum(entropy, TINY_NATS)))

    def trend(self, key: str) -> Direction:
        """Direction of `key` over the last TREND_ROWS rows; unknown without the column."""
        if key not in self.columns:
            return "unknown"
        return fit_trend(self.steps, self.columns[key]).direction
