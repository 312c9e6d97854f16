"""The policy loss: weighted, clipped, with every denominator fixed on the whole batch before it is split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.config import LossConfig
from trainer.tokens import LossTerms

Normalise = Literal["selected", "all"]


@dataclass(frozen=True, slots=True, eq=False)
class LossTotals:
    """Denominators of the whole batch of one optimizer update: responses, token weight, longest response."""

    responses: Tensor  # 0-d float
    weight: Tensor  # 0-d float: sum of weights ("selected") or number of tokens ("all")
    max_length: int


def loss_totals(mask: Tensor, weights: Tensor, normalise: Normalise, max_length: int | None = None) -> LossTotals:
    """Totals of a batch; `max_length` is dr_grpo's constant (default: the batch's own width)."""
    counted = weights if normalise == "selected" else mask.float()
    responses = mask.any(1).float().sum()
    return LossTotals(responses, counted.sum(), max_length or mask.shape[1])


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    config: LossConfig,
    *,
    ref_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    totals: LossTotals | None = None,
    normalise: Normalise = "selected",
) -> LossTerms:
    """Clipped policy-gradient loss, sum over tokens of weight * psi / D.

        r = exp(logprob - old_logprob)
        psi = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef * k3 - entropy_coef * entropy
        k3 = exp(ref - logprob) - (ref - logprob) - 1
    D by `config.kind`: grpo: each response's own count, then the mean over all responses; dapo: the count of the
    whole batch; dr_grpo: responses * max_length. Counts are sums of weights (normalise="selected") or tokens ("all").

    Args: logprobs, old_logprobs, ref_logprobs, entropies float [N, T] (nats); advantages float [N]; mask bool [N, T];
        weights float [N, T]; totals: denominators of the whole batch if this call sees only a part of it.
    Returns: LossTerms; gradients flow through logprobs and entropies only.
    Sources: GRPO arXiv 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, the mask of ICT 2606.19771.
    """
    totals = totals or loss_totals(mask, weights, normalise)
    log_ratio = torch.where(mask & (weights != 0), logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    advantage = advantages.unsqueeze(1)
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    psi = -torch.minimum(ratio * advantage, clipped_ratio * advantage)
    kl = torch.zeros_like(psi)
    if ref_logprobs is not None:
        gap = torch.where(mask & (weights != 0), ref_logprobs - logprobs, 0.0)
        kl = gap.exp() - gap - 1
        psi = psi + config.kl_coef * kl
    if entropies is not None and config.entropy_coef:
        psi = psi - config.entropy_coef * entropies
    counted = torch.where(mask, weights if normalise == "selected" else 1.0, 0.0)
    return LossTerms(
        loss=_divide(torch.where(mask, weights * psi, 0.0), counted, totals, config.kind),
        log_ratio=log_ratio.detach(),
        clipped_low=(ratio < 1 - config.clip_low) & (advantage < 0) & mask,
        clipped_high=(ratio > 1 + config.clip_high) & (advantage > 0) & mask,
        kl=kl.detach(),
    )


def _divide(per_token: Tensor, counted: Tensor, totals: LossTotals, kind: str) -> Tensor:
    """The sum of per_token [N, T] over the denominators of `kind`; counted [N, T] is what a response's own D sums."""
    if kind == "grpo":
        own = counted.sum(1).clamp(min=1e-8)
        return (per_token.sum(1) / own).sum() / totals.responses.clamp(min=1)
    if kind == "dapo":
        return per_token.sum() / totals.weight.clamp(min=1e-8)
    return per_token.sum() / (totals.responses.clamp(min=1) * totals.max_length)
