"""The learning rate of each step."""

from __future__ import annotations

import math

from trainer.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 1: optim.lr times warm-up and decay.

    With W = optim.warmup_steps, T = steps and m = optim.min_lr_share, warm-up is step / W up to step W. From then on,
    with p = (step - 1 - W) / (T - W), from 0 to almost 1, optim.schedule makes of the rate

        constant: 1,   linear: m + (1 - m) (1 - p),   cosine: m + (1 - m) (1 + cos(pi p)) / 2

    as in `transformers.get_scheduler`, except that its warm-up gives the first step a rate of 0. It is a function of
    the step alone, so a resumed run goes on with the same rates; a run resumed with more steps gets those of the longer
    run.
    """
    optim, total = config.optim, config.steps
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    done = min(1.0, (step - 1 - optim.warmup_steps) / max(1, total - optim.warmup_steps))
    left = {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2}[optim.schedule]
    return optim.lr * (optim.min_lr_share + (1.0 - optim.min_lr_share) * left)
