"""Weightings: from the old policy's signals to one weight for each response token, without gradient.

Weights are computed once for a rollout batch (`divergence` alone: before each update). To add a weighting, write a pure
function in `trainer/learning/weightings/` that takes `WeightInputs` first and its parameters by keyword, its row in
`WEIGHT_FUNCTIONS`, its settings in `trainer/config/weighting.py`, and a known-answer test.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trainer.config import WeightingConfig
from trainer.learning.weightings.attention import attention
from trainer.learning.weightings.baselines import random, random_undecided, uniform
from trainer.learning.weightings.budget import entropy_budget, ict_budget, ict_soft_budget, opefo, random_budget
from trainer.learning.weightings.covariance import clip_cov, kl_cov, kl_cov_penalty
from trainer.learning.weightings.deviation import (
    capped_deviation,
    ict,
    ict_frequent,
    ict_soft,
    ict_undecided,
    ict_weights,
)
from trainer.learning.weightings.divergence import divergence
from trainer.learning.weightings.entropy import stapo, top_entropy
from trainer.learning.weightings.inputs import WeightInputs
from trainer.learning.weightings.probability import advantage_reweight, rsi, stare

__all__ = [
    "BY_GROUP",
    "WEIGHT_FUNCTIONS",
    "WeightInputs",
    "capped_deviation",
    "ict_weights",
    "token_penalty",
    "token_weights",
]

WEIGHT_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "ict": ict,
    "ict_frequent": ict_frequent,
    "random": random,
    "ict_undecided": ict_undecided,
    "random_undecided": random_undecided,
    "top_entropy": top_entropy,
    "stapo": stapo,
    "ict_soft": ict_soft,
    "divergence": divergence,
    "rsi": rsi,
    "stare": stare,
    "advantage_reweight": advantage_reweight,
    "entropy_budget": entropy_budget,
    "ict_budget": ict_budget,
    "ict_soft_budget": ict_soft_budget,
    "random_budget": random_budget,
    "opefo": opefo,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "attention": attention,
}

# Kinds whose weights of a group depend on nothing beyond it: no sum or threshold of the batch, no random numbers.
BY_GROUP = {
    "uniform", "ict", "ict_frequent", "ict_undecided", "ict_soft", "rsi", "advantage_reweight",
}  # fmt: skip


def token_weights(inputs: WeightInputs, config: WeightingConfig) -> Tensor:
    """The weights of the configured weighting, or 1 everywhere during the first `warmup_steps`.

    float32 [N, T], >= 0, and 0 where the mask is False; without gradient.
    """
    if inputs.steps_active < 1:
        return inputs.mask.float()
    return WEIGHT_FUNCTIONS[config.kind](inputs, **config.parameters).detach()


def token_penalty(inputs: WeightInputs, config: WeightingConfig) -> Tensor | None:
    """float32 [N, T]: coefficients of |logprob - old logprob| in psi; None for all kinds but kl_cov after warm-up."""
    if config.kind != "kl_cov" or inputs.steps_active < 1:
        return None
    return kl_cov_penalty(inputs, **config.parameters)
