"""What answers cost on a big store: two runs, by default 100 million raw tokens in 10,000 steps, texts and histograms.

Two stores with the same steps: in one nothing is merged (a segment for each step and table), in the other the recorder
merges closed ranges while it records. Each question is asked of both in turn, and of the second one again when its runs
have ended and `compact_run` has merged what was left. Counts from raw tokens must equal those of the histograms.
A last part records the same steps with and without merging, in turn, and compares what the training thread waits for.

    nice python benchmarks/bench_store.py [--tokens 100e6] [--store DIR] [--out benchmarks/results/store.csv]
        4.5 GB in DIR and about a quarter of an hour for 100 million tokens
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
from bench_recorder import RESPONSE, SCALARS, histograms, samples, tokens
from harness import RESULTS, write_rows

from monitor.metrics import inner_edges, n_cells
from monitor.queries.distributions import count_matrix
from monitor.recorder import Recorder
from monitor.records import Histogram, RunInfo, StepRecord
from monitor.store import background
from monitor.store.compact import compact_run
from monitor.store.reader import open_store
from monitor.store.runs import list_runs
from monitor.store.schema import TABLES
from monitor.store.segments import list_segments
from monitor.store.tail import Tail

TOKENS = 10_240  # of a step
RUNS = ("uniform", "ict")
Row = dict[str, object]
Times = tuple[float, float]


def never(compactor: object) -> None:
    """`Compactor.wrote` where nothing is to be merged."""


class Made:
    """Some steps' tables, used again and again."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.tables = []
        for _ in range(4):
            table = tokens(rng, TOKENS)
            made = [one for one in histograms(rng, TOKENS) if (one.metric, one.split) != ("entropy", "all")]
            cells = np.searchsorted(inner_edges("nats96"), table.entropy, side="right")
            counts = np.bincount(cells, minlength=n_cells("nats96")).astype(np.int64)
            wide = table.entropy.astype(np.float64)
            made.append(
                Histogram("entropy", "all", "nats96", counts, TOKENS, 0, wide.sum(), (wide**2).sum(), 0.0, wide.max())
            )
            self.tables.append((table, samples(rng, TOKENS // RESPONSE), tuple(made)))
        self.scalars = {key: float(rng.random()) for key in SCALARS}

    def hand_over(self, recorder: Recorder, step: int) -> float:
        """Seconds that `record` took."""
        table, texts, hists = self.tables[step % 4]
        started = time.perf_counter()
        recorder.record(StepRecord(step, self.scalars, hists), table, texts)
        return time.perf_counter() - started


def fill(store: Path, made: Made, n_steps: int) -> tuple[float, int]:
    """Record all runs, a segment for each step; (seconds, most files at any moment)."""
    started, most = time.perf_counter(), 0
    for run in RUNS:
        with Recorder(store, RunInfo(run), flush_s=0.0) as recorder:
            for step in range(n_steps):
                made.hand_over(recorder, step)
                while recorder.queue_depth:
                    time.sleep(0.0005)
                if step % 50 == 0:
                    most = max(most, n_files(store, run))
    return time.perf_counter() - started, most


def n_files(store: Path, run: str) -> int:
    return sum(len(list_segments(store, run, table)) for table in TABLES)


def questions(step: int) -> dict[str, str]:
    run = RUNS[1]
    return {
        "entropy fan of a run, by SQL": f"FROM entropy_fan('{run}')",
        "two runs' series of one scalar": f"FROM compare('{RUNS[0]}', '{run}') WHERE name = 'entropy'",
        "one completion": f"FROM tokens_of('{run}', {step}, 7)",
        "the 100 most deviating tokens of a step": f"FROM tokens_at('{run}', {step}) ORDER BY deviation DESC LIMIT 100",
        "the 100 most deviating tokens of a run": f"FROM tokens WHERE run = '{run}' ORDER BY deviation DESC LIMIT 100",
        "mean entropy of each step, from raw tokens": "SELECT run, step, avg(entropy) FROM tokens GROUP BY run, step",
    }


def best_ms(ask: Callable[[], object], times: int) -> Times:
    """The shortest of some tries: on the clock, and of all threads' CPU time, which other work moves less."""
    took, cpu = [], []
    for _ in range(times):
        started, before = time.perf_counter(), time.process_time()
        ask()
        took.append(1e3 * (time.perf_counter() - started))
        cpu.append(1e3 * (time.process_time() - before))
        if sum(took) > 20e3:
            break
    return min(took), min(cpu)


def answers(store: Path, n_steps: int) -> dict[str, Times]:
    """Milliseconds of every question, the shortest of some tries: {question: (on the clock, of CPU time)}."""
    found = {}
    tail = Tail(store)
    found["first look of the dashboard"] = best_ms(tail.poll, 1)
    con = tail.cursor()
    found["entropy fan and deviation map of a run, in the dashboard"] = best_ms(
        lambda: [count_matrix(con, RUNS[1], metric) for metric in ("entropy", "deviation")], 5
    )
    tail.close()
    found["`rlvr ls`"] = best_ms(lambda: list_runs(store), 3)
    with open_store(store) as opened:
        for number, (question, query) in enumerate(questions(n_steps // 2).items()):
            if not number:
                opened.sql(query)  # checks the files
            found[question] = best_ms(lambda query=query: opened.sql(query), 5)
    native = duckdb.connect(str(store / "store.duckdb"), read_only=True)
    for question, query in questions(n_steps // 2).items():
        found[f"{question} (any DuckDB client)"] = best_ms(lambda query=query: native.execute(query).fetchall(), 3)
    native.close()
    return found


def miscounted(store: Path) -> int:
    """Steps whose number of raw tokens is not that of their histogram."""
    with open_store(store) as opened:
        return len(
            opened.sql(
                "SELECT 1 FROM (SELECT run, step, count(*) AS n FROM tokens GROUP BY run, step) t FULL JOIN "
                "(SELECT run, step, n FROM histograms WHERE metric = 'entropy' AND split = 'all') h USING (run, step) "
                "WHERE h.n IS DISTINCT FROM t.n"
            ).rows
        )


def waits(folder: Path, made: Made, n_steps: int) -> list[Row]:
    """What `record` takes with and without merging, in turn: its quantiles over all steps of four runs each."""
    calls: dict[bool, list[float]] = {True: [], False: []}
    durable: dict[bool, list[float]] = {True: [], False: []}
    merge = background.Compactor.wrote
    for number in range(8):
        merging = number % 2 == 0
        background.Compactor.wrote = merge if merging else never  # type: ignore[method-assign,assignment]
        with Recorder(folder, RunInfo(f"r{number}"), flush_s=0.0) as recorder:
            for step in range(n_steps):
                calls[merging].append(made.hand_over(recorder, step))
                started = time.perf_counter()
                while recorder.acknowledged != step and time.perf_counter() - started < 30:
                    time.sleep(0.0005)
                durable[merging].append(time.perf_counter() - started)
                time.sleep(0.01)
    background.Compactor.wrote = merge  # type: ignore[method-assign]
    rows: list[Row] = []
    for what, took, scale in (("record(), us", calls, 1e6), ("until durable, ms", durable, 1e3)):
        for share in (0.5, 0.99):
            alone, merging_too = (float(np.quantile(took[merging], share)) * scale for merging in (False, True))
            rows.append(
                {
                    "what": what,
                    "quantile": share,
                    "without": round(alone, 1),
                    "merging": round(merging_too, 1),
                    "ratio": round(merging_too / alone, 3),
                    "steps": 4 * n_steps,
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=float, default=100e6, help="raw tokens of both runs together")
    parser.add_argument("--steps", type=int, default=300, help="of each of the eight runs that compare record()")
    parser.add_argument("--store", type=Path, help="folder on the disk to measure (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS / "store.csv")
    args = parser.parse_args()
    logging.getLogger("rlvr.monitor").setLevel(logging.ERROR)
    made, n_steps = Made(), max(64, round(args.tokens / TOKENS / len(RUNS)))
    packages = ("duckdb", "numpy", "pyarrow")
    with tempfile.TemporaryDirectory(dir=args.store) as name:
        folder = Path(name)
        write_rows(args.out.with_name("store_waits.csv"), waits(folder / "waits", made, args.steps), packages)
        shutil.rmtree(folder / "waits")
        merge = background.Compactor.wrote
        background.Compactor.wrote = never  # type: ignore[method-assign,assignment]
        plain_s, plain_files = fill(folder / "plain", made, n_steps)
        background.Compactor.wrote = merge  # type: ignore[method-assign]
        merged_s, merged_files = fill(folder / "merged", made, n_steps)
        print(f"recorded in {plain_s:.0f} s and {merged_s:.0f} s", flush=True)
        for state in list_runs(folder / "merged"):
            print(state.name, n_files(folder / "merged", state.name), "files", flush=True)
        apart, closed = answers(folder / "plain", n_steps), answers(folder / "merged", n_steps)
        started = time.perf_counter()
        for run in RUNS:
            compact_run(folder / "merged", run)
        compaction_s = time.perf_counter() - started
        started = time.perf_counter()
        for run in RUNS:
            compact_run(folder / "merged", run)
        again_s = time.perf_counter() - started
        ended = answers(folder / "merged", n_steps)
        wrong = miscounted(folder / "plain") + miscounted(folder / "merged")
    n_tokens = len(RUNS) * n_steps * TOKENS
    rows: list[Row] = []

    def add(question: str, unit: str, a: float, b: float, c: float, cpu: float | str = "") -> None:
        rows.append(
            {
                "tokens": n_tokens,
                "question": question,
                "unit": unit,
                "apart": round(a, 2),
                "merged": round(b, 2),
                "ended": round(c, 2),
                "ended_cpu": cpu and round(float(cpu), 2),
                "ratio": round(a / b, 2) if b else "",
            }
        )
        print(rows[-1], flush=True)

    for question in apart:
        add(question, "ms", apart[question][0], closed[question][0], *ended[question])
    add("most files of a run at any moment", "files", plain_files, merged_files, merged_files)
    add("recording both runs", "s", plain_s, merged_s, merged_s)
    add("`rlvr store compact` at the end, then once more (last column)", "s", compaction_s, compaction_s, again_s)
    add("steps with another count than their histogram", "steps", wrong, wrong, wrong)
    write_rows(args.out, rows, packages)
    if wrong:
        raise SystemExit("Counts differ.")


if __name__ == "__main__":
    main()
