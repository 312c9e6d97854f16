"""The project's weightings for the loss of another trainer, which rlvr_monitor.attach watches."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from monitor.signals import TokenSignals
from trainer.compare.arms import parse_arm
from trainer.config import ConfigError, WeightingConfig, make_weighting
from trainer.learning.weightings import WeightInputs, token_weights

IMPOSSIBLE = {
    "divergence": "it needs the policy's log-probabilities before each update",
    "kl_cov": "it adds a penalty to the loss, which no weight can do",
    "attention": "it needs a forward pass with eager attention",
}
# kinds that read no more than the log-probability and the entropy of each token, and its response's advantage
FROM_LOGPROBS = {
    "uniform", "random", "random_undecided", "top_entropy", "stapo", "rsi", "stare", "advantage_reweight", "clip_cov",
}  # fmt: skip


class Processes(Protocol):
    """The other trainer's processes."""

    rank: int

    def sum(self, tensor: Tensor) -> Tensor: ...


class AttachedWeighting:
    """A weighting as `rlvr compare` names arms, e.g. "ict:keep=0.1,warmup_steps=0"; without settings of other groups.

    Random choices are drawn from a generator of its own, seeded with the trainer's seed plus 7919 times the rank.
    with_distributions: False where the trainer gives log-probabilities and entropies but no logits, so that there is
    neither deviation nor H2. Raises ConfigError.
    """

    def __init__(self, text: str, seed: int, rank: int, with_distributions: bool = True) -> None:
        arm = parse_arm(text)
        others = [option for option, _ in arm.settings if not option.startswith("weighting.")]
        if others:
            raise ConfigError(f"weighting {text!r} sets {', '.join(others)}, which is the trainer's. Set it there.")
        if arm.kind in IMPOSSIBLE:
            raise ConfigError(
                f"weighting {text!r} is not possible in another trainer's loss: {IMPOSSIBLE[arm.kind]}. Take another, "
                "e.g. ict or ict_budget."
            )
        if not with_distributions and arm.kind not in FROM_LOGPROBS:
            raise ConfigError(
                f"weighting {text!r} is not possible here: it needs the logits of whole groups, which this trainer "
                f"hands out to nobody. Take one of {', '.join(sorted(FROM_LOGPROBS))}."
            )
        self.text = text
        settings = {option.removeprefix("weighting."): value for option, value in arm.settings}
        self.config: WeightingConfig = make_weighting({"kind": arm.kind} | settings)
        self.kind, self.warmup_steps = self.config.kind, self.config.warmup_steps
        self.normalise = self.config.normalise
        self._generator = torch.Generator().manual_seed(seed + 7_919 * rank)

    def weights(self, signals: TokenSignals, mask: Tensor, advantages: Tensor, step: int, ranks: Processes) -> Tensor:
        """float32 [N, T], >= 0, 0 where mask is False; 1 up to step warmup_steps. advantages [N]; step from 1."""
        inputs = WeightInputs(
            signals, mask, advantages, self._generator, step - self.warmup_steps, sum_over_ranks=ranks.sum
        )
        return token_weights(inputs, self.config)

    def settings(self) -> dict[str, Any]:
        """The configuration, for the record of the run."""
        return self.config.model_dump(mode="json")
