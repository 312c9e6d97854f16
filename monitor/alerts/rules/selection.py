"""Rules on which tokens the update reads."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from monitor.alerts.rules.base import Finding, Rule
from monitor.alerts.window import Window


class BlindSelection(Rule):
    """The weighting selects tokens that are decided: they carry no choice, and training on them alone loses the reward.

    Breached if the share of decided tokens (entropy under 0.05 nat) among the selected is at least `share`, at least
    `margin` above their share among all tokens, and at most `most_selected` of the tokens are selected. Reason: on the
    built-in task most runs with such a selection lost their reward, and the mean entropy hardly moved.
    """

    name: ClassVar[str] = "blind_selection"
    says: ClassVar[str] = "The weighting selects decided tokens"
    cure: ClassVar[str] = "select among undecided tokens or divide by all tokens"
    watches: ClassVar[str] = "selected_decided_share"
    needs: ClassVar[tuple[str, ...]] = ("selected_decided_share", "decided_share", "selected_share")

    share: float = Field(0.85, gt=0, le=1, description="of the selected tokens are decided")
    margin: float = Field(0.15, ge=0, lt=1, description="above the share among all tokens")
    most_selected: float = Field(0.5, gt=0, le=1, description="a selection of more tokens is not judged")
    rows_needed: int = Field(5, ge=1, le=40, description="rows whose median is judged")

    def check(self, window: Window) -> Finding | None:
        if len(window.last("selected_share", self.rows_needed)[1]) < self.rows_needed:
            return None
        chosen = window.level("selected_decided_share", self.rows_needed)
        decided = window.level("decided_share", self.rows_needed)
        selected = window.level("selected_share", self.rows_needed)
        if math.isnan(chosen) or selected > self.most_selected:
            return None
        return Finding(
            breached=chosen >= self.share and chosen >= decided + self.margin,
            held=chosen >= 0.95 * self.share,
            severity="warning",
            value=chosen,
            baseline=decided,
            threshold=self.share,
            message=f"{chosen:.0%} of the selected tokens are decided (under 0.05 nat), of all tokens {decided:.0%}: "
            f"the {selected:.0%} that are trained on carry hardly a choice.",
            action="Select among undecided tokens, keep more tokens, or divide by all tokens "
            "(weighting.normalise all): else the reward is likely to go while the entropy stays.",
        )
