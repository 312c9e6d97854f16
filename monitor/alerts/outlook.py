"""How a run stands beside its own start: each series against its baseline, and the way to the entropy's floor.

Nothing here raises an alert. A series whose alert fires has that alert's severity; of the others is said whether they
left the level at which they began, and whether that is good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from monitor.alerts.rules import DEFAULT_RULES
from monitor.alerts.trends import TINY_NATS, Direction, fit_trend, reach
from monitor.alerts.window import (
    BASELINE_ROWS,
    BEST_ROWS,
    LEVEL_ROWS,
    SLOPE_ROWS,
    TREND_ROWS,
    Baseline,
    Best,
    Series,
    Window,
)
from monitor.metrics import metric

Judgement = Literal["too early", "as before", "changed", "better", "worse", "info", "warning", "critical"]
CHANGED_Z = 4.0  # standard errors between level and baseline from which a series counts as changed
CHANGED_SHARE = 0.1  # and at least this part of its baseline; of a share: a tenth of 10 percentage points
LOST_SHARE = 0.8  # of its best, below which an evaluation counts as worse


@dataclass(frozen=True, slots=True)
class Vital:
    """One series as it is now. level: median of its last rows; baseline: that of its first rows after warm-up.

    judgement: the severity of a firing alert on it, else how level and baseline compare. word: the same in words.
    """

    key: str
    level: float
    baseline: float
    judgement: Judgement
    word: str


@dataclass(frozen=True, slots=True)
class Outlook:
    """Where a series is on its way down. since: the step at which its running mean was highest, None if it is there.

    floor: level at which its rule calls it lost. soonest, steps_left, latest: steps to the floor, on the line through
    the logarithms of the last rows, with the 95 % interval of its slope; inf where it does not get there, nan for a
    series that does not fall. slope: of the logarithms, per step; error: its standard error.
    """

    level: float
    baseline: float
    floor: float
    direction: Direction
    since: int | None
    soonest: float
    steps_left: float
    latest: float
    slope: float
    error: float


def window_of(series: Mapping[str, Series], warmup_steps: int = 0) -> Window:
    """The window of whole series {key: (steps, values)}, as an engine that has seen all of it has it."""
    finite = {key: (steps[np.isfinite(values)], values[np.isfinite(values)]) for key, (steps, values) in series.items()}
    finite = {key: pair for key, pair in finite.items() if len(pair[0])}
    after = {key: values[steps > warmup_steps] for key, (steps, values) in finite.items()}
    return Window(
        {key: (steps[-TREND_ROWS:], values[-TREND_ROWS:]) for key, (steps, values) in finite.items()},
        {k: Baseline.of(v[:BASELINE_ROWS]) for k, v in after.items() if len(v) >= BASELINE_ROWS},
        {key: _best(*pair) for key, pair in finite.items() if len(pair[0]) >= BEST_ROWS},
    )


def _best(steps: np.ndarray, values: np.ndarray) -> Best:
    total = np.concatenate([[0.0], np.cumsum(values)])
    means = (total[BEST_ROWS:] - total[:-BEST_ROWS]) / BEST_ROWS
    high, low = int(np.argmax(means)), int(np.argmin(means))
    last = steps[BEST_ROWS - 1 :]
    return Best(float(means[high]), int(last[high]), float(means[low]), int(last[low]))


def vitals(window: Window, keys: Sequence[str], fires: Mapping[str, tuple[str, str]]) -> list[Vital]:
    """The series of `keys` that the window has, in that order.

    fires: {key: (severity, what its rule says)} of the alerts that fire now.
    """
    return [_vital(window, key, fires.get(key)) for key in keys if key in window.series]


def _vital(window: Window, key: str, fires: tuple[str, str] | None) -> Vital:
    level, base = window.level(key), window.baseline(key)
    if key.startswith("eval/"):  # few values: the newest beside the best so far
        values = window.series[key][1]
        level, base = float(values[-1]), float(values.max() if metric(key).good != "down" else values.min())
    if fires is not None:
        return Vital(key, level, base, fires[0], fires[1])  # type: ignore[arg-type]
    if key.startswith("eval/"):
        word = "at its best" if level == base else f"best {_figure(key, base)}"
        return Vital(key, level, base, "worse" if level < LOST_SHARE * base else "as before", word)
    if math.isnan(base):
        return Vital(key, level, base, "too early", f"{len(window.last(key)[1])} of {BASELINE_ROWS} rows")
    if not _changed(window, key, level, base):
        return Vital(key, level, base, "as before", "as at its start")
    rose, good = level > base, metric(key).good
    judgement: Judgement = "changed" if good not in ("up", "down") else "better" if rose == (good == "up") else "worse"
    return Vital(key, level, base, judgement, f"{'up' if rose else 'down'} from {_figure(key, base)}")


def _changed(window: Window, key: str, level: float, base: float) -> bool:
    sd = window.jitter(key)
    error = sd * math.sqrt(1 / BASELINE_ROWS + 1 / LEVEL_ROWS) if math.isfinite(sd) else 0.0
    least = CHANGED_SHARE * (0.1 if metric(key).unit == "share" else abs(base))
    return abs(level - base) > max(CHANGED_Z * error, least)


def _figure(key: str, value: float) -> str:
    return f"{value:.0%}" if metric(key).unit == "share" else f"{value:.3g}"


def outlook(window: Window, key: str = "entropy") -> Outlook | None:
    """Where `key` stands on its way to the floor of the rule that watches it; None until its baseline is known."""
    base = window.baseline(key)
    shares = [rule.floor for rule in DEFAULT_RULES if rule.watches == key and rule.floor is not None]
    if not base > 0 or not shares:
        return None
    level, floor, best = window.level(key), shares[0] * base, window.bests[key]
    steps, values = window.last(key, SLOPE_ROWS)
    trend = fit_trend(steps, np.log(np.maximum(values, TINY_NATS)))
    fall = window.fall(key, LEVEL_ROWS)
    fallen = fall is not None and fall.z > CHANGED_Z and level < (1 - CHANGED_SHARE) * base
    since = best.high_step if fallen else None
    left = (math.nan,) * 3
    if trend.direction == "falling" and level > floor:
        left = reach(level, floor, trend)
    elif level <= floor:
        left = (0.0,) * 3
    return Outlook(level, base, floor, trend.direction, since, *left, trend.slope, trend.error)
