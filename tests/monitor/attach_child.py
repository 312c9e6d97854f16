"""One rank of an attached trainer with groups on two ranks: attach_child.py FOLDER WEIGHTING|none FAIL_AT_RANK|none

Saves what a test needs to compute everything again: FOLDER/rank-R.pt.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

warnings.simplefilter("ignore")

import tiny_trl  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

import rlvr_monitor  # noqa: E402

ROWS, STEPS = 6, 2  # rows of a rank; groups of 4


class Saved(TrainerCallback):
    def __init__(self) -> None:
        self.models: dict[int, Any] = {}
        self.gradients: dict[int, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.models[state.global_step + 1] = {name: value.clone() for name, value in model.state_dict().items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients[state.global_step + 1] = torch.cat([p.grad.flatten() for p in model.parameters()])


def main(folder: Path, weighting: str | None, failing: int | None) -> None:
    rank = int(os.environ["RANK"])
    GRPOTrainer._send_telemetry = lambda self: None
    trained = tiny_trl.trainer(
        folder, per_device_train_batch_size=ROWS, ddp_backend="gloo", max_steps=STEPS, max_grad_norm=0.0,
        loss_type="dapo", learning_rate=1e-2,
    )  # fmt: skip
    saved, outs = Saved(), []
    trained.add_callback(saved)
    score = GRPOTrainer._generate_and_score_completions

    def scored(inputs: Any) -> Any:
        outs.append(score(trained, inputs))
        return outs[-1]

    trained._generate_and_score_completions = scored
    rlvr_monitor.attach(trained, store=folder / "runs", run="mine", weighting=weighting)
    if failing == rank:
        trained.rlvr_attached._made = lambda out: 1 / 0
    trained.train()
    outs = [{key: out[key] for key in out if isinstance(out[key], torch.Tensor)} for out in outs]
    torch.save({"models": saved.models, "gradients": saved.gradients, "outs": outs}, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    given = [None if text == "none" else text for text in sys.argv[2:]]
    main(Path(sys.argv[1]), given[0], None if given[1] is None else int(given[1]))
