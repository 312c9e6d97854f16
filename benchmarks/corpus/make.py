"""Trains the corpus of real runs: python -m benchmarks.corpus.make --work FOLDER [--first 0 --runs 320 --jobs 1]

Every run is one of our own trainer (trainer/train.py) on a small built-in policy, about a minute of one core. A run
that FOLDER or sample_runs/corpus already holds is not trained again, so the script can be stopped and started at will.
Runs are taken in the order of their numbers, so that both parts grow together. `python -m benchmarks.corpus.pack` adds
the runs of FOLDER to sample_runs/corpus.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.corpus.grid import RUNS, corpus_run
from benchmarks.corpus.load import packed_names
from benchmarks.harness import provenance
from monitor.recorder import Recorder
from monitor.records import StepRecord

HISTOGRAMS = (("entropy", "all"), ("entropy", "selected"), ("deviation", "all"))


class MemoryRecorder:
    """Takes the place of the Recorder, for `train` alone: keeps the steps in memory."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def record(self, record: StepRecord, **tables: Any) -> None:
        self.records.append(record)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        yield


def train_run(number: int, work: Path) -> str:
    """Trains one run and writes FOLDER/<name>.npz; returns a line that says how it went."""
    from trainer.errors import NonFiniteError
    from trainer.runtime.build import prepare
    from trainer.train import train

    run, recorder, began, error = corpus_run(number), MemoryRecorder(), time.perf_counter(), ""
    parts = prepare(run.config)
    try:
        train(parts, cast(Recorder, recorder))
    except NonFiniteError as failed:
        error = str(failed)
    seconds = time.perf_counter() - began
    about = {
        "name": run.name, "number": number, "part": run.part, "error": error, "seconds": round(seconds, 1),
        "config": run.config.model_dump(mode="json"), **provenance(("torch", "transformers")),
    }  # fmt: skip
    arrays = series(recorder.records) | histograms(recorder.records)
    partial = work / f"{run.name}.tmp"
    with partial.open("wb") as file:
        np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]
    partial.rename(work / f"{run.name}.npz")
    last = recorder.records[-1].scalars if recorder.records else {}
    return f"{run.name} {seconds:.0f} s, reward {last.get('reward', float('nan')):.3f} {error}"


def series(records: list[StepRecord]) -> dict[str, np.ndarray]:
    """Columns float64 [steps], nan where a step has no value; times of the machine are left out."""
    keys = sorted({key for record in records for key in record.scalars if not key.startswith("perf/")})
    columns = {key: np.array([float(record.scalars.get(key, np.nan)) for record in records]) for key in keys}
    return {"step": np.array([record.step for record in records])} | columns


def histograms(records: list[StepRecord]) -> dict[str, np.ndarray]:
    """Counts int32 [steps, cells] of HISTOGRAMS under "counts/<metric>/<split>"; zeros where a step has none."""
    found = {}
    for metric, split in HISTOGRAMS:
        rows = [
            next((h.counts for h in record.histograms if (h.metric, h.split) == (metric, split)), None)
            for record in records
        ]
        cells = next((len(row) for row in rows if row is not None), 0)
        found[f"counts/{metric}/{split}"] = np.array(
            [np.zeros(cells, np.int32) if row is None else row for row in rows], np.int32
        )
    return found


def _work(job: tuple[int, Path]) -> str:
    import torch

    torch.set_num_threads(1)
    return train_run(*job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the finished runs")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    numbers = range(options.first, options.first + options.runs)
    there = packed_names() | {path.stem for path in options.work.glob("c*.npz")}
    missing = [(n, options.work) for n in numbers if corpus_run(n).name not in there]
    print(f"{len(missing)} runs to train, {len(numbers) - len(missing)} are there.", flush=True)
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=40) as pool:
        for line in pool.imap(_work, missing):
            print(line, flush=True)


if __name__ == "__main__":
    main()
