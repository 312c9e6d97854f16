"""Weightings by a token's deviation from its group: ICT and its complement."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.weightings.inputs import WeightInputs, kept_per_row, top_per_row


def _silent(deviation: Tensor, mask: Tensor) -> Tensor:
    """bool [N, 1]: responses whose deviations are all 0, so that nothing tells their tokens apart."""
    return (torch.where(mask, deviation, 0.0) == 0).all(dim=1, keepdim=True)


def ict_weights(deviation: Tensor, mask: Tensor, *, keep: float = 0.10) -> Tensor:
    """ICT: the `keep` share of each response's tokens that deviate most from their group.

    w_it = 1 if token t is among the ceil(keep * T_i) largest deviations of response i, else 0; chosen by rank, ties
    to the earlier position. A response whose deviations are all 0 keeps weight 1 everywhere.
    deviation float [N, T], mask bool [N, T] -> float32 [N, T], 0 where mask is False.
    Source: arXiv 2606.19771v1, eqs. 10 and 27; ranking in place of their percentile, which keeps all ties at 0.
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
    Source: arXiv 2606.19771v1, eqs. 10 and 27; rank in place of their percentile, which keeps all ties at 0.
    """
    return ict_weights(inputs.signals.deviation, inputs.mask, keep=keep)


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
