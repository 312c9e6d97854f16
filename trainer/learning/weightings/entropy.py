"""Weightings by entropy: the 80/20 rule, and STAPO's silencing of rare spurious tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.learning.weightings.inputs import WeightInputs, kept_per_row, quantile_per_row, top_of_batch


def top_entropy(inputs: WeightInputs, *, keep: float) -> Tensor:
    """The tokens of highest entropy in the batch (the 80/20 rule).

    Formula: w = 1 on the ceil(keep * tokens) largest entropies by rank (ties: the earlier token), else 0.
    Scope: the whole rollout batch (the authors' code: the micro-batch, with the current policy's entropy).
    Denominator: the selected tokens of the batch (normalise = "selected" with loss.kind = "dapo").
    Defaults: keep = 0.2.
    Source: arXiv 2506.01939.
    """
    mask = inputs.mask
    return top_of_batch(inputs.signals.entropy, mask, kept_per_row(mask.reshape(1, -1), keep))


def stapo(inputs: WeightInputs, *, max_probability: float, entropy_quantile: float) -> Tensor:
    """All tokens but the rare spurious ones of good responses: tokens that were improbable although entropy was low.

    Formula: w = 0 where advantage > 0, p < max_probability and entropy < its entropy_quantile, else 1.
    Scope: the whole rollout batch, for the quantile, which is linear between ranks; max_probability is absolute. The
    paper takes the quantile over the mini-batch, which is the same where a step has one.
    Denominator: the kept tokens of the batch (normalise = "selected" with loss.kind = "dapo").
    Defaults: max_probability = 0.002, entropy_quantile = 0.8.
    Source: arXiv 2602.15620 (STAPO). The paper contradicts itself on the quantile; 0.8 is the reading that fits the
    rest of it: the 80 % of lowest entropy are candidates.
    """
    entropy, mask = inputs.signals.entropy, inputs.mask
    threshold = quantile_per_row(entropy.reshape(1, -1), mask.reshape(1, -1), entropy_quantile)
    rare = torch.exp(inputs.signals.logprob) < max_probability
    return (mask & ~(inputs.positive & rare & (entropy < threshold))).float()
