"""Weights in TRL's losses: through one advantage for each token, with TRL's counts of tokens made counts of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monitor.errors import MonitorError
from monitor.integrations.trl.ranks import Ranks
from monitor.integrations.trl.rollouts import Rollouts
from monitor.integrations.weighted import Weighting, tokens_by_weight

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


class AttachError(MonitorError):
    """A trainer, a weighting or an action that `attach` cannot use."""


def check_weighting(trainer: Any, text: str, is_grpo: bool) -> None:
    """Raises AttachError where a weight could not act, or not as in the project's own loss."""

    def refuse(what: str, expected: str) -> None:
        raise AttachError(f"weighting {text!r} cannot act: {what}. {expected}, or leave the weighting out.")

    if not is_grpo:
        refuse(f"{type(trainer).__name__} has one advantage and one ratio for a whole response", "Take trl.GRPOTrainer")
    if trainer.loss_type not in LOSSES:
        refuse(f"loss_type is {trainer.loss_type!r}", f"Set it to one of {', '.join(LOSSES)}")
    if trainer.importance_sampling_level != "token":
        level = trainer.importance_sampling_level
        refuse(f"importance_sampling_level is {level!r}, so a ratio is of all tokens", "Set it to 'token'")
    if trainer.top_entropy_quantile < 1:
        refuse(f"top_entropy_quantile is {trainer.top_entropy_quantile}, which chooses tokens too", "Set it to 1.0")


def batch_scale(batch: Rollouts, weighting: Weighting, loss: str, ranks: Ranks) -> Tensor | None:
    """What dapo and cispo multiply weights by: tokens of all ranks / sum of their weights, 0-d. Else None."""
    if weighting.normalise != "selected" or loss not in ("dapo", "cispo"):
        return None
    assert batch.weights is not None
    tokens, weight = ranks.sum(torch.stack([batch.mask.sum().float(), batch.weights.sum()])).unbind()
    return tokens_by_weight(tokens, weight)


def token_advantages(
    advantages: Tensor, weights: Tensor, mask: Tensor, loss: str, normalise: str, scale: Tensor | None
) -> Tensor:
    """A_it = w_it c A_i, float [b, T] of a micro-batch, so that TRL's loss is sum(w psi) / D of docs/method.md.

    TRL divides the sum of psi, which is linear in A where A keeps its sign, by a count of tokens. c is that count / the
    sum of weights: of the response for grpo, of the micro-batch for bnpo, `scale` for dapo and cispo; 1 for dr_grpo and
    for normalise = "all". advantages [b], weights float and mask bool [b, T].
    """
    factor = torch.ones_like(weights[:, :1])
    if normalise == "selected":
        if loss == "grpo":
            factor = tokens_by_weight(mask.sum(1, keepdim=True), weights.sum(1, keepdim=True))
        elif loss == "bnpo":
            factor = factor * tokens_by_weight(mask.sum(), weights.sum())
        elif scale is not None:
            factor = factor * scale
    return advantages.unsqueeze(1) * weights * factor
