"""Weighting by the attention that a token receives from the tokens after it."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.learning.weightings.inputs import WeightInputs


def attention(inputs: WeightInputs) -> Tensor:
    """Every token, the more the more later tokens of its response attend to it.

    Formula: w = a / mean(a) over the tokens of the response that have a later one; a = mean over later tokens of the
    attention they pay to this one, heads of the last layer averaged (`attention_received`). The last token, which none
    attends, has w = 1; so has every token of a response whose a are all 0. The mean weight is 1.
    Scope: the response.
    Denominator: sum of weights = number of tokens of the response, so both values of `normalise` agree.
    Source: none; a heuristic of ours, to compare with. Costs one more forward pass, with eager attention.
    """
    if inputs.attention is None:
        raise ValueError("attention needs the attention that tokens receive: set WeightInputs.attention.")
    mask = inputs.mask
    last = mask & (mask.flip(1).long().cumsum(1).flip(1) == 1)
    judged = mask & ~last
    a = torch.where(judged, inputs.attention.float(), 0.0)
    mean = a.sum(1, keepdim=True) / judged.sum(1, keepdim=True).clamp(min=1)
    return torch.where(judged & (mean > 0), a / mean.clamp(min=1e-30), mask.float())
