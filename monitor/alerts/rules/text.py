"""Rules on the completions themselves: cut off, or repeating."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from monitor.alerts.rules.base import Finding, Rule
from monitor.alerts.window import Window


class TruncationRunaway(Rule):
    """Ever more completions are cut off at the limit, so their answers are never seen.

    now = mean truncated_share of the last 8 rows. Breached if now >= share and now >= baseline + margin while the
    reward does not rise. Critical if the reward falls.
    """

    name: ClassVar[str] = "truncation_runaway"
    says: ClassVar[str] = "Completions are cut off at the limit"
    cure: ClassVar[str] = "read the newest rollouts, then raise the limit or go back"
    watches: ClassVar[str] = "truncated_share"
    needs: ClassVar[tuple[str, ...]] = ("truncated_share",)
    uses: ClassVar[tuple[str, ...]] = ("reward", "response_length")

    share: float = Field(0.30, gt=0, le=1, description="of the completions are cut off")
    margin: float = Field(0.20, gt=0, lt=1, description="above the baseline")

    def is_clear(self, window: Window) -> bool:
        now = window.mean("truncated_share", 8)
        return not (now >= self.share and now >= window.baseline("truncated_share") + self.margin)

    def check(self, window: Window) -> Finding | None:
        now, base = window.mean("truncated_share", 8), window.baseline("truncated_share")
        if math.isnan(base):
            return None
        reward = window.trend("reward")
        return Finding(
            breached=now >= self.share and now >= base + self.margin and reward != "rising",
            held=now >= base + self.margin / 2,
            severity="critical" if reward == "falling" else "warning",
            value=now,
            baseline=base,
            threshold=max(self.share, base + self.margin),
            message=f"{now:.0%} of the completions are cut off at the length limit; it was {base:.0%} at the start. "
            + ("No reward is known." if reward == "unknown" else f"Reward is {reward}."),
            action="Read the newest rollouts: if they ramble, go back to a checkpoint and lower the learning rate or "
            "an entropy bonus; if they reason, raise rollout.max_new_tokens.",
        )


class Repetition(Rule):
    """Completions repeat themselves: a policy that loops.

    Breached if the mean repetition_share of the last 8 rows is at least `share` and `times` its baseline. Critical if
    the reward falls.
    """

    name: ClassVar[str] = "repetition"
    says: ClassVar[str] = "Completions repeat themselves"
    cure: ClassVar[str] = "read the newest rollouts and go back to before the loops"
    watches: ClassVar[str] = "repetition_share"
    needs: ClassVar[tuple[str, ...]] = ("repetition_share",)
    uses: ClassVar[tuple[str, ...]] = ("reward",)

    share: float = Field(0.15, gt=0, lt=1, description="of the four-token runs have stood in the completion before")
    times: float = Field(3.0, ge=1, description="times the baseline")

    def is_clear(self, window: Window) -> bool:
        return not window.mean("repetition_share", 8) >= self.share

    def check(self, window: Window) -> Finding | None:
        now, base = window.mean("repetition_share", 8), window.baseline("repetition_share")
        if math.isnan(base):
            return None
        threshold = max(self.share, self.times * base)
        return Finding(
            breached=now >= threshold,
            held=now >= 0.7 * threshold,
            severity="critical" if window.trend("reward") == "falling" else "warning",
            value=now,
            baseline=base,
            threshold=threshold,
            message=f"{now:.0%} of a completion repeats what stood in it before; it was {base:.1%} at the start.",
            action="Read the newest rollouts; go back to a checkpoint from before the loops and lower the learning "
            "rate.",
        )
