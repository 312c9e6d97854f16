"""What `attach` adds to a step of TRL's GRPOTrainer, beside the same trainer without it, on the same work.

    python benchmarks/bench_attach.py

Three trainers on copies of one policy take turns in one process, each turn with the same random numbers: TRL alone,
with attach, and with attach and a weighting. A step is generation, rewards, loss, backward, clip, AdamW, and what
attach does with it until the step is durable in the store. Time is CPU time of all threads, one of which computes
tensors, so the recorder's writer counts too. "cost" is the median over turns of the difference to TRL alone, without
the forward pass that a weighting needs here, because TRL makes no pass for old log-probabilities where a rollout batch
has one update; that pass has a column of its own. The first turn warms up.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from against_trl import WORK, Ours, Theirs
from harness import RESULTS, no_options, write_rows

from monitor.integrations.trl.inside import Body
from rlvr_monitor import attach

TURNS = {"builtin": 9, "smollm2-135m": 3}
ARMS: dict[str, dict[str, Any] | None] = {
    "TRL alone": None,
    "attach": {},
    "attach, ict": {"weighting": "ict:warmup_steps=0"},
}


class Arm(Theirs):
    """A trainer of TRL whose steps are taken one by one, with transformers' events where `train` has them."""

    def __init__(self, ours: Ours, folder: Path, name: str, options: dict[str, Any] | None) -> None:
        super().__init__(ours, str(folder / "trl"))
        self.trainer.state.max_steps = 10**6
        self.watch = None
        if options is not None:
            attach(self.trainer, store=folder / "runs", run=name.replace(", ", "-"), **options)
            self.watch = self.trainer.rlvr_attached
            self.watch.on_train_begin(*self._event())

    def turn(self, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        self.trainer._buffered_inputs = None
        begin = time.process_time()
        self.trainer.training_step(self.trainer.model, self.rows, None)
        if self.watch is None:
            self._optimize()
        else:
            self.watch.on_pre_optimizer_step(*self._event())
            self._optimize()
            self.watch.on_optimizer_step(*self._event())
            self.trainer.state.global_step += 1
            self.watch.on_step_end(*self._event())
            self.watch.recorder.flush()
        took = time.process_time() - begin
        return {"step_s": took, "tokens": float(self.trainer._buffered_inputs[0]["completion_mask"].sum())}

    def _event(self) -> tuple[Any, Any, Any]:
        return self.trainer.args, self.trainer.state, self.trainer.control


def measured(model: str, folder: Path) -> list[dict[str, Any]]:
    ours = Ours(model, "uniform", str(folder / "ours"))
    arms = {name: Arm(ours, folder, name, options) for name, options in ARMS.items()}
    passes: list[float] = []
    forward = Body.extra_forward

    def timed(body: Body, out: Any) -> Any:
        begin = time.process_time()
        states = forward(body, out)
        passes.append(time.process_time() - begin)
        return states

    Body.extra_forward = timed  # type: ignore[method-assign]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for turn in range(TURNS[model]):
        names = list(ARMS)
        for name in (*names[turn % 3 :], *names[: turn % 3]):  # each is first, second and last as often
            passes.clear()
            times = arms[name].turn(turn) | {"extra_forward_s": sum(passes)}
            if turn:
                found[name].append(times)
    Body.extra_forward = forward  # type: ignore[method-assign]
    for arm in arms.values():
        if arm.watch is not None:
            assert arm.watch.error is None, arm.watch.error
            arm.watch.recorder.close()
    ours.recorder.close()
    rows, alone = [], found["TRL alone"]
    for name, turns in found.items():
        each = {key: statistics.median(times[key] for times in turns) for key in turns[0]}
        pairs = [
            (mine["step_s"] - mine["extra_forward_s"] - theirs["step_s"], theirs["step_s"])
            for mine, theirs in zip(turns, alone, strict=True)
        ]
        rollout = WORK[model]["rollout"]
        rows.append(
            {"model": model, "arm": name, "rollouts": rollout["prompts"] * rollout["group_size"],
             "response_tokens": round(each["tokens"]), "turns": len(turns), "step_s": round(each["step_s"], 4),
             "extra_forward_s": round(each["extra_forward_s"], 4),
             "cost_s": round(statistics.median(cost for cost, _ in pairs), 4),
             "cost_share": round(statistics.median(cost / step for cost, step in pairs), 4),
             "threads": torch.get_num_threads()}
        )  # fmt: skip
    return rows


def main() -> None:
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for model in WORK:
        with tempfile.TemporaryDirectory() as folder:
            rows += measured(model, Path(folder))
        write_rows(RESULTS / "attach.csv", rows, ("torch", "transformers", "trl"))


if __name__ == "__main__":
    no_options(__doc__)
    main()
