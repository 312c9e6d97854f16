"""Rules on the shape of the policy's distributions: noise in their tails, sharper peaks, the flow of entropy."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from monitor.alerts.rules.base import Finding, Rule
from monitor.alerts.window import LEVEL_ROWS, START_ROWS, Window
from monitor.records import Severity


class TailNoise(Rule):
    """The tails get noisier: Shannon entropy (H1) rises while Renyi-2 entropy (H2), which sees peaks alone, does not.

    r1 = level / baseline of H1, r2 of H2. Breached if r1 >= rise and r2 <= 1 + (r1 - 1) / 4.
    """

    name: ClassVar[str] = "tail_noise"
    says: ClassVar[str] = "The tails of the distributions get noisier"
    cure: ClassVar[str] = "lower the temperature or an entropy bonus, or clip the tails when sampling"
    watches: ClassVar[str] = "entropy"
    needs: ClassVar[tuple[str, ...]] = ("entropy", "renyi2")

    rise: float = Field(1.3, gt=1, description="of the baseline of H1")
    worst: Severity = Field("info", description="the highest severity that it announces")

    def check(self, window: Window) -> Finding | None:
        base1, base2 = window.baseline("entropy"), window.baseline("renyi2")
        if not (base1 > 0 and base2 > 0):
            return None
        r1, r2 = window.level("entropy") / base1, window.level("renyi2") / base2
        still = r2 <= 1 + (r1 - 1) / 4
        return Finding(
            breached=r1 >= self.rise and still,
            held=r1 >= 1 + (self.rise - 1) / 2 and still,
            severity="warning",
            value=window.level("entropy"),
            baseline=base1,
            threshold=self.rise * base1,
            message=f"H1 is at {r1:.0%} of its baseline, H2 at {r2:.0%}: the new entropy is in unlikely tokens.",
            action="Lower the sampling temperature or an entropy bonus, or sample without the least likely tokens.",
        )


class PeakSharpening(Rule):
    """The peaks get sharper: Renyi-2 entropy (H2) falls while Shannon entropy (H1), which sees tails too, does not.

    r1 = level / baseline of H1, r2 of H2. Breached if r2 <= fall and 1 - r1 <= (1 - r2) / 2.
    """

    name: ClassVar[str] = "peak_sharpening"
    says: ClassVar[str] = "The peaks of the distributions get sharper"
    cure: ClassVar[str] = "watch the distinct answers, and hold the entropy if they fall"
    watches: ClassVar[str] = "renyi2"
    needs: ClassVar[tuple[str, ...]] = ("entropy", "renyi2")

    fall: float = Field(0.6, gt=0, lt=1, description="of the baseline of H2")
    worst: Severity = Field("info", description="the highest severity that it announces")

    def check(self, window: Window) -> Finding | None:
        base1, base2 = window.baseline("entropy"), window.baseline("renyi2")
        if not (base1 > 0 and base2 > 0):
            return None
        r1, r2 = window.level("entropy") / base1, window.level("renyi2") / base2
        hidden = 1 - r1 <= (1 - r2) / 2
        return Finding(
            breached=r2 <= self.fall and hidden,
            held=r2 <= (1 + self.fall) / 2 and hidden,
            severity="warning",
            value=window.level("renyi2"),
            baseline=base2,
            threshold=self.fall * base2,
            message=f"H2 is at {r2:.0%} of its baseline, H1 still at {r1:.0%}: the mean entropy hides sharper peaks.",
            action="Look at the distinct answers of the evaluations; hold the entropy if they fall.",
        )


class Forgetting(Rule):
    """Decided tokens come undecided: the policy loses what it was sure of, and gets no reward for it.

    start = mean decided_share (tokens with entropy under 0.05 nat) of the first 3 rows, now = mean of the last 5.
    Breached if start - now >= loss * start and >= z_least standard errors, jitter sqrt(1/3 + 1/5), while the reward
    does not rise. It compares with the first rows, not with a baseline of 20, because an update that is far too large
    undoes a policy within ten steps; the share is a mean over all tokens, so few rows are enough. Reason: what pays
    decides tokens. Critical if the reward falls.
    """

    name: ClassVar[str] = "forgetting"
    says: ClassVar[str] = "The policy forgets what it was sure of"
    cure: ClassVar[str] = "go back to the start and lower the learning rate or the entropy bonus"
    watches: ClassVar[str] = "decided_share"
    needs: ClassVar[tuple[str, ...]] = ("decided_share",)
    uses: ClassVar[tuple[str, ...]] = ("reward",)

    for_rows: int = Field(1, ge=1, description="rows in a row before it fires, gets worse or resolves")
    loss: float = Field(0.10, gt=0, lt=1, description="of the share at the start: forgotten")
    z_least: float = Field(4.0, gt=0, description="standard errors that the fall must exceed")
    least_share: float = Field(0.2, ge=0, lt=1, description="a lower share at the start has nothing to lose")

    def is_clear(self, window: Window) -> bool:
        start = window.start(self.watches)
        return not start - window.mean(self.watches, LEVEL_ROWS) >= self.loss * start

    def check(self, window: Window) -> Finding | None:
        start, now = window.start(self.watches), window.mean(self.watches, LEVEL_ROWS)
        error = window.jitter(self.watches, START_ROWS + LEVEL_ROWS) * math.sqrt(1 / START_ROWS + 1 / LEVEL_ROWS)
        if not start >= self.least_share or math.isnan(error):
            return None
        reward = window.trend("reward")
        return Finding(
            breached=start - now >= max(self.loss * start, self.z_least * error) and reward != "rising",
            held=start - now >= self.loss / 2 * start,
            severity="critical" if reward == "falling" else "warning",
            value=now,
            baseline=start,
            threshold=start - max(self.loss * start, self.z_least * error),
            message=f"{now:.0%} of the tokens are decided (under 0.05 nat); it was {start:.0%} at the start. "
            + ("No trend of the reward is known yet." if reward == "unknown" else f"Reward is {reward}."),
            action="Start again from before the fall with a lower learning rate, fewer epochs or a lower entropy "
            "bonus.",
        )


class EntropyFlow(Rule):
    """The updates lower entropy far more than they raise it, so entropy will go, whatever its level is now.

    share = raising / lowering part of the predicted change of entropy, weighted as in the loss, means of the last 10
    rows. Breached if share <= least_share.
    """

    name: ClassVar[str] = "entropy_flow"
    says: ClassVar[str] = "The updates lower entropy far more than they raise it"
    cure: ClassVar[str] = "hold the entropy or weight the tokens that lower it less"
    watches: ClassVar[str] = "predicted_entropy_raising_weighted"
    needs: ClassVar[tuple[str, ...]] = ("predicted_entropy_lowering_weighted", "predicted_entropy_raising_weighted")

    least_share: float = Field(0.35, gt=0, lt=1, description="of the lowering part")
    worst: Severity = Field("info", description="the highest severity that it announces")

    def check(self, window: Window) -> Finding | None:
        rows = 10
        raising = window.mean("predicted_entropy_raising_weighted", rows)
        lowering = -window.mean("predicted_entropy_lowering_weighted", rows)
        if len(window.last(self.watches)[1]) < rows or math.isnan(raising) or not lowering > 0:
            return None
        share = raising / lowering
        return Finding(
            breached=share <= self.least_share,
            held=share <= 1.2 * self.least_share,
            severity="warning",
            value=raising,
            baseline=lowering,
            threshold=self.least_share * lowering,
            message=f"The tokens that raise entropy make up for {share:.0%} of what the others lower it by.",
            action="Hold the entropy (loss.entropy_target), raise the upper clip, or lower the learning rate.",
        )
