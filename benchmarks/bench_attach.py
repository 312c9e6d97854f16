"""What `attach` adds to a step of TRL's GRPOTrainer, beside the same trainer without it, on the same work.

    python benchmarks/bench_attach.py

Three trainers on copies of one policy take turns in one process, each turn with the same random numbers: TRL alone,
with attach, and with attach and a weighting. A step is generation, rewards, loss, backward, clip, AdamW, and what
attach does with it until the step is durable in the store. Time is CPU time of all threads, one of which computes
tensors, so the recorder's writer counts too. Medians over turns; the first turn warms up. Columns:

cost_s           inside attach: reading, head, signals, weights, statistics, texts, writing; without extra_forward_s
extra_forward_s  the pass that a weighting needs here, because TRL makes none for old log-probabilities where a rollout
                 batch has one update
cost_share       cost_s / the step of TRL alone in the same turn
difference_share (step_s - extra_forward_s) / the step of TRL alone in the same turn - 1: the same from whole steps,
                 whose times scatter more
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from against_trl import WORK, Ours, Theirs
from harness import RESULTS, no_options, write_rows

from monitor.integrations.trl.inside import Body
from rlvr_monitor import attach

TURNS = {"builtin": 6, "smollm2-135m": 3}
INSIDE = ("_take", "_weighted", "_use", "_measure_complete", "_after_update", "_finish")  # what attach adds to TRL
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
            for method in INSIDE:
                setattr(self.watch, method, self._timed(getattr(self.watch, method)))
        self.inside, self._within = 0.0, False

    def _timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Adds the CPU time of the outermost of nested calls to `inside`."""

        def timed(*args: Any) -> Any:
            if self._within:
                return work(*args)
            self._within, begin = True, time.process_time()
            try:
                return work(*args)
            finally:
                self._within, self.inside = False, self.inside + time.process_time() - begin

        return timed

    def turn(self, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        self.trainer._buffered_inputs, self.inside = None, 0.0
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
            self._timed(self.watch.recorder.flush)()
        took = time.process_time() - begin
        return {
            "step_s": took,
            "inside_s": self.inside,
            "tokens": float(self.trainer._buffered_inputs[0]["completion_mask"].sum()),
        }

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
        pairs = [(times, theirs["step_s"]) for times, theirs in zip(turns, alone, strict=True)]
        costs = [times["inside_s"] - times["extra_forward_s"] for times in turns]
        shares = [cost / step for cost, (_, step) in zip(costs, pairs, strict=True)]
        differences = [(times["step_s"] - times["extra_forward_s"]) / step - 1 for times, step in pairs]
        rollout = WORK[model]["rollout"]
        rows.append(
            {"model": model, "arm": name, "rollouts": rollout["prompts"] * rollout["group_size"],
             "response_tokens": round(each["tokens"]), "turns": len(turns), "step_s": round(each["step_s"], 4),
             "extra_forward_s": round(each["extra_forward_s"], 4),
             "cost_s": round(statistics.median(costs), 4), "cost_share": round(statistics.median(shares), 4),
             "difference_share": round(statistics.median(differences), 4),
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
