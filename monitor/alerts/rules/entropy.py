"""Rules on the entropy of the policy: collapse, explosion, values that are not finite."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from monitor.alerts.rules.base import Finding, Rule
from monitor.alerts.trends import Direction, Trend, steps_to
from monitor.alerts.window import Window
from monitor.records import Severity

FLOOR_SHARE = 0.10  # of the baseline: the floor that messages and verdicts project to
NOISE_WIDTH = 3.5  # thresholds lie at least so many standard deviations of the first rows away from the baseline


def widened(share: float, noise: float) -> float:
    """The share of the baseline at which a run this noisy is judged: |ln share|, but at least NOISE_WIDTH * noise."""
    width = max(abs(math.log(share)), NOISE_WIDTH * noise)
    return math.exp(math.copysign(width, math.log(share)))


def percent_per_step(trend: Trend) -> str:
    return f"{abs(math.expm1(trend.slope)):.1%} per step"


def reward_phrase(reward: Direction) -> str:
    return {"unknown": "No reward is known."}.get(reward, f"Reward is {reward}.")


class EntropyCollapse(Rule):
    """Entropy has fallen, or is falling fast without reward in return.

    ratio = level / baseline, g = log-slope over 20 rows. Breached if ratio < share and g < 0, or if ratio < early_share
    and g <= -steep (falling with |t| >= 3) while reward does not rise. Held while ratio < release * share, or
    < release * early_share while g < 0. Noisy runs get wider thresholds (`widened`). Critical if reward falls, or if it
    does not rise and the floor is reached or less than urgent_steps away; info if only the steep fall is seen yet,
    which often ends by itself; else a warning.
    """

    name: ClassVar[str] = "entropy_collapse"
    says: ClassVar[str] = "Entropy is collapsing"
    cure: ClassVar[str] = "go back before the fall and lower the learning rate, or hold the entropy"
    floor: ClassVar[float | None] = FLOOR_SHARE
    watches: ClassVar[str] = "entropy"
    needs: ClassVar[tuple[str, ...]] = ("entropy",)
    uses: ClassVar[tuple[str, ...]] = ("reward",)

    share: float = Field(0.30, gt=0, lt=1, description="of the baseline: collapsed")
    early_share: float = Field(0.50, gt=0, lt=1, description="of the baseline: enough for a steep fall without reward")
    steep: float = Field(0.02, gt=0, description="log-slope per step of a steep fall; 0.02 halves in 35 steps")
    release: float = Field(4 / 3, ge=1, description="times the threshold: recovered")
    urgent_steps: float = Field(20, ge=0, description="a floor that is nearer is critical unless reward rises")
    least_nats: float = Field(0.02, ge=0, description="a lower baseline has no entropy to lose")

    def is_clear(self, window: Window) -> bool:
        level, base = window.level(), window.baseline()
        if not base >= self.least_nats or math.isnan(level):
            return True
        return level / base >= widened(max(self.share, self.early_share), window.baselines["entropy"].log_noise)

    def check(self, window: Window) -> Finding | None:
        level, base = window.level(), window.baseline()
        if not base >= self.least_nats or math.isnan(level):
            return None
        noise = window.baselines["entropy"].log_noise
        ratio, slope, reward = level / base, window.log_slope(), window.trend("reward")
        steep = slope.slope <= -self.steep and slope.direction == "falling" and reward != "rising"
        low_share, early_share = widened(self.share, noise), widened(self.early_share, noise)
        early = steep and ratio < early_share
        low = ratio < low_share
        sinking = ratio < early_share * self.release and slope.slope < 0
        floor = FLOOR_SHARE * base
        left = steps_to(level, floor, slope.slope)
        urgent = reward != "rising" and left < self.urgent_steps
        severity: Severity = "warning" if low else "info"
        if reward == "falling" or urgent:
            severity = "critical"
        if left == 0:
            outlook = f"at its floor of {floor:.3g} nat"
        elif slope.slope < 0 and left < 10_000:
            outlook = (
                f"falling {percent_per_step(slope)}: about {math.ceil(left)} steps to the floor of {floor:.3g} nat"
            )
        else:
            outlook = f"no longer falling, above the floor of {floor:.3g} nat"
        return Finding(
            breached=(low and slope.slope < 0) or early,
            held=ratio < low_share * self.release or sinking,
            severity=severity,
            value=level,
            baseline=base,
            threshold=(low_share if low or not early else early_share) * base,
            message=f"Entropy {level:.3g} nat is {ratio:.0%} of its baseline {base:.3g} nat, {outlook}. "
            + reward_phrase(reward),
            action="Look at the tokens that lost their entropy; go back to a checkpoint from before the fall and lower "
            "the learning rate, raise the upper clip, or put the loss on fewer tokens.",
        )


class EntropyExplosion(Rule):
    """Entropy has doubled, or is rising while the run gets worse.

    Breached if ratio > share and level - baseline > least_nats, or if ratio > early_share, g >= steep (rising with
    t >= 3) and reward falls, or response length rises while reward does not. Held while ratio > release * share, or
    > early_release while g > 0. Noisy runs get wider thresholds (`widened`). Critical if ratio > share and reward
    falls; info if reward rises; else a warning.
    """

    name: ClassVar[str] = "entropy_explosion"
    says: ClassVar[str] = "Entropy is exploding"
    cure: ClassVar[str] = "go back before the rise and lower the learning rate or the entropy bonus"
    watches: ClassVar[str] = "entropy"
    needs: ClassVar[tuple[str, ...]] = ("entropy",)
    uses: ClassVar[tuple[str, ...]] = ("reward", "response_length")

    share: float = Field(2.0, gt=1, description="of the baseline: exploded")
    early_share: float = Field(
        1.5, gt=1, description="of the baseline: enough for a clear rise while the run gets worse"
    )
    steep: float = Field(0.01, gt=0, description="log-slope per step of a clear rise; 0.01 doubles in 70 steps")
    release: float = Field(0.8, gt=0, le=1, description="times the threshold: recovered")
    early_release: float = Field(1.2, gt=0, description="of the baseline: recovered, while it still rises")
    least_nats: float = Field(0.05, ge=0, description="a rise by less is no explosion, whatever its ratio")

    def is_clear(self, window: Window) -> bool:
        level, base = window.level(), window.baseline()
        if not level - base > self.least_nats or not math.isfinite(base):
            return True
        least = widened(min(self.share, self.early_share), window.baselines["entropy"].log_noise)
        return level / max(base, 1e-12) <= least

    def check(self, window: Window) -> Finding | None:
        level, base = window.level(), window.baseline()
        if not math.isfinite(base) or math.isnan(level):
            return None
        noise = window.baselines["entropy"].log_noise
        ratio = level / max(base, 1e-12)
        slope, reward, length = window.log_slope(), window.trend("reward"), window.trend("response_length")
        worse = reward == "falling" or (length == "rising" and reward != "rising")
        rising = slope.slope >= self.steep and slope.direction == "rising"
        enough = level - base > self.least_nats
        high_share, early_share = widened(self.share, noise), widened(self.early_share, noise)
        high = ratio > high_share
        early = ratio > early_share and rising and worse
        climbing = ratio > self.early_release and slope.slope > 0
        return Finding(
            breached=enough and (high or early),
            held=enough and (ratio > self.release * high_share or climbing),
            severity="info" if reward == "rising" else "critical" if high and reward == "falling" else "warning",
            value=level,
            baseline=base,
            threshold=(high_share if high or not early else early_share) * base,
            message=f"Entropy {level:.3g} nat is {ratio:.0%} of its baseline {base:.3g} nat, "
            + (f"rising {percent_per_step(slope)}. " if slope.slope > 0 else "no longer rising. ")
            + reward_phrase(reward)
            + (" Responses grow longer." if length == "rising" else ""),
            action="Read the newest rollouts for gibberish and repetition; go back to a checkpoint from before the "
            "rise and lower the learning rate, remove an entropy bonus, or clip the update harder.",
        )


class NonfiniteEntropy(Rule):
    """Entropy is nan or inf in `least_rows` rows in a row: the policy's numbers are broken. Held until a finite row."""

    name: ClassVar[str] = "nonfinite_entropy"
    says: ClassVar[str] = "Entropy is not finite"
    cure: ClassVar[str] = "go back to the last checkpoint with finite values"
    watches: ClassVar[str] = "entropy"
    needs: ClassVar[tuple[str, ...]] = ("entropy",)
    judges_broken: ClassVar[bool] = True

    for_rows: int = Field(1, ge=1, description="rows in a row before it fires, gets worse or resolves")
    least_rows: int = Field(3, ge=1, description="rows in a row that are not finite")

    def is_clear(self, window: Window) -> bool:
        return window.nonfinite.get("entropy", 0) < self.least_rows

    def check(self, window: Window) -> Finding | None:
        rows = window.nonfinite.get("entropy", 0)
        return Finding(
            breached=rows >= self.least_rows,
            held=rows > 0,
            severity="critical",
            value=float(rows),
            baseline=0.0,
            threshold=float(self.least_rows),
            message=f"Entropy was not finite in the last {rows} rows.",
            action="Go back to the last checkpoint with finite values; lower the learning rate or the gradient clip.",
        )
