"""Small records with known values, for the tests of the recorder and the store."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from monitor.metrics import inner_edges, n_cells
from monitor.recorder import Recorder
from monitor.records import Alert, Histogram, RunInfo, SampleTable, StepRecord, TokenTable

N_SAMPLES, N_POSITIONS = 8, 25
N_TOKENS = N_SAMPLES * N_POSITIONS


def histogram(values: np.ndarray, metric: str = "entropy", split: str = "all", edges_id: str = "nats96") -> Histogram:
    """The histogram of finite values, computed the plain way."""
    values = np.asarray(values, np.float32)
    cells = np.searchsorted(inner_edges(edges_id), values, side="right")
    wide = values.astype(np.float64)
    return Histogram(
        metric,
        split,
        edges_id,
        np.bincount(cells, minlength=n_cells(edges_id)).astype(np.int64),
        n=len(values),
        sum=float(wide.sum()),
        sumsq=float((wide**2).sum()),
        min=float(wide.min(initial=np.inf)),
        max=float(wide.max(initial=-np.inf)),
    )


def tokens(step: int, n_samples: int = N_SAMPLES) -> TokenTable:
    """Tokens whose entropy is skewed like a policy's: most near zero."""
    rng = np.random.default_rng(step)
    n = n_samples * N_POSITIONS
    entropy = (rng.exponential(0.5, n) * (rng.random(n) < 0.3)).astype(np.float32)
    return TokenTable(
        sample=np.repeat(np.arange(n_samples, dtype=np.int32), N_POSITIONS),
        position=np.tile(np.arange(N_POSITIONS, dtype=np.int32), n_samples),
        token_id=rng.integers(0, 100, n).astype(np.int32),
        logprob=-rng.exponential(0.3, n).astype(np.float32),
        entropy=entropy,
        renyi2=(entropy * 0.7).astype(np.float32),
        deviation=rng.random(n).astype(np.float32) * 0.5,
        alive=np.full(n, 8, np.int32),
        weight=(rng.random(n) < 0.1).astype(np.float32),
    )


def samples(step: int) -> SampleTable:
    index = np.arange(N_SAMPLES, dtype=np.int32)
    reward = (index % 3 == step % 3).astype(np.float32)
    return SampleTable(
        sample=index,
        group_id=index // 4,
        prompt_id=[f"p{i // 4}" for i in index],
        split=["train"] * N_SAMPLES,
        reward=reward,
        correct=reward >= 1,
        advantage=reward - reward.mean(),
        n_tokens=np.full(N_SAMPLES, N_POSITIONS, np.int32),
        truncated=np.zeros(N_SAMPLES, bool),
        prompt=["1+1="] * N_SAMPLES,
        completion=["2 é"] * N_SAMPLES,
        token_texts=[["2", " ", "é", *["."] * (N_POSITIONS - 3)]] * N_SAMPLES,
    )


def step_record(step: int) -> StepRecord:
    entropy = tokens(step).entropy
    scalars = {"reward": step / 100, "entropy": float(entropy.mean()), "tokens": float(N_TOKENS), "perf/step_s": 0.5}
    return StepRecord(step, scalars, (histogram(entropy), histogram(entropy[:50], split="selected")))


def record_run(store: Path, name: str = "a", steps: range = range(1, 11), **info: object) -> None:
    """A finished run of complete steps."""
    with Recorder(store, RunInfo(name, task="chain", **info), flush_s=0.0) as recorder:  # type: ignore[arg-type]
        for step in steps:
            recorder.record(step_record(step), tokens(step), samples(step))
            while recorder.queue_depth > 2:  # several segments, not one
                time.sleep(0.002)


class Scripted:
    """An engine that says at each step what it was told to: {step: [(rule, state, severity), ...]}."""

    def __init__(self, script: Mapping[int, list[tuple[str, str, str]]]) -> None:
        self.script = script

    def observe(self, step: int, scalars: Mapping[str, float]) -> list[Alert]:
        said = self.script.get(step, [])
        return [Alert(rule, how, state, step, step, 0.1, 1.0, 0.5, "low") for rule, state, how in said]  # type: ignore[arg-type]
