"""The alert rules: pure functions from a Window to a Finding. Formulas, reasons and error rates: docs/alerts.md.

To add a rule: a function here, a row in DEFAULT_RULES, a test. Nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from monitor.alerts.window import Direction, Trend, Window
from monitor.records import Severity

COLLAPSE_SHARE = 0.30  # of the baseline: collapsed
COLLAPSE_RELEASE = 4 / 3  # times the threshold (so 0.40 of the baseline): recovered
EARLY_COLLAPSE_SHARE = 0.50  # of the baseline: enough for a steep fall that reward does not pay for
STEEP_FALL = 0.02  # log-slope per step: halves in 35 steps
FLOOR_SHARE = 0.10  # of the baseline: the floor that messages project to
EXPLOSION_SHARE = 2.0
EXPLOSION_RELEASE = 0.8  # times the threshold (so 1.6 of the baseline)
EARLY_EXPLOSION_SHARE = 1.5  # enough for a clear rise with falling reward or growing responses
EARLY_EXPLOSION_RELEASE = 1.2
STEEP_RISE = 0.01  # log-slope per step: doubles in 70 steps
EXPLOSION_MIN_NATS = 0.05  # a rise by less is no explosion, whatever its ratio
BASELINE_MIN_NATS = 0.02  # below it the run has no entropy to lose
NONFINITE_ROWS = 3
NOISE_WIDTH = 3.5  # thresholds lie at least so many standard deviations of the baseline rows away from the baseline
FOR_ROWS = 3  # rows in a row before an alert fires, escalates or resolves
URGENT_STEPS = 20  # a fall that reaches the floor within so many steps is critical unless reward rises


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule says of one step. `breached`: its condition holds; `held`: a firing alert stays (hysteresis).

    value, baseline, threshold in the unit of what is watched (nats for entropy).
    """

    breached: bool
    held: bool
    severity: Severity
    value: float
    baseline: float
    threshold: float
    message: str
    action: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One alert rule. `check` returns None where it cannot judge; `for_rows` as in FOR_ROWS.

    A row whose entropy is nan or inf adds nothing to the window, so only rules with `broken_rows` are asked about it:
    to the others it would be the old window a second time.
    """

    name: str
    check: Callable[[Window], Finding | None]
    for_rows: int = FOR_ROWS
    broken_rows: bool = False


def _percent(trend: Trend) -> str:
    return f"{abs(math.expm1(trend.slope)):.1%} per step"


def _reward_phrase(reward: Direction) -> str:
    return {"unknown": "No reward is known."}.get(reward, f"Reward is {reward}.")


def steps_to(level: float, target: float, slope: float) -> float:
    """Steps until level * exp(slope * steps) has fallen to target; 0 if it is there, inf if it does not fall."""
    if level <= target:
        return 0.0
    return math.log(target / level) / slope if slope < 0 else math.inf


def widened(share: float, noise: float) -> float:
    """The share of the baseline at which a run this noisy is judged: |ln share|, but at least NOISE_WIDTH * noise."""
    width = max(abs(math.log(share)), NOISE_WIDTH * noise)
    return math.exp(math.copysign(width, math.log(share)))


def entropy_collapse(window: Window) -> Finding | None:
    """Entropy has fallen, or is falling fast without reward in return.

    ratio = level / baseline, g = log-slope over 20 rows. Breached if ratio < 0.30 and g < 0, or if ratio < 0.50 and
    g <= -0.02 per step (falling with |t| >= 3) while reward does not rise. Held while ratio < 0.40, or < 0.67 while
    g < 0. Noisy runs get wider thresholds (`widened`). Critical if reward falls, or if it does
    not rise and the floor (10 % of the baseline) is reached or less than 20 steps away; else a warning.
    """
    level, base = window.level(), window.baseline
    if not base >= BASELINE_MIN_NATS or math.isnan(level):
        return None
    ratio, slope, reward = level / base, window.log_slope(), window.trend("reward")
    steep = slope.slope <= -STEEP_FALL and slope.direction == "falling" and reward != "rising"
    low_share, early_share = widened(COLLAPSE_SHARE, window.noise), widened(EARLY_COLLAPSE_SHARE, window.noise)
    early = steep and ratio < early_share
    low = ratio < low_share
    sinking = ratio < early_share * COLLAPSE_RELEASE and slope.slope < 0
    floor = FLOOR_SHARE * base
    left = steps_to(level, floor, slope.slope)
    urgent = reward != "rising" and left < URGENT_STEPS
    if left == 0:
        outlook = f"at its floor of {floor:.3g} nat"
    elif slope.slope < 0 and left < 10_000:
        outlook = f"falling {_percent(slope)}: about {math.ceil(left)} steps to the floor of {floor:.3g} nat"
    else:
        outlook = f"no longer falling, above the floor of {floor:.3g} nat"
    return Finding(
        breached=(low and slope.slope < 0) or early,
        held=ratio < low_share * COLLAPSE_RELEASE or sinking,
        severity="critical" if reward == "falling" or urgent else "warning",
        value=level,
        baseline=base,
        threshold=(low_share if low or not early else early_share) * base,
        message=f"Entropy {level:.3g} nat is {ratio:.0%} of its baseline {base:.3g} nat, {outlook}. "
        + _reward_phrase(reward),
        action="Look at the tokens that lost their entropy; go back to a checkpoint from before the fall and lower the "
        "learning rate, raise the upper clip, or put the loss on fewer tokens.",
    )


def entropy_explosion(window: Window) -> Finding | None:
    """Entropy has doubled, or is rising while the run gets worse.

    Breached if ratio > 2.0 and level - baseline > 0.05 nat, or if ratio > 1.5, g >= 0.01 per step (rising with
    t >= 3) and reward falls, or response length rises while reward does not. Held while ratio > 1.6, or > 1.2 while
    g > 0. Noisy runs get wider thresholds (`widened`). Critical if ratio > 2
    and reward falls; info if reward rises; else a warning.
    """
    level, base = window.level(), window.baseline
    if not math.isfinite(base) or math.isnan(level):
        return None
    ratio = level / max(base, 1e-12)
    slope, reward, length = window.log_slope(), window.trend("reward"), window.trend("response_length")
    worse = reward == "falling" or (length == "rising" and reward != "rising")
    rising = slope.slope >= STEEP_RISE and slope.direction == "rising"
    enough = level - base > EXPLOSION_MIN_NATS
    high_share = widened(EXPLOSION_SHARE, window.noise)
    early_share = widened(EARLY_EXPLOSION_SHARE, window.noise)
    high = ratio > high_share
    early = ratio > early_share and rising and worse
    climbing = ratio > EARLY_EXPLOSION_RELEASE and slope.slope > 0
    length_phrase = " Responses grow longer." if length == "rising" else ""
    return Finding(
        breached=enough and (high or early),
        held=enough and (ratio > EXPLOSION_RELEASE * high_share or climbing),
        severity="info" if reward == "rising" else "critical" if high and reward == "falling" else "warning",
        value=level,
        baseline=base,
        threshold=(high_share if high or not early else early_share) * base,
        message=f"Entropy {level:.3g} nat is {ratio:.0%} of its baseline {base:.3g} nat, "
        + (f"rising {_percent(slope)}. " if slope.slope > 0 else "no longer rising. ")
        + _reward_phrase(reward)
        + length_phrase,
        action="Read the newest rollouts for gibberish and repetition; go back to a checkpoint from before the rise "
        "and lower the learning rate, remove an entropy bonus, or clip the update harder.",
    )


def nonfinite_entropy(window: Window) -> Finding | None:
    """Entropy is nan or inf in 3 rows in a row: the policy's numbers are broken. Held until a finite row."""
    rows = window.nonfinite_rows
    return Finding(
        breached=rows >= NONFINITE_ROWS,
        held=rows > 0,
        severity="critical",
        value=float(rows),
        baseline=0.0,
        threshold=float(NONFINITE_ROWS),
        message=f"Entropy was not finite in the last {rows} rows.",
        action="Go back to the last checkpoint with finite values; lower the learning rate or the gradient clip.",
    )


DEFAULT_RULES = (
    Rule("entropy_collapse", entropy_collapse),
    Rule("entropy_explosion", entropy_explosion),
    Rule("nonfinite_entropy", nonfinite_entropy, for_rows=1, broken_rows=True),  # the rule itself counts rows
)
