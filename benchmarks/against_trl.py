"""Times a training step of ours, uniform and ict, and of TRL's GRPOTrainer on the same work, for bench_step.py.

Model, prompts, group, longest response, reward, `dapo` loss without KL, and one AdamW update clipped at norm 1 are the
same in each arm. With stored rollouts the tokens are the same too. What an arm does:

update    ours: `Updater.update`: forward, signals of every token (log-probability, both entropies, group deviation,
          moments), weights, loss at the selected positions, backward, clip, AdamW.
          TRL: `_compute_loss`: forward, log-probability and entropy of every token from its chunked head, loss, its
          metrics; backward, clip, AdamW.
recording ours only, after the update: statistics, histograms, texts, hand-over and the writer thread's work, until
          the step is durable. TRL logs its means.
step      ours: rollouts, rewards, update, recording. TRL: `training_step` (generation, rewards, loss, backward), clip,
          AdamW.
"""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from monitor.recorder import Recorder
from trainer.config import TrainConfig
from trainer.flow import TokenBatch
from trainer.learning.batch import token_batch
from trainer.policy.policy import Policy
from trainer.runtime.build import Parts, prepare, run_info
from trainer.runtime.samples import sample_table
from trainer.train import describe, sample_step

ARMS = ("uniform", "ict", "trl")
TINY_LR = 1e-6  # so small that responses keep their length; the cost of an update does not depend on it
# rollouts, so that a row takes less than two minutes of one core
WORK = {
    "builtin": {"task": "chain", "rollout": {"prompts": 16, "group_size": 8, "max_new_tokens": 56}},
    "smollm2-135m": {
        "task": "reasoning_gym:chain_sum",
        "rollout": {"prompts": 2, "group_size": 4, "max_new_tokens": 40},
    },
}


def settings(model: str, kind: str) -> TrainConfig:
    # ict keeps its 10 %; every step is one on-policy update, selected from the first on
    return TrainConfig(
        model=model, threads=1, **WORK[model],
        weighting={"kind": kind, "warmup_steps": 0}, loss={"kind": "dapo"},
        optim={"lr": TINY_LR, "micro_batch": 1024}, record={"probe_every": 0},
    )  # fmt: skip


class Ours:
    """A run of the project with its recorder; `stored`: the batch that `update` trains on."""

    def __init__(self, model: str, kind: str, folder: str) -> None:
        self.config = settings(model, kind)
        self.parts: Parts = prepare(self.config)
        self.recorder = Recorder(folder, run_info(self.config, kind))
        self.steps = 0

    def roll(self) -> tuple[TokenBatch, Any]:
        rollouts, scored = sample_step(self.parts)
        return token_batch(rollouts, scored, self.parts.task.correct_at, self.config), scored

    def train(self, batch: TokenBatch, scored: Any, clock: Callable[[], float]) -> dict[str, float]:
        self.steps += 1
        begin = clock()
        update = self.parts.updater.update(batch, self.steps)
        middle = clock()
        record, tokens = describe(self.steps, batch, scored, update, self.parts)
        self.recorder.record(record, tokens=tokens, samples=sample_table(batch, scored, self.parts.texts))
        self.recorder.flush()
        return {"update_s": middle - begin, "record_s": clock() - middle}

    def step(self, clock: Callable[[], float]) -> dict[str, float]:
        begin = clock()
        batch, scored = self.roll()
        self.train(batch, scored, clock)
        return {"step_s": clock() - begin, "tokens": float(batch.mask.sum())}


class Theirs:
    """TRL's trainer on a copy of the policy's model; its own generation draws from torch's global generator."""

    def __init__(self, ours: Ours, folder: str) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        policy, task, rollout = ours.parts.policy, ours.parts.task, ours.config.rollout
        policy = Policy(copy.deepcopy(policy.model), policy.tokenizer, policy.device)
        prompts = list(task.prompts("train"))
        self.rows = [
            {"prompt": text(policy, prompt, task.system_prompt), **prompt.columns}
            for prompt in prompts[: rollout.prompts]
            for _ in range(rollout.group_size)
        ]
        n = len(self.rows)
        args = GRPOConfig(
            output_dir=folder, use_cpu=policy.device.type == "cpu", bf16=policy.device.type == "cuda", report_to=[],
            beta=0.0, loss_type="dapo", per_device_train_batch_size=n, num_generations=rollout.group_size,
            max_completion_length=rollout.max_new_tokens, temperature=rollout.temperature, learning_rate=TINY_LR,
            gradient_checkpointing=False, optim="adamw_torch", lr_scheduler_type="constant", logging_steps=10**6,
        )  # fmt: skip
        GRPOTrainer._send_telemetry = lambda self: None  # a benchmark reaches no network
        self.trainer = GRPOTrainer(
            model=policy.model, reward_funcs=rewards(ours), args=args, train_dataset=Dataset.from_list(self.rows),
            processing_class=policy.tokenizer,
        )  # fmt: skip
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.model.train()

    def _optimize(self) -> None:
        trainer = self.trainer
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)

    def train(self, batch: TokenBatch, clock: Callable[[], float]) -> dict[str, float]:
        width = batch.mask.shape[1]
        inputs = {
            "prompt_ids": batch.input_ids[:, :-width],
            "prompt_mask": batch.attention_mask[:, :-width].long(),
            "completion_ids": batch.token_ids,
            "completion_mask": batch.mask.long(),
            "advantages": batch.advantages,
            "num_items_in_batch": batch.mask.sum(),
        }
        begin = clock()
        self.trainer._compute_loss(self.trainer.model, inputs).backward()
        self._optimize()
        return {"update_s": clock() - begin, "record_s": 0.0}

    def step(self, clock: Callable[[], float]) -> dict[str, float]:
        self.trainer._buffered_inputs = None
        begin = clock()
        self.trainer.training_step(self.trainer.model, self.rows, None)
        self._optimize()
        took = clock() - begin
        return {"step_s": took, "tokens": float(self.trainer._buffered_inputs[0]["completion_mask"].sum())}


def text(policy: Policy, prompt: Any, system: str | None) -> str:
    """The prompt as our sampler sees it, with its chat template, so that TRL tokenizes the same text."""
    tokenizer = policy.tokenizer
    if not tokenizer.chat_template:
        return f"{system}\n\n{prompt.text}" if system else prompt.text
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt.text})
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def rewards(ours: Ours) -> Callable[..., list[float]]:
    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any) -> Any:
        kept = {key: columns[key] for key in ours.parts.task.prompts("train")[0].columns}
        return ours.parts.rewards.parts[0].function(
            prompts=prompts, completions=completions, completion_ids=completion_ids, **kept
        )

    return reward


def clock_of(device: torch.device) -> Callable[[], float]:
    """CPU time of all threads on CPU; on CUDA the wall, after the device has finished."""
    if device.type == "cpu":
        return time.process_time
    return lambda: (torch.cuda.synchronize(), time.perf_counter())[1]


def timings(model: str, updates: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each arm: `updates` times on stored rollouts, `steps` times on its own rollouts. Arms take turns."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        ours = {kind: Ours(model, kind, folder) for kind in ("uniform", "ict")}
        theirs = Theirs(ours["uniform"], str(Path(folder) / "trl"))
        clock = clock_of(ours["ict"].parts.policy.device)
        calls: dict[str, list[Callable[[], dict[str, float]]]] = {arm: [] for arm in ARMS}
        for _ in range(updates):
            batch, scored = ours["uniform"].roll()
            for kind, run in ours.items():
                calls[kind].append(partial(run.train, batch, scored, clock))
            calls["trl"].append(partial(theirs.train, batch, clock))
        for _ in range(steps):
            for arm, run in (*ours.items(), ("trl", theirs)):
                calls[arm].append(partial(run.step, clock))
        found: dict[str, dict[str, list[float]]] = {arm: {} for arm in ARMS}
        for turn in range(updates + steps):
            for arm in (*ARMS[turn % 3 :], *ARMS[: turn % 3]):  # each arm is first, second and last as often
                measured = calls[arm][turn]()
                if turn not in (0, updates):  # the first of each kind warms up
                    for key, value in measured.items():
                        found[arm].setdefault(key, []).append(value)
        for run in ours.values():
            run.recorder.close()
    return found


def peak_mib(model: str, arm: str) -> float:
    """How much two updates raise the resident size above that before the first. Runs in a process of its own."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(model, "uniform" if arm == "trl" else arm, folder)
        batch, scored = ours.roll()
        theirs = Theirs(ours, str(Path(folder) / "trl")) if arm == "trl" else None
        cuda = ours.parts.policy.device.type == "cuda"
        before = torch.cuda.memory_allocated() / 2**20 if cuda else _status("VmRSS")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the largest resident size
        for _ in range(2):  # the second with the optimizer's state in place
            _ = theirs.train(batch, time.process_time) if theirs else ours.train(batch, scored, time.process_time)
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else _status("VmHWM")
        ours.recorder.close()
    return peak - before


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024
