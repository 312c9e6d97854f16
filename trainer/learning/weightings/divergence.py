"""Weighting by how far the policy has moved on a token since the rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.learning.weightings.inputs import WeightInputs


def divergence(inputs: WeightInputs, *, strength: float, sharpness: float, ramp_steps: float) -> Tensor:
    """More weight for tokens on which the policy has moved since the rollout (sharpness > 0), or less (< 0).

    Formula: w = 1 + strength * (sigmoid(alpha * k3) - 1/2), k3 = r - ln r - 1 >= 0, r = p / p_old of the sampled
    token; alpha = sharpness * min(1, steps since warm-up / ramp_steps). w is in [1 - strength/2, 1 + strength/2].
    Scope: no threshold. Weights are recomputed before each optimizer update with the policy as it then is, which costs
    one more forward pass without gradient. The recorded weights are those of the step's last epoch.
    Denominator: all tokens (normalise = "all").
    Defaults: strength = 0.3, sharpness = 50.0, ramp_steps = 100.0. The source sets weighting.warmup_steps = 100, and
    150 with sharpness = -50. The length of the ramp is ours: the source gives only its start and end values.
    Source: arXiv 2603.22446, section 5.2. All weights are 1 on-policy, where r = 1, so optim.epochs or
    optim.mini_batches above 1 is required.
    """
    if inputs.current_logprobs is None:
        raise ValueError("divergence needs the current policy's log-probabilities: set WeightInputs.current_logprobs.")
    log_ratio = torch.where(inputs.mask, inputs.current_logprobs - inputs.signals.logprob, 0.0)
    k3 = torch.expm1(log_ratio) - log_ratio
    alpha = sharpness * min(1.0, inputs.steps_active / ramp_steps)
    return torch.where(inputs.mask, 1 + strength * (torch.sigmoid(alpha * k3) - 0.5), 0.0)
