"""Bytes that a raw token takes, by column, exact and with a rounded mantissa.

Simulated tokens (bench_recorder.py) and real ones, of the runs in sample_runs/, whose vocabulary has 19 tokens. Each
set is recorded as it would be while training, a segment for each step, and then merged. "error": the largest of a
rounded value, as a share of it.

    python benchmarks/bench_bytes.py [--store DIR] [--out benchmarks/results/bytes.csv]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import duckdb
import numpy as np
from bench_recorder import tokens
from harness import RESULTS, write_rows

from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord, TokenTable
from monitor.store.compact import compact_run
from monitor.store.reader import open_store
from monitor.store.rows import ROUNDED, round_mantissa
from monitor.store.segments import list_segments

BITS = (None, 15, 10, 8, 7)
SAMPLE_RUNS = RESULTS.parents[1] / "sample_runs"
COLUMNS = ("token_id", *ROUNDED, "weight")


def simulated(n_tokens: int, n_steps: int) -> list[TokenTable]:
    rng = np.random.default_rng(0)
    return [tokens(rng, n_tokens) for _ in range(n_steps)]


def recorded() -> list[TokenTable]:
    """The steps of the sample runs that have raw tokens."""
    names = [spec.name for spec in fields(TokenTable)]
    with open_store(SAMPLE_RUNS) as store:
        frame = store.sql(
            f"SELECT run, step, {', '.join(names)} FROM tokens ORDER BY run, step, sample, position"
        ).frame()
    changes = np.flatnonzero((frame["step"][1:] != frame["step"][:-1]) | (frame["run"][1:] != frame["run"][:-1])) + 1
    parts = {name: np.split(frame[name], changes) for name in names}
    return [TokenTable(*(parts[name][index] for name in names)) for index in range(len(changes) + 1)]


def measure(store: Path, source: str, steps: Sequence[TokenTable], bits: int | None) -> dict[str, object]:
    run, n = f"{source.replace(' ', '-')}-{len(steps[0])}-{bits}", sum(map(len, steps))
    with Recorder(store, RunInfo(run), flush_s=0.0, mantissa_bits=bits) as recorder:
        for step, table in enumerate(steps):
            recorder.record(StepRecord(step, {"reward": 0.5}), table)
            recorder.flush()
    apart = sum(path.stat().st_size for _, path in list_segments(store, run, "tokens")) / n
    compact_run(store, run, grace_s=0.0)
    paths = [str(path) for _, path in list_segments(store, run, "tokens")]
    merged = sum(Path(path).stat().st_size for path in paths) / n
    sizes = duckdb.execute(
        "SELECT path_in_schema, sum(total_compressed_size) FROM parquet_metadata(?) GROUP BY ALL", [paths]
    ).fetchall()
    by_column = {name: float(size) / n for name, size in sizes}
    error = 0.0
    for name in ROUNDED if bits else ():
        values = np.concatenate([getattr(table, name) for table in steps]).astype(np.float32)
        values = values[values != 0]
        near = round_mantissa(values, bits or 0).astype(np.float64)
        error = max(error, float((np.abs(near - values) / np.abs(values)).max()))
    return {
        "tokens": source,
        "tokens_per_step": round(n / len(steps)),
        "steps": len(steps),
        "mantissa_bits": bits or 23,
        "bytes_apart": round(apart, 2),
        "bytes_merged": round(merged, 2),
        **{name: round(by_column[name], 2) for name in COLUMNS},
        "rest": round(merged - sum(by_column[name] for name in COLUMNS), 2),
        "error": f"{error:.2g}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, help="folder on the disk to measure (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS / "bytes.csv")
    args = parser.parse_args()
    rows = []
    sources = (
        ("simulated", simulated(8_192, 40)),
        ("simulated", simulated(65_536, 8)),
        ("sample runs", recorded()),
    )
    with tempfile.TemporaryDirectory(dir=args.store) as folder:
        for source, steps in sources:
            for bits in BITS:
                rows.append(measure(Path(folder), source, steps, bits))
                print(rows[-1], flush=True)
    write_rows(args.out, rows, ("duckdb", "numpy", "pyarrow"))


if __name__ == "__main__":
    main()
