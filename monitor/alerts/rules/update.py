"""Rules on the update: drift from the reference, sampler and trainer that disagree, clipping, gradients."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from pydantic import Field

from monitor.alerts.rules.base import Finding, Rule
from monitor.alerts.window import Window

_SLOWER = "Lower the learning rate or the number of epochs; go back to a checkpoint from before the rise."


class KlRunaway(Rule):
    """The policy runs away from its reference: KL over `nats`, still rising, while the reward does not rise."""

    name: ClassVar[str] = "kl_runaway"
    says: ClassVar[str] = "The policy runs away from its reference"
    cure: ClassVar[str] = "lower the learning rate or raise the KL coefficient"
    watches: ClassVar[str] = "kl"
    needs: ClassVar[tuple[str, ...]] = ("kl",)
    uses: ClassVar[tuple[str, ...]] = ("reward",)

    nats: float = Field(0.5, gt=0, description="mean KL to the reference")

    def is_clear(self, window: Window) -> bool:
        return not window.level("kl") >= self.nats

    def check(self, window: Window) -> Finding | None:
        now, reward = window.level("kl"), window.trend("reward")
        if math.isnan(now):
            return None
        return Finding(
            breached=now >= self.nats and reward in ("falling", "flat") and window.trend("kl") == "rising",
            held=now >= 0.7 * self.nats and reward != "rising",
            severity="critical" if reward == "falling" else "warning",
            value=now,
            baseline=window.baseline("kl"),
            threshold=self.nats,
            message=f"KL to the reference is {now:.3g} nat a token and rising. Reward is {reward}.",
            action=_SLOWER + " Or raise loss.kl_coef.",
        )


class SamplerMismatch(Rule):
    """Sampler and trainer disagree about the tokens: mean |log-ratio| before any update over `nats`.

    The rollouts then come from another policy than the one that learns from them.
    """

    name: ClassVar[str] = "sampler_mismatch"
    says: ClassVar[str] = "Sampler and trainer disagree"
    cure: ClassVar[str] = "compare their precision, temperature and weights"
    watches: ClassVar[str] = "sampler_mismatch"
    needs: ClassVar[tuple[str, ...]] = ("sampler_mismatch",)

    nats: float = Field(0.10, gt=0, description="mean |log-ratio| of trainer and sampler")

    def check(self, window: Window) -> Finding | None:
        now = window.level("sampler_mismatch")
        if math.isnan(now):
            return None
        return Finding(
            breached=now >= self.nats,
            held=now >= 0.7 * self.nats,
            severity="critical" if now >= 3 * self.nats else "warning",
            value=now,
            baseline=window.baseline("sampler_mismatch"),
            threshold=self.nats,
            message=f"Sampler and trainer differ by {now:.3g} nat a token before any update.",
            action="Compare their precision, sampling temperature and weights: the sampler may hold an older policy.",
        )


class ClipSaturation(Rule):
    """The update wants to go further than the clip allows: more than `share` of its tokens are clipped."""

    name: ClassVar[str] = "clip_saturation"
    says: ClassVar[str] = "Many tokens are clipped"
    cure: ClassVar[str] = "take fewer updates of each rollout batch"
    watches: ClassVar[str] = "clip_share_high"
    needs: ClassVar[tuple[str, ...]] = ("clip_share_low", "clip_share_high")

    share: float = Field(0.20, gt=0, lt=1, description="of the tokens that the update used are clipped")

    def check(self, window: Window) -> Finding | None:
        low, high = window.level("clip_share_low"), window.level("clip_share_high")
        now = low + high
        if math.isnan(now):
            return None
        return Finding(
            breached=now >= self.share,
            held=now >= 0.7 * self.share,
            severity="warning",
            value=now,
            baseline=window.baseline("clip_share_low") + window.baseline("clip_share_high"),
            threshold=self.share,
            message=f"{now:.0%} of the tokens are clipped ({low:.0%} low, {high:.0%} high).",
            action="Take fewer epochs or mini-batches, or a lower learning rate.",
        )


class GradientSpikes(Rule):
    """Gradients burst: at least `spikes` of the last 10 norms are over `times` the median of the first rows."""

    name: ClassVar[str] = "gradient_spikes"
    says: ClassVar[str] = "Gradients burst"
    cure: ClassVar[str] = "lower the learning rate or the gradient clip"
    watches: ClassVar[str] = "grad_norm"
    needs: ClassVar[tuple[str, ...]] = ("grad_norm",)
    uses: ClassVar[tuple[str, ...]] = ("reward",)

    times: float = Field(10.0, gt=1, description="times the baseline")
    spikes: int = Field(4, ge=1, le=10, description="of the last ten rows")

    def is_clear(self, window: Window) -> bool:
        return not window.baseline("grad_norm") > 0 or self._over(window) < self.spikes

    def _over(self, window: Window) -> int:
        """How many of the last ten norms are spikes."""
        return int(np.count_nonzero(window.last("grad_norm", 10)[1] > self.times * window.baseline("grad_norm")))

    def check(self, window: Window) -> Finding | None:
        base, values = window.baseline("grad_norm"), window.last("grad_norm", 10)[1]
        if not base > 0:
            return None
        over = self._over(window)
        return Finding(
            breached=over >= self.spikes,
            held=over > 0,
            severity="critical" if window.trend("reward") == "falling" else "warning",
            value=float(values[-1]),
            baseline=base,
            threshold=self.times * base,
            message=f"{over} of the last {len(values)} gradient norms are over {self.times:g} times the baseline "
            f"{base:.3g}; the newest is {values[-1]:.3g}.",
            action=_SLOWER + " Or lower optim.grad_clip.",
        )


class NonfiniteLoss(Rule):
    """Loss or gradient norm is nan or inf: weights that are updated with it stay broken."""

    name: ClassVar[str] = "nonfinite_loss"
    says: ClassVar[str] = "Loss or gradient is not finite"
    cure: ClassVar[str] = "go back to the last checkpoint with finite values"
    watches: ClassVar[str] = "grad_norm"
    needs: ClassVar[tuple[str, ...]] = ("grad_norm",)
    uses: ClassVar[tuple[str, ...]] = ("loss",)
    judges_broken: ClassVar[bool] = True

    for_rows: int = Field(1, ge=1, description="rows in a row before it fires, gets worse or resolves")

    def is_clear(self, window: Window) -> bool:
        return not (window.nonfinite.get("grad_norm", 0) or window.nonfinite.get("loss", 0))

    def check(self, window: Window) -> Finding | None:
        rows = max(window.nonfinite.get("grad_norm", 0), window.nonfinite.get("loss", 0))
        return Finding(
            breached=rows > 0,
            held=rows > 0,
            severity="critical",
            value=float(rows),
            baseline=0.0,
            threshold=1.0,
            message=f"Loss or gradient norm was not finite in the last {rows} rows.",
            action="Go back to the last checkpoint with finite values; lower the learning rate or the gradient clip.",
        )
