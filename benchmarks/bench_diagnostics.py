"""What the diagnostics cost, as a part of a step with the demo's settings.

    python benchmarks/bench_diagnostics.py

diagnostics_ms: what moments, regimes, predicted changes and mismatch add to the time of signals and statistics.
probe_ms: the time of a probe, which one step in `probe_every` has. Both are medians over interleaved calls on real
rollouts, in CPU time of one thread, which other work on the machine hardly changes. ratio: a step's time with both,
divided by that with neither.
"""

from __future__ import annotations

import statistics
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import torch
from harness import RESULTS, no_options, write_rows

from monitor.signals import TokenSignals, token_signals
from monitor.signals.stats import signal_statistics
from trainer.config import TrainConfig
from trainer.flow import TokenBatch
from trainer.learning.batch import token_batch
from trainer.learning.probe import finish_probe, take_probe
from trainer.policy.policy import Policy
from trainer.runtime.build import prepare
from trainer.train import describe, sample_step

PRESET = Path(__file__).parent.parent / "trainer" / "presets" / "demo.toml"


def plain(policy: Policy, logits: torch.Tensor, batch: TokenBatch) -> TokenSignals:
    signals = token_signals(logits, batch.token_ids, batch.mask, batch.group_ids)
    signal_statistics(signals, batch.mask, batch.mask.float(), batch.correct)
    return signals


def diagnosed(policy: Policy, logits: torch.Tensor, batch: TokenBatch) -> None:
    signals = token_signals(logits, batch.token_ids, batch.mask, batch.group_ids, moments=True)
    extra = {"advantages": batch.advantages, "sampler_logprobs": batch.sampler_logprobs}
    signal_statistics(signals, batch.mask, batch.mask.float(), batch.correct, **extra)


def probed(policy: Policy, logits: torch.Tensor, batch: TokenBatch) -> None:
    finish_probe(policy, take_probe(policy, batch, 1.0))


def cpu_s(call: Callable[..., object], *arguments: object) -> float:
    begin = time.process_time()
    call(*arguments)
    return time.process_time() - begin


def main() -> None:
    no_options(__doc__)
    parts = prepare(TrainConfig(**tomllib.loads(PRESET.read_text())))
    calls = (plain, diagnosed, probed)
    times: list[list[float]] = [[] for _ in range(4)]
    for step in range(1, 13):
        begin = time.process_time()
        rollouts, scored = sample_step(parts)
        batch = token_batch(rollouts, scored, parts.task.correct_at, parts.config)
        describe(step, batch, scored, parts.updater.update(batch, step), parts)
        times[3].append(time.process_time() - begin)
        with torch.no_grad():
            logits = parts.policy.project(parts.policy.hidden(batch))
        for _ in range(5):
            for call, found in zip(calls, times, strict=False):
                found.append(cpu_s(call, parts.policy, logits, batch))
    without, with_them, probe, step_s = (statistics.median(found) for found in times)
    every = parts.config.record.probe_every
    row = {
        "step_s": f"{step_s:.4f}",
        "diagnostics_ms": f"{1e3 * (with_them - without):.2f}",
        "probe_ms": f"{1e3 * probe:.2f}",
        "probe_every": every,
        "ratio": f"{step_s / (step_s - (with_them - without)) + probe / every / step_s:.4f}",
        "threads": torch.get_num_threads(),
    }
    write_rows(RESULTS / "diagnostics.csv", [row], ("torch", "transformers"))


if __name__ == "__main__":
    main()
