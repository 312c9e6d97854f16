"""Weightings: from the old policy's signals to one weight per response token, detached, once per rollout batch.

To add one: a pure function in `trainer/weightings/` with `WeightInputs` first and its parameters by keyword, its row
in `WEIGHT_FUNCTIONS`, and its name with the parameters' defaults in `config.WEIGHTINGS`; then a known-answer test.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trainer.config import WeightingConfig
from trainer.weightings.baselines import random, uniform
from trainer.weightings.deviation import ict, ict_frequent, ict_weights
from trainer.weightings.entropy import stapo, top_entropy
from trainer.weightings.inputs import WeightInputs

__all__ = ["WEIGHT_FUNCTIONS", "WeightInputs", "ict_weights", "token_weights"]

WEIGHT_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "ict": ict,
    "ict_frequent": ict_frequent,
    "random": random,
    "top_entropy": top_entropy,
    "stapo": stapo,
}


def token_weights(inputs: WeightInputs, config: WeightingConfig) -> Tensor:
    """The configured weighting, or weight 1 everywhere during the first `warmup_steps`. float32 [N, T], >= 0.

    0 where the mask is False; without gradient.
    """
    if inputs.steps_active < 1:
        return inputs.mask.float()
    return WEIGHT_FUNCTIONS[config.kind](inputs, **config.parameters).detach()
