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
    `margin` above their share among all tokens, and at most `most_selected` of the tokens are selected. A warning once
    the reward, mean of the last 8 rows, is at most reward_share of its best by z_least standard errors (`Window.fall`);
    else info. Reason: most runs with such a selection lost their reward while the mean entropy hardly moved, so a fall
    of the reward needs less proof here than in `reward_lost`. But at low rates some learnt all the same.
    """

    name: ClassVar[str] = "blind_selection"
    says: ClassVar[str] = "The weighting selects decided tokens"
    cure: ClassVar[str] = "select among undecided tokens or divide by all tokens"
    watches: ClassVar[str] = "selected_decided_share"
    needs: ClassVar[tuple[str, ...]] = ("selected_decided_share", "decided_share", "selected_share")
    uses: ClassVar[tuple[str, ...]] = ("reward",)

    share: float = Field(0.85, gt=0, le=1, description="of the selected tokens are decided")
    margin: float = Field(0.15, ge=0, lt=1, description="above the share among all tokens")
    most_selected: float = Field(0.5, gt=0, le=1, description="a selection of more tokens is not judged")
    reward_share: float = Field(0.70, gt=0, lt=1, description="of the best reward: it begins to go")
    z_least: float = Field(3.0, gt=0, description="standard errors that the fall of the reward must exceed")
    rows_needed: int = Field(5, ge=1, le=40, description="rows whose median is judged")

    def is_clear(self, window: Window) -> bool:
        return not window.level("selected_decided_share", self.rows_needed) >= self.share

    def check(self, window: Window) -> Finding | None:
        if len(window.last("selected_share", self.rows_needed)[1]) < self.rows_needed:
            return None
        chosen = window.level("selected_decided_share", self.rows_needed)
        decided = window.level("decided_share", self.rows_needed)
        selected = window.level("selected_share", self.rows_needed)
        if math.isnan(chosen) or selected > self.most_selected:
            return None
        fall = window.fall("reward", 8)
        going = fall is not None and fall.now <= self.reward_share * fall.best.high and fall.z >= self.z_least
        return Finding(
            breached=chosen >= self.share and chosen >= decided + self.margin,
            held=chosen >= 0.95 * self.share,
            severity="warning" if going else "info",
            value=chosen,
            baseline=decided,
            threshold=self.share,
            message=f"{chosen:.0%} of the selected tokens are decided (under 0.05 nat), of all tokens {decided:.0%}: "
            f"the {selected:.0%} that are trained on carry hardly a choice."
            + (f" Reward was {fall.best.high:.3g} at best and is {fall.now:.3g}." if fall is not None else ""),
            action="Select among undecided tokens, keep more tokens, or divide by all tokens "
            "(weighting.normalise all): else the reward is likely to go while the entropy stays.",
        )
