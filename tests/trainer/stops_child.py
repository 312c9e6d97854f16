"""`rlvr train` that waits where it is told to: in the middle of optimizer.step, in sampling or in an evaluation.

stops_child.py WHERE STEP FOLDER TRAIN_OPTIONS...   makes FOLDER/there when it is there; WHERE `optimizer` goes on, the
second half of the parameters still to do, once FOLDER/on is there; the others never do.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from trainer import evaluate, train
from trainer.commands.train import main

where, step, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
calls = 0


def wait() -> None:
    (folder / "there").touch()
    while not (folder / "on").exists():
        time.sleep(0.005)


def waiting(function: Any) -> Any:
    """The function, which waits for ever in its `step`-th call."""

    def call(*args: Any, **named: Any) -> Any:
        global calls
        calls += 1
        if calls == step:
            wait()
        return function(*args, **named)

    return call


class Halfway(torch.optim.AdamW):
    """A step in two halves: each parameter is moved once, as AdamW moves it."""

    def step(self, closure: Any = None) -> None:
        global calls
        calls += 1
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters]
        for half in (0, 1):
            for i, (p, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                p.grad = gradient if i % 2 == half else None
            super().step()
            if half == 0 and calls == step:
                wait()


if where == "optimizer":
    torch.optim.AdamW = Halfway  # type: ignore[misc]
elif where == "sampling":
    train.sample = waiting(train.sample)
else:
    evaluate.sample_split = waiting(evaluate.sample_split)
sys.exit(main(sys.argv[4:]))
