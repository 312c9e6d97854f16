"""What a rule sees of a run: the last rows, each series' own baseline and best level, and the evaluations so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from monitor.alerts.trends import MIN_TREND_ROWS, TINY_NATS, Direction, Trend, fit_trend, log_noise, mean, median

BASELINE_ROWS = 20  # values after warm-up whose median is the baseline
START_ROWS = 3  # first values of a series, warm-up or not, whose mean is how the policy began
BEST_ROWS = 10  # rows whose mean is the running level that the best one is taken of
LEVEL_ROWS = 5  # rows whose median is the smoothed level: two outliers cannot move it
SLOPE_ROWS = 20  # rows of the entropy's log-slope
TREND_ROWS = 40  # rows of the trends of noisier series; also the window's size

Series = tuple[np.ndarray, np.ndarray]  # steps int64 [n] and finite values float64 [n], oldest first
_NOTHING: Series = (np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True, slots=True)
class Baseline:
    """How a series began: of its first BASELINE_ROWS finite values after warm-up.

    value: their median. log_noise: the robust standard deviation of their logarithms around the logarithms' line.
    """

    value: float
    log_noise: float

    @classmethod
    def of(cls, values: np.ndarray) -> Baseline:
        return cls(float(np.median(values)), log_noise(values))


@dataclass(frozen=True, slots=True)
class Best:
    """The highest and lowest mean of BEST_ROWS rows in a row that a series has had, and the steps where they ended."""

    high: float
    high_step: int
    low: float
    low_step: int


@dataclass(frozen=True, slots=True)
class Fall:
    """How far a series is below its own best. now: mean of the last rows. error: standard error of best.high - now."""

    best: Best
    now: float
    error: float

    @property
    def z(self) -> float:
        """(best - now) / error."""
        return (self.best.high - self.now) / self.error


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A run as rules judge it at one step.

    series: of each key its last TREND_ROWS finite values with their steps, of an evaluated key ("eval/...") all of
    them. "Rows" below are values of the one series: a series that is logged every other step has half as many.
    baselines: of each key whose first BASELINE_ROWS values are complete. bests: of each with BEST_ROWS values.
    starts: of each with START_ROWS values the mean of the first ones. nonfinite: of each key how many of its newest
    values in a row were nan or inf.
    """

    series: Mapping[str, Series]
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    bests: Mapping[str, Best] = field(default_factory=dict)
    starts: Mapping[str, float] = field(default_factory=dict)
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    _slopes: dict[tuple[str, int], Trend] = field(default_factory=dict, init=False, repr=False)  # that were asked for

    def last(self, key: str, rows: int = TREND_ROWS) -> Series:
        """(steps, values) of the last `rows` rows of `key`; empty for a series that is not known."""
        steps, values = self.series.get(key, _NOTHING)
        return steps[-rows:], values[-rows:]

    def level(self, key: str = "entropy", rows: int = LEVEL_ROWS) -> float:
        """Median of the last `rows` rows of `key`; nan without any."""
        values = self.last(key, rows)[1]
        return median(values) if len(values) else math.nan

    def mean(self, key: str, rows: int) -> float:
        """Mean of the last `rows` rows of `key`; nan without any. For shares of a few rollouts, whose medians jump."""
        values = self.last(key, rows)[1]
        return mean(values) if len(values) else math.nan

    def baseline(self, key: str = "entropy") -> float:
        """Median of the first values of `key` after warm-up; nan until they are complete."""
        found = self.baselines.get(key)
        return math.nan if found is None else found.value

    def start(self, key: str) -> float:
        """Mean of the first START_ROWS values of `key`, also of those in warm-up; nan until they are complete."""
        return self.starts.get(key, math.nan)

    def fall(self, key: str, rows: int) -> Fall | None:
        """How far the mean of the last `rows` rows of `key` is below its best; None where that is not known yet.

        error = jitter sqrt(1 / BEST_ROWS + 1 / rows).
        """
        best, sd = self.bests.get(key), self.jitter(key)
        if best is None or math.isnan(sd):
            return None
        return Fall(best, self.mean(key, rows), max(sd, 1e-9) * math.sqrt(1 / BEST_ROWS + 1 / rows))

    def jitter(self, key: str, least_rows: int = MIN_TREND_ROWS) -> float:
        """Standard deviation of a row of `key` around its moving mean, from the differences of the last rows in a row.

        The larger of the plain and the robust estimate, each over sqrt(2); nan under `least_rows` rows.
        """
        values = self.last(key)[1]
        if len(values) < least_rows:
            return math.nan
        steps = values[1:] - values[:-1]
        return max(math.sqrt(mean(steps * steps)), 1.4826 * median(np.abs(steps))) / math.sqrt(2)

    def log_slope(self, key: str = "entropy", rows: int = SLOPE_ROWS) -> Trend:
        """Trend of ln(`key`) over the last `rows` rows: 0.02 means about 2 % up per step."""
        asked = (f"ln {key}", rows)
        if asked not in self._slopes:
            steps, values = self.last(key, rows)
            self._slopes[asked] = fit_trend(steps, np.log(np.maximum(values, TINY_NATS)))
        return self._slopes[asked]

    def slope(self, key: str, rows: int = TREND_ROWS) -> Trend:
        """Trend of `key` over the last `rows` rows."""
        if (key, rows) not in self._slopes:  # several rules ask for the reward's
            self._slopes[key, rows] = fit_trend(*self.last(key, rows))
        return self._slopes[key, rows]

    def trend(self, key: str) -> Direction:
        """Direction of `key` over the last TREND_ROWS rows; unknown without the series."""
        return self.slope(key).direction
