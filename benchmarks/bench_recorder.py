"""What recording costs: the training thread's time in record(), time until a step is durable, throughput, bytes.

Tokens are simulated with the shape of a trained policy's (most entropies near zero, token ids by Zipf's law, weights 0
or 1); texts and 28 histograms and 30 scalars a step go with them. Everything is fsynced, on the disk of --store. A
second file, recorder_fsync.csv, compares the policies of fsync, in turn: the ratios are to "every-step".

    python benchmarks/bench_recorder.py [--store DIR] [--out benchmarks/results/recorder.csv]
"""

from __future__ import annotations

import argparse
import lzma
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
from harness import RESULTS, write_rows

from monitor.metrics import METRICS, SPLITS, n_cells
from monitor.recorder import Recorder
from monitor.records import Histogram, RunInfo, SampleTable, StepRecord, TokenTable
from monitor.store.schema import TABLES
from monitor.store.segments import list_segments
from monitor.store.writer import Fsync

RESPONSE = 256  # tokens of a response
SCALARS = [key for key in METRICS if "*" not in key][:30]
# tokens a step, steps, s between steps. Below 64 steps nothing is merged, which would pack the four tables that repeat.
SIZES = ((8_192, 60, 0.05), (65_536, 60, 0.10), (524_288, 20, 0.50))
FEW = (65_536, 300, 0.02)  # the payload of the target for record(): with 12 scalars and 4 histograms; some is merged


def tokens(rng: np.random.Generator, n: int) -> TokenTable:
    """Tokens of n / RESPONSE responses."""
    entropy = np.where(rng.random(n) < 0.75, rng.lognormal(-6, 2, n), rng.exponential(0.8, n)).astype(np.float32)
    deviation = (np.minimum(entropy, 1) * rng.random(n) * 0.3).astype(np.float32)
    return TokenTable(
        sample=np.repeat(np.arange(n // RESPONSE, dtype=np.int32), RESPONSE),
        position=np.tile(np.arange(RESPONSE, dtype=np.int32), n // RESPONSE),
        token_id=np.minimum(rng.zipf(1.3, n), 150_000).astype(np.int32),
        logprob=-(entropy * rng.exponential(1.0, n)).astype(np.float32),
        entropy=entropy,
        renyi2=(entropy * rng.uniform(0.5, 1.0, n)).astype(np.float32),
        deviation=deviation,
        alive=np.full(n, 8, np.int32),
        weight=(deviation > np.quantile(deviation, 0.9)).astype(np.float32),
    )


def samples(rng: np.random.Generator, n: int) -> SampleTable:
    """The n rollouts of a step with texts of random letters."""
    words = np.array(["".join(chr(97 + c) for c in rng.integers(0, 26, 4)) for _ in range(500)])
    index, reward = np.arange(n, dtype=np.int32), rng.integers(0, 2, n).astype(np.float32)
    texts = [words[rng.integers(0, 500, RESPONSE)].tolist() for _ in range(n)]
    return SampleTable(
        sample=index,
        group_id=index // 8,
        prompt_id=[f"p{i // 8}" for i in range(n)],
        split=["train"] * n,
        reward=reward,
        correct=reward > 0,
        advantage=reward - reward.mean(),
        n_tokens=np.full(n, RESPONSE, np.int32),
        truncated=np.zeros(n, bool),
        prompt=["What is the sum of these numbers?"] * n,
        completion=["".join(text) for text in texts],
        token_texts=texts,
    )


def histograms(rng: np.random.Generator, n: int) -> tuple[Histogram, ...]:
    keyed = [(key, metric.edges) for key, metric in METRICS.items() if metric.edges]
    made = []
    for key, edges_id in keyed:
        for split in SPLITS if "*" not in key else ("all",):
            counts = rng.poisson(n / n_cells(edges_id), n_cells(edges_id)).astype(np.int64)
            made.append(Histogram(key, split, edges_id, counts, int(counts.sum()), 0, 1.0, 1.0, 0.0, 1.0))
    return tuple(made)


def packed_bytes(table: TokenTable) -> float:
    """Bytes a row where each column's byte planes, sorted by significance, are packed by xz."""
    columns = [np.ascontiguousarray(getattr(table, field.name)) for field in fields(table)]
    planes = [np.ascontiguousarray(column.view(np.uint8).reshape(len(table), -1).T) for column in columns]
    return sum(len(lzma.compress(plane.tobytes())) for plane in planes) / len(table)


def measure(
    store: Path,
    n_tokens: int,
    n_steps: int,
    pause_s: float,
    with_texts: bool,
    n_scalars: int | None = None,
    n_histograms: int | None = None,
) -> dict[str, object]:
    """One row: steps handed over every pause_s, then the same steps as fast as the writer takes them."""
    rng = np.random.default_rng(0)
    made = [
        (tokens(rng, n_tokens), samples(rng, n_tokens // RESPONSE), histograms(rng, n_tokens)[:n_histograms])
        for _ in range(4)
    ]
    scalars = {key: float(rng.random()) for key in SCALARS[:n_scalars]}

    def hand_over(recorder: Recorder, step: int) -> float:
        table, texts, hists = made[step % 4]
        started = time.perf_counter()
        recorder.record(StepRecord(step, scalars, hists), table, texts if with_texts else None)
        return time.perf_counter() - started

    calls, durable, name = [], [], f"paced-{n_tokens}-{with_texts}-{len(scalars)}"
    with Recorder(store, RunInfo(name), flush_s=0.0) as recorder:
        for step in range(n_steps):
            calls.append(hand_over(recorder, step))
            started = time.perf_counter()
            while recorder.acknowledged != step and time.perf_counter() - started < 30:
                time.sleep(0.0005)
            durable.append(time.perf_counter() - started)
            time.sleep(max(0.0, pause_s - durable[-1]))
    n_bytes = {table: sum(path.stat().st_size for _, path in list_segments(store, name, table)) for table in TABLES}
    started = time.perf_counter()
    with Recorder(
        store, RunInfo(f"burst-{n_tokens}-{with_texts}-{len(scalars)}"), queue_steps=4 * n_steps, flush_s=0.0
    ) as recorder:
        for step in range(n_steps):
            hand_over(recorder, step)
    burst = time.perf_counter() - started
    return {
        "tokens_per_step": n_tokens,
        "steps": n_steps,
        "texts": with_texts,
        "scalars": len(scalars),
        "histograms": len(made[0][2]),
        "record_p50_us": round(float(np.quantile(calls, 0.5)) * 1e6, 1),
        "record_p99_us": round(float(np.quantile(calls, 0.99)) * 1e6, 1),
        "durable_p50_ms": round(float(np.quantile(durable, 0.5)) * 1e3, 1),
        "durable_p99_ms": round(float(np.quantile(durable, 0.99)) * 1e3, 1),
        "writer_tokens_per_s": round(n_tokens * n_steps / burst),
        "bytes_per_token": round(n_bytes["tokens"] / n_tokens / n_steps, 2),
        "packed_bytes_per_token": round(packed_bytes(made[0][0]), 2),
        "text_bytes_per_token": round(n_bytes["samples"] / n_tokens / n_steps, 2),
        "histogram_bytes_per_step": round(n_bytes["histograms"] / n_steps),
        "scalar_bytes_per_step": round(n_bytes["steps"] / n_steps),
    }


def policies(store: Path, n_tokens: int = 8_192, n_steps: int = 60, rounds: int = 5) -> list[dict[str, object]]:
    """A row for each policy of fsync: steps that are waited for, then as many as fast as the writer takes them."""
    rng = np.random.default_rng(0)
    table, texts, hists = tokens(rng, n_tokens), samples(rng, n_tokens // RESPONSE), histograms(rng, n_tokens)
    scalars = {key: float(rng.random()) for key in SCALARS}
    acknowledged: dict[str, list[float]] = {policy: [] for policy in get_args(Fsync)}
    burst = dict.fromkeys(get_args(Fsync), 0.0)
    for number in range(rounds):
        for policy in get_args(Fsync):
            with Recorder(store, RunInfo(f"{policy}-{number}"), flush_s=0.0, fsync=policy) as recorder:
                for step in range(n_steps):
                    started = time.perf_counter()
                    recorder.record(StepRecord(step, scalars, hists), table, texts)
                    while recorder.acknowledged != step:
                        time.sleep(0.0002)
                    acknowledged[policy].append(time.perf_counter() - started)
            started = time.perf_counter()
            with Recorder(store, RunInfo(f"{policy}-{number}-fast"), flush_s=0.0, fsync=policy) as recorder:
                for step in range(n_steps):
                    recorder.record(StepRecord(step, scalars, hists), table, texts)
                    recorder.flush()
            burst[policy] += time.perf_counter() - started
    first, *_ = get_args(Fsync)
    made: list[dict[str, object]] = []
    for policy in get_args(Fsync):
        middle, late = (float(np.quantile(acknowledged[policy], share)) for share in (0.5, 0.99))
        made.append(
            {
                "fsync": policy,
                "tokens_per_step": n_tokens,
                "steps": rounds * n_steps,
                "acknowledged_p50_ms": round(1e3 * middle, 1),
                "acknowledged_p99_ms": round(1e3 * late, 1),
                "p50_ratio": round(middle / float(np.median(acknowledged[first])), 3),
                "p99_ratio": round(late / float(np.quantile(acknowledged[first], 0.99)), 3),
                "steps_per_s": round(rounds * n_steps / burst[policy], 1),
                "steps_per_s_ratio": round(burst[first] / burst[policy], 3),
            }
        )
        print(made[-1])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--store", type=Path, help="folder on the disk to measure (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS / "recorder.csv")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.store) as folder:
        rows.append(measure(Path(folder), *FEW, False, 12, 4))
        print(rows[-1])
        for with_texts in (False, True):
            for n_tokens, n_steps, pause_s in SIZES:
                rows.append(measure(Path(folder), n_tokens, n_steps, pause_s, with_texts))
                print(rows[-1])
        compared = policies(Path(folder))
    packages = ("duckdb", "numpy", "pyarrow")
    write_rows(args.out, rows, packages)
    write_rows(args.out.with_name("recorder_fsync.csv"), compared, packages)


if __name__ == "__main__":
    main()
