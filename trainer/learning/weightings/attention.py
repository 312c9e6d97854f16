"""Weighting by the attention that a token receives from the tokens after it."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.learning.weightings.inputs import WeightInputs


def attention(inputs: WeightInputs) -> Tensor:
    """Every token counts, in proportion to the attention that later tokens of its response pay to it.

    Formula: w = a / mean(a), the mean over the tokens of the response that have a later one; a is the attention that
    later tokens pay to this one, averaged over them and over the heads of the last layer (`attention_received`). The
    last token has w = 1, because no token comes after it. So has every token of a response whose a are all 0. The mean
    weight is 1.
    Scope: the response.
    Denominator: sum of weights = number of tokens of the response, so both values of `normalise` agree.
    Source: none; a heuristic of ours, to compare with. It costs one more forward pass, with eager attention.
    """
    if inputs.attention is None:
        raise ValueError("The weighting attention needs the attention that tokens receive: set WeightInputs.attention.")
    mask = inputs.mask
    last = mask & (mask.flip(1).long().cumsum(1).flip(1) == 1)
    judged = mask & ~last
    a = torch.where(judged, inputs.attention.float(), 0.0)
    mean = a.sum(1, keepdim=True) / judged.sum(1, keepdim=True).clamp(min=1)
    return torch.where(judged & (mean > 0), a / mean.clamp(min=1e-30), mask.float())
