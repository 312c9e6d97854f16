"""Weightings by a token's deviation from its group: ICT, its complement, and a soft form."""

from __future__ import annotations

import torch
from torch import Tensor

from monitor.signals import TokenSignals, deviation_cap
from trainer.learning.weightings.inputs import WeightInputs, kept_per_row, quantile_per_row, top_per_row

CLIP_QUANTILES = (0.05, 0.95)  # of ict_soft


def capped_deviation(signals: TokenSignals) -> Tensor:
    """u / cap(n) in [0, 1], float32 [N, T]: makes positions with few rollouts alive comparable to those with many.

    u is the deviation and n the rollouts alive. cap(n) = `deviation_cap(alive)` is the largest deviation possible from
    a group mean that contains the row itself. The result is 0 where n = 1.
    Source: the bound is derived at `deviation_cap`; the division is ours, arXiv 2606.19771 has none.
    """
    cap = deviation_cap(signals.alive)
    return torch.where(cap > 0, signals.deviation / cap.clamp(min=1e-6), 0.0)


def _silent(deviation: Tensor, mask: Tensor) -> Tensor:
    """bool [N, 1]: which responses have only deviations of 0, so that nothing tells their tokens apart."""
    return (torch.where(mask, deviation, 0.0) == 0).all(dim=1, keepdim=True)


def ict_weights(deviation: Tensor, mask: Tensor, *, keep: float = 0.10) -> Tensor:
    """ICT: the `keep` share of each response's tokens that deviate most from their group.

    w_it = 1 if token t is among the ceil(keep * T_i) largest deviations of response i, else 0. Tokens are chosen by
    rank; of equal deviations the earlier position ranks first. A response whose deviations are all 0 has weight 1
    everywhere.
    deviation float [N, T], nats; mask bool [N, T] -> float32 [N, T], 0 where mask is False. Raises ValueError for keep
    outside (0, 1].
    Source: arXiv 2606.19771v1, eqs. 10 and 27. We rank because their percentile keeps every token tied at 0.
    """
    chosen = top_per_row(deviation, mask, kept_per_row(mask, keep))
    return torch.where(_silent(deviation, mask), mask.float(), chosen)


def ict(inputs: WeightInputs, *, keep: float) -> Tensor:
    """The tokens of each response that deviate most from their group (ICT).

    Formula: w = 1 on the ceil(keep * T_i) largest deviations u of response i by rank (ties: the earlier position),
    else 0; w = 1 everywhere in a response whose u are all 0.
    Scope: the response.
    Denominator: the selected tokens of the response, then the mean over responses (normalise = "selected").
    Defaults: keep = 0.1.
    Source: arXiv 2606.19771v1, eqs. 10 and 27. We rank because their percentile keeps every token tied at 0.
    """
    return ict_weights(inputs.signals.deviation, inputs.mask, keep=keep)


def ict_undecided(inputs: WeightInputs, *, keep: float, min_entropy: float) -> Tensor:
    """The undecided tokens of each response that deviate most from their group: ICT where there still is a choice.

    Formula: w = 1 on the ceil(keep * M_i) largest deviations u among the M_i tokens of response i with entropy >
    min_entropy, by rank (ties: the earlier position), else 0; w = 1 on all M_i where their u are all 0.
    Scope: the response; min_entropy is absolute, nats.
    Denominator: the selected tokens of the response (normalise = "selected"). A response without undecided tokens adds
    0 to the sum, and counts in the mean over responses.
    Defaults: keep = 0.1, min_entropy = 0.05.
    Source: ours. In our runs plain `ict` chose mostly tokens that the policy had decided, and lost reward.
    """
    return ict_weights(inputs.signals.deviation, inputs.undecided(min_entropy), keep=keep)


def ict_frequent(inputs: WeightInputs, *, keep: float) -> Tensor:
    """All tokens of each response but those that deviate most: the complement of ICT.

    Formula: w = 0 on the ceil((1 - keep) * T_i) largest deviations of response i by rank, else 1; w = 1 everywhere
    in a response whose deviations are all 0.
    Scope: the response.
    Denominator: the selected tokens of the response (normalise = "selected").
    Defaults: keep = 0.9.
    Source: arXiv 2606.19771v1, Table 2 ("90%-frequent").
    """
    deviation, mask = inputs.signals.deviation, inputs.mask
    if keep >= 1:
        return mask.float()
    dropped = top_per_row(deviation, mask, kept_per_row(mask, 1 - keep))
    return torch.where(_silent(deviation, mask), mask.float(), mask.float() - dropped)


def ict_soft(inputs: WeightInputs) -> Tensor:
    """Every token counts, and one that deviates more counts more: a soft form of ICT.

    Formula: w = x / mean(x), x = ln(1 + u / mean(u)) clipped to its own 5 % and 95 % quantiles, so that the mean
    weight of a response is 1; w = 1 everywhere in a response whose clipped x are all 0.
    Scope: the response, for means and quantiles; quantiles are linear between ranks.
    Denominator: sum of weights = number of tokens of the response, so both values of `normalise` agree.
    Source: none; the paper has the binary mask only. The shape (log1p, row quantiles, mean 1) follows a public verl
    fork, with ICT's deviation as score.
    """
    u, mask = torch.where(inputs.mask, inputs.signals.deviation, 0.0), inputs.mask
    tokens = mask.sum(1, keepdim=True).clamp(min=1)
    x = torch.log1p(u / (u.sum(1, keepdim=True) / tokens).clamp(min=1e-30))
    low, high = (quantile_per_row(x, mask, q) for q in CLIP_QUANTILES)
    clipped = torch.where(mask, x.clamp(low, high), 0.0)
    mean = clipped.sum(1, keepdim=True) / tokens
    return torch.where(mean > 0, clipped / mean.clamp(min=1e-30), mask.float())
