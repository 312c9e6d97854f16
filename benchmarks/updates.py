"""Our Updater on fixed random rollouts, for gpu.py and bench_updates.py; and the rows of gpu.py's pair."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from monitor.signals.stats import signal_statistics, step_record
from trainer.base_models.make_base import build_tokenizer
from trainer.config import TrainConfig
from trainer.flow import TokenBatch
from trainer.policy.policy import Policy
from trainer.update import Updater

QWEN = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
TINY = QWEN | {
    "vocab_size": 401, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
GROUP = 8


class Work(NamedTuple):
    """A model's shape, groups of GROUP rollouts, tokens of a prompt and of the longest response; updates, warm-up."""

    shape: dict[str, Any]
    groups: int
    prompt: int
    width: int
    updates: int
    warmup: int


ON_GPU, ON_CPU, SMALL = Work(QWEN, 4, 64, 256, 15, 3), Work(QWEN, 2, 16, 32, 3, 1), Work(TINY, 1, 4, 4, 2, 1)


def random_policy(shape: dict[str, Any], device: torch.device) -> Policy:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = Qwen2Config(**shape, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with device:
        return Policy(Qwen2ForCausalLM(config), tokenizer, device)


def random_batch(policy: Policy, groups: int, prompt: int, width: int) -> TokenBatch:
    """Whole groups of random tokens: prompts of `prompt`, responses of width / 2 to width."""
    generator = torch.Generator().manual_seed(0)
    n = groups * GROUP
    ids = torch.randint(policy.vocabulary, (n, prompt + width), generator=generator)
    mask = torch.arange(width) < torch.randint(width // 2, width + 1, (n, 1), generator=generator)
    there = torch.cat([torch.ones(n, prompt, dtype=torch.bool), mask], 1)
    rewards, advantages = torch.rand(n, generator=generator).round(), torch.randn(n, generator=generator)
    rollouts = (x.to(policy.device) for x in (ids, there, mask, torch.zeros(n, width), rewards > 1))
    outcome = (x.to(policy.device) for x in (rewards, rewards > 0.5, advantages, mask))
    return TokenBatch(*rollouts, torch.arange(n) // GROUP, *outcome)  # groups stay on the host


def measured(kind: str, device: torch.device, work: Work) -> dict[str, Any]:
    """Medians over the updates after the warm-up: one optimizer step on all rollouts, signals of every token.

    record_ms: statistics and the copy to the host, which the training thread does; the store is written by another.
    On a CPU: CPU time, and the largest resident size of the process, which is to measure one kind only.
    """
    gc.collect()  # the policy before, whose hooks hold it in a cycle
    torch.cuda.empty_cache()
    policy = random_policy(work.shape, device)
    batch = random_batch(policy, work.groups, work.prompt, work.width)
    config = TrainConfig.model_validate(
        {
            "weighting": {"kind": kind, "warmup_steps": 0} | ({"keep": 0.1} if kind == "ict" else {}),
            "rollout": {"group_size": GROUP, "max_new_tokens": batch.mask.shape[1]},
            "record": {"probe_every": 0},
            "optim": {"lr": 1e-6},
        }
    )
    updater = Updater(policy, None, config)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, records = [], []
    for step in range(1, work.updates + 1):
        marks = [clock(device)]
        update = updater.update(batch, step)
        marks.append(clock(device))
        found = signal_statistics(
            update.signals, batch.mask, update.weights, batch.correct, advantages=batch.advantages
        )
        scalars = {"loss": update.loss, "grad_norm": update.grad_norm}
        step_record(
            step, update.signals, batch.token_ids, batch.mask, update.weights, found, update.loss_stats, scalars=scalars
        )
        marks.append(clock(device))
        times.append(marks[1] - marks[0])
        records.append(marks[2] - marks[1])
    update_s, record_s = (statistics.median(values[work.warmup :]) for values in (times, records))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident
    return {
        "weighting": kind, "rollouts": len(batch), "tokens": int(batch.mask.sum()), "vocabulary": policy.vocabulary,
        "update_ms": f"{1e3 * update_s:.2f}", "record_ms": f"{1e3 * record_s:.2f}",
        "record_share": f"{record_s / (update_s + record_s):.4f}", "peak_gib": f"{peak / 2**30:.2f}",
        "weight_sum": int(update.weights.sum()),
    }  # fmt: skip


def clock(device: torch.device) -> float:
    """Seconds: CPU time of all threads on a CPU, else the wall's once the device has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def pair_row(store: Path, run: str) -> dict[str, Any]:
    """What a run of the pair reached: steps, and medians of its times after the warm-up."""
    from monitor.store.reader import open_store

    query = "SELECT max(step) FILTER (name = 'reward'), avg(value) FILTER (name = 'reward' AND step > last - 10)"
    query += "".join(f", median(value) FILTER (name = 'perf/{name}_s' AND step > 1)" for name in ("step", "update"))
    query += ", median(value) FILTER (name = 'perf/record_s' AND step > 1), max(last)"
    with open_store(store) as opened:
        table = "(SELECT *, max(step) OVER () AS last FROM steps WHERE run = ?)"
        steps, reward, step_s, update_s, record_s, _ = opened.sql(f"{query} FROM {table}", [run]).rows[0]
    times = {"step_s": step_s, "update_s": update_s, "record_s": record_s}
    return {"run": run, "steps": steps, "reward_last_10": reward} | {k: f"{v:.4f}" for k, v in times.items()}
