"""Runs recorded through the Recorder with values of a simulated policy: for tests of the dashboard only."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monitor.metrics import inner_edges, n_cells
from monitor.recorder import Recorder
from monitor.records import Alert, Histogram, RunInfo, SampleTable, StepRecord, TokenTable

GROUPS, ROLLOUTS, LENGTH = 2, 4, 24
WORDS = ["12", " +", " 7", " =", " 19", "\n", "so", " the", " answer", " is", " <b>", "&amp;", "é", " 数"]
EVIL = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"


def histogram(metric: str, split: str, edges_id: str, values: np.ndarray) -> Histogram:
    cells = np.searchsorted(inner_edges(edges_id), values.astype(np.float32), side="right")
    counts = np.bincount(cells, minlength=n_cells(edges_id)).astype(np.int64)
    if not len(values):
        return Histogram(metric, split, edges_id, counts, 0)
    return Histogram(metric, split, edges_id, counts, len(values), 0, float(values.sum()), float((values**2).sum()),
                     float(values.min()), float(values.max()))  # fmt: skip


def joint(entropy: np.ndarray, deviation: np.ndarray) -> Histogram:
    a = np.searchsorted(inner_edges("nats24"), entropy.astype(np.float32), side="right")
    b = np.searchsorted(inner_edges("deviation24"), deviation.astype(np.float32), side="right")
    counts = np.bincount(a * n_cells("deviation24") + b, minlength=n_cells("nats24*deviation24")).astype(np.int64)
    return Histogram("entropy*deviation", "all", "nats24*deviation24", counts, len(entropy))


def step(number: int, *, weighting: str, seed: int, total: int) -> tuple[StepRecord, TokenTable, SampleTable]:
    """Step `number` of `total`: entropy falls, faster under uniform weighting; reward rises; 10 % are selected."""
    rng = np.random.default_rng([seed, number, len(weighting)])
    n = GROUPS * ROLLOUTS * LENGTH
    done = number / total
    level = 1.2 * np.exp(-(2.5 if weighting == "uniform" else 1.0) * done)
    entropy = np.where(rng.random(n) < 0.6, rng.exponential(0.003, n), rng.exponential(level, n)).astype(np.float32)
    renyi2 = (entropy * 0.8).astype(np.float32)
    deviation = np.minimum(rng.exponential(0.01 + 0.06 * entropy), 0.38).astype(np.float32)
    deviation[::LENGTH] = 0.0
    weight = np.ones(n, np.float32)
    if weighting != "uniform":
        kept = np.argsort(-deviation.reshape(-1, LENGTH), axis=1)[:, :3]
        weight = np.zeros((GROUPS * ROLLOUTS, LENGTH), np.float32)
        np.put_along_axis(weight, kept, 1.0, axis=1)
        weight = weight.reshape(-1)
    chosen = weight > 0
    correct = rng.random(GROUPS * ROLLOUTS) < 0.25 + 0.5 * done
    histograms = tuple(
        histogram(key, split, edges, values[mask])
        for key, edges, values in (("entropy", "nats96", entropy), ("renyi2", "nats96", renyi2),
                                   ("deviation", "deviation96", deviation))
        for split, mask in (("all", np.ones(n, bool)), ("selected", chosen))
    )  # fmt: skip
    record = StepRecord(number, _scalars(rng, number, total, entropy, renyi2, deviation, weight, correct),
                        (*histograms, joint(entropy, deviation)))  # fmt: skip
    return record, _tokens(rng, n, entropy, renyi2, deviation, weight), _samples(rng, number, correct)


def _scalars(rng, number, total, entropy, renyi2, deviation, weight, correct) -> dict[str, float]:
    chosen, done = weight > 0, number / total
    scalars = {
        "reward": float(correct.mean()), "correct_share": float(correct.mean()), "entropy": float(entropy.mean()),
        "renyi2": float(renyi2.mean()), "deviation": float(deviation.mean()), "weight_mean": float(weight.mean()),
        "kl": 0.02 * done + 0.002 * rng.random(), "log_ratio_abs": 0.01 * rng.random(),
        "response_length": LENGTH + 2 * rng.random(), "clip_share_low": 0.01 * rng.random(),
        "clip_share_high": 0.02 * rng.random(), "grad_norm": float(np.exp(rng.normal(-0.5, 0.4))),
        "zero_variance_share": 0.1 + 0.3 * done * rng.random(), "truncated_share": 0.02 * rng.random(),
        "selected_share": float(chosen.mean()), "selected_decided_share": float((entropy[chosen] < 0.05).mean()),
        "decided_share": float((entropy < 0.05).mean()), "perf/step_s": 0.4, "loss": float(rng.normal(0, 0.02)),
    }  # fmt: skip
    if number % 10 == 0:
        scalars |= {"eval/heldout/pass@1": 0.25 + 0.4 * done + 0.02 * rng.random(),
                    "eval/heldout/pass@4": 0.55 + 0.2 * done, "eval/heldout/distinct": 3.0 - 1.5 * done}  # fmt: skip
    return scalars


def _tokens(rng, n, entropy, renyi2, deviation, weight) -> TokenTable:
    return TokenTable(
        sample=np.repeat(np.arange(GROUPS * ROLLOUTS, dtype=np.int32), LENGTH),
        position=np.tile(np.arange(LENGTH, dtype=np.int32), GROUPS * ROLLOUTS),
        token_id=rng.integers(0, len(WORDS), n).astype(np.int32),
        logprob=-rng.exponential(entropy + 1e-4).astype(np.float32), entropy=entropy, renyi2=renyi2,
        deviation=deviation, alive=np.full(n, ROLLOUTS, np.int32), weight=weight,
    )  # fmt: skip


def _samples(rng, number: int, correct: np.ndarray) -> SampleTable:
    n = GROUPS * ROLLOUTS
    texts = [[WORDS[i] for i in rng.integers(0, len(WORDS), LENGTH)] for _ in range(n)]
    texts[0][3] = EVIL
    return SampleTable(
        sample=np.arange(n, dtype=np.int32), group_id=np.repeat(np.arange(GROUPS, dtype=np.int32), ROLLOUTS),
        prompt_id=[f"p{number}-{i // ROLLOUTS}" for i in range(n)], split=["train"] * n,
        reward=correct.astype(np.float32), correct=correct, advantage=(correct - correct.mean()).astype(np.float32),
        n_tokens=np.full(n, LENGTH, np.int32), truncated=np.zeros(n, bool),
        prompt=[f"What is {number} + {i // ROLLOUTS}? {EVIL}" for i in range(n)],
        completion=["".join(text) for text in texts], token_texts=texts,
    )  # fmt: skip


class OneAlert:
    """An engine that fires once and resolves once."""

    def __init__(self, fire: int, resolve: int | None) -> None:
        self.fire, self.resolve = fire, resolve

    def observe(self, step: int, scalars) -> list[Alert]:
        if step not in (self.fire, self.resolve):
            return []
        state = "firing" if step == self.fire else "resolved"
        return [Alert("entropy_collapse", "critical", state, step, self.fire, 0.21, 0.9, 0.27,
                      "Entropy fell to 23 % of its baseline while the reward stood still.",
                      "Raise weighting.keep or lower optim.lr; see the tokens of this step.")]  # fmt: skip


def info(name: str, weighting: str, seed: int, total: int) -> RunInfo:
    config = {"steps": total, "seed": seed, "weighting": {"kind": weighting, "keep": 0.1}, "optim": {"lr": 1e-3}}
    return RunInfo(name=name, model="builtin", task="chain", weighting=weighting, seed=seed, comparison="demo-1",
                   warmup_steps=5, config=config)  # fmt: skip


def record_run(
    store: Path, name: str, weighting: str, *, seed: int = 0, steps: int = 40, fire: int | None = None,
    resolve: int | None = None, flush_s: float = 0.2,
) -> None:  # fmt: skip
    """A finished run of `steps` steps."""
    engine = OneAlert(fire, resolve) if fire is not None else None
    with Recorder(
        store, info(name, weighting, seed, steps), engine=engine, flush_s=flush_s, queue_steps=4096
    ) as recorder:
        for number in range(1, steps + 1):
            record, tokens, samples = step(number, weighting=weighting, seed=seed, total=steps)
            recorder.record(record, tokens, samples)
        recorder.event("checkpoint", f"Saved at step {steps}.", steps)
