"""Seconds per training step: with the demo's settings, and the share of recording; then ours and TRL 1.16's.

    python benchmarks/bench_step.py

step.csv: medians over the steps after warm-up of a run of the demo's settings without evaluation, one CPU thread, one
process at a time; "record_s" is the time that recording took from the training thread (statistics, host copy, texts,
hand-over).
step_trl.csv: medians for the arms of against_trl.py, which take turns in one process. The time is CPU time of all
threads, one of which computes tensors, so the recorder's writer counts too. The columns "against" are medians of ratios
within a turn. Memory is measured in a process for each arm.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from against_trl import WORK, peak_mib, timings
from harness import RESULTS, no_options, write_rows

from monitor.cli import main as rlvr
from monitor.store.reader import open_store

PRESET = Path(__file__).parent.parent / "trainer" / "presets" / "demo.toml"
QUERY = """SELECT name, median(value) FROM steps WHERE run = ? AND step > 8 AND (name IN ('response_length', 'tokens')
    OR (name LIKE 'perf/%' AND name NOT IN ('perf/queue', 'perf/memory_gib'))) GROUP BY name"""
# updates on stored rollouts, whole steps; the first of each warms up
TURNS = {"builtin": (13, 7), "smollm2-135m": (5, 2)}


def recording() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("uniform", "ict", "random"):
            options = ["--weighting.kind", kind, "--run", kind, "--store", folder, "--steps", "30", "--eval.every", "0"]
            if rlvr(["train", str(PRESET), *options]) != 0:
                raise SystemExit(f"{kind} did not finish")
        with open_store(folder) as store:
            for kind in ("uniform", "ict", "random"):
                found = {str(name): float(value) for name, value in store.sql(QUERY, [kind]).rows}
                share = found["perf/record_s"] / found["perf/step_s"]
                state = store.run(kind)
                tokens = store.sql("SELECT count(*) FROM tokens WHERE run = ?", [kind]).rows[0][0]
                size = {"store_bytes": state.bytes, "tokens_recorded": tokens, "bytes_per_token": state.bytes / tokens}
                rows.append(
                    {"weighting": kind, "recording_share": round(share, 4)}
                    | {key.removeprefix("perf/"): round(value, 4) for key, value in sorted(found.items())}
                    | {key: round(value, 2) for key, value in size.items()}
                )
    write_rows(RESULTS / "step.csv", rows, ("torch", "transformers"))


def ratio(mine: list[float], theirs: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)), 3)


def comparison() -> None:
    rows = []
    for model in WORK:
        found = timings(model, *TURNS[model])
        for times in found.values():
            times["trained_s"] = [a + b for a, b in zip(times["update_s"], times["record_s"], strict=True)]
        for arm, times in found.items():
            each = {key: statistics.median(values) for key, values in times.items()}
            command = [sys.executable, __file__, model, arm]
            child = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(
                {"model": model, "arm": arm, "rollouts": WORK[model]["rollout"]["prompts"]
                 * WORK[model]["rollout"]["group_size"], "response_tokens": round(each["tokens"])}
                | {key: round(each[key], 4) for key in ("update_s", "record_s", "step_s")}
                | {"update_against_uniform": ratio(times["update_s"], found["uniform"]["update_s"])}
                | {f"{key}_against_trl": ratio(times[f"{key}_s"], found["trl"][f"{key}_s"])
                   for key in ("update", "trained", "step")}
                | {"peak_mib": round(float(child.stdout.split()[-1])), "threads": torch.get_num_threads()}
            )  # fmt: skip
    name = "gpu_step.csv" if torch.cuda.is_available() else "step_trl.csv"
    write_rows(RESULTS / name, rows, ("torch", "transformers", "trl"))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(peak_mib(sys.argv[1], sys.argv[2]))
    else:
        no_options(__doc__)
        recording()
        comparison()
