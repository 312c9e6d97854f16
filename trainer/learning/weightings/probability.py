"""Weightings by the probability of the sampled token: RSI, STARE, advantage reweighting."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.learning.weightings.inputs import WeightInputs, kept_per_row, mean_of_batch, top_of_batch


def rsi(inputs: WeightInputs, *, low: float, high: float) -> Tensor:
    """The tokens whose surprisal is near the entropy, which is its expected value (RSI-S).

    Formula: w = 1 where low <= RSI <= high, else 0; RSI = 1 + logprob / entropy, and 1 where the entropy is 0.
    Scope: absolute bounds, no threshold from data.
    Denominator: the kept tokens (normalise = "selected").
    Defaults: none; low and high are required, because good bounds depend on the model and were not published for ours.
    The mean of RSI over sampled tokens is 0, so take low < 0 < high.
    Source: arXiv 2606.31575. Some ports call surprisal / entropy RSI, which is 1 - RSI here; their bounds do not apply.
    """
    index = 1 + inputs.signals.logprob / inputs.signals.entropy.clamp(min=1e-12)
    return (inputs.mask & (index >= low) & (index <= high)).float()


def stare(inputs: WeightInputs, *, share: float, boost: float, target_entropy: float) -> Tensor:
    """A boost for the most surprising tokens of good responses, while the policy has too little entropy (STARE).

    Formula: w = boost on the ceil(share * tokens) largest surprisals -logprob among tokens with advantage > 0, by
    rank (ties: the earlier token); w = 1 on the others, and on all while mean entropy >= target_entropy.
    Scope: the whole rollout batch, for the rank and for the mean entropy (nats).
    Denominator: all tokens of the batch (normalise = "all" with loss.kind = "dapo").
    Defaults: share = 0.1, boost = 1.1, target_entropy = 0.3; its authors saw divergence from boost = 2.
    Source: arXiv 2606.19236, variant O1 without the adaptive boost, which is off by default there.
    """
    mask, positive = inputs.mask, inputs.positive
    chosen = top_of_batch(-inputs.signals.logprob, positive, kept_per_row(positive.reshape(1, -1), share))
    gate = mean_of_batch(inputs.signals.entropy, mask) < target_entropy
    return torch.where(mask, 1 + (boost - 1) * chosen * gate, 0.0)


def advantage_reweight(inputs: WeightInputs, *, alpha: float) -> Tensor:
    """Less weight for improbable tokens, whose gradients are the largest (AR).

    Formula: w = alpha * p + (1 - alpha), p = exp(logprob) of the old policy.
    Scope: no threshold.
    Denominator: all tokens (normalise = "all").
    Defaults: alpha = 0.3.
    Source: arXiv 2505.12929, AR without Lopti. The authors take 0.3 with Lopti, and on one task 0.2 for AR alone.
    """
    p = torch.exp(inputs.signals.logprob)
    return torch.where(inputs.mask, alpha * p + (1 - alpha), 0.0)
