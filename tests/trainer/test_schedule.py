"""Learning-rate schedules: by hand, beside transformers', in a real run, through a resume and a change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import rows, run
from transformers import get_scheduler

from trainer.config import ConfigError, TrainConfig
from trainer.learning.schedule import learning_rate


def config(steps: int, **optim: object) -> TrainConfig:
    return TrainConfig(steps=steps, optim=optim)


def rates(made: TrainConfig) -> list[float]:
    return [learning_rate(made, step) for step in range(1, made.steps + 1)]


def test_constant_is_the_default() -> None:
    assert rates(config(4, lr=2.0)) == [2.0] * 4


def test_linear_by_hand() -> None:
    # warm-up 1/2, 2/2; then p = 0, 1/4, 2/4, 3/4 of the way from 8 down to a quarter of it: 8 - 6 p
    made = config(6, lr=8.0, schedule="linear", warmup_steps=2, min_lr_share=0.25)
    assert rates(made) == pytest.approx([4.0, 8.0, 8.0, 6.5, 5.0, 3.5])


def test_cosine_by_hand() -> None:
    # (1 + cos(pi p)) / 2 at p = 0, 1/4, 1/2, 3/4
    expected = [1.0, (1 + np.sqrt(0.5)) / 2, 0.5, (1 - np.sqrt(0.5)) / 2]
    assert rates(config(4, lr=1.0, schedule="cosine")) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_rates_are_those_of_transformers_after_warm_up(schedule: str, warmup: int) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(config(20, lr=0.5, schedule=schedule, warmup_steps=warmup))[warmup:] == pytest.approx(
        expected[warmup:]
    )


def test_a_warm_up_that_never_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim.warmup_steps is 5 but the run has 5 steps.*4 or less"):
        config(5, warmup_steps=5)


def test_a_run_records_and_uses_the_rates(tmp_path: Path) -> None:
    options = (
        "--optim.schedule linear --optim.warmup-steps 2 --optim.lr 1e-3 --weighting.kind uniform --eval.every 0".split()
    )
    assert run(tmp_path, *options, "--run", "whole", "--steps", "6") == 0
    recorded = [value for (value,) in rows(tmp_path, "SELECT value FROM steps WHERE name = 'lr' ORDER BY step")]
    # 1/2, 2/2, then 1 - p with p = 0, 1/4, 2/4, 3/4
    assert recorded == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    # a constant rate takes the same steps only where the rates are the same: not in the first
    plain = [*options[4:], "--run", "plain", "--steps", "2"]
    assert run(tmp_path, *plain) == 0
    entropy = "SELECT run, value FROM steps WHERE name = 'entropy' AND step = 2 ORDER BY run"
    (_, one), (_, other) = rows(tmp_path, entropy)
    assert one != other
