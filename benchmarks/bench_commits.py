"""What a change of the code did to training a real language model: an older commit and this checkout, in turn.

Each run is `rlvr train smollm2-chain-sum` of a few steps in a process of its own, in a worktree of the older commit or
here, with the same options, seed and environment. Written are: response tokens a second (median over the steps after
the first), CPU seconds a response token of the whole process, less its start (a run of one step), and the largest
resident size. Turns alternate, so that a noisy machine meets both alike. The older code draws other rollouts where
sampling has changed since, so the figures are per token.

    rlvr fetch smollm2-135m                                         # once
    python -m benchmarks.bench_commits [--before COMMIT] [--turns 2]  # writes commits.csv
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import RESULTS, write_rows
from monitor.store.reader import open_store

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "060a2e9"  # the last one without passes by tokens, one pass on-policy, and samplers that hold no memory
OPTIONS = (
    "train", "smollm2-chain-sum", "--rollout.prompts", "2", "--rollout.group-size", "8", "--optim.micro-batch", "8",
    "--eval.every", "0", "--checkpoint.every", "0", "--threads", "1", "--seed", "0",
)  # fmt: skip


def run(checkout: Path, store: Path, name: str, steps: int) -> dict[str, float]:
    """Train in the checkout; {tokens, tokens_per_s, cpu_s, peak_mib} of the process."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "monitor.cli", *OPTIONS, "--steps", str(steps), "--run", name]
    with open(store / f"{name}.log", "w") as log:
        child = subprocess.Popen(
            [*command, "--store", str(store)], cwd=checkout, env=environment, stdout=log, stderr=log
        )
        _, code, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(code)
    if child.returncode:
        raise SystemExit(f"{name} ended with {child.returncode}; its output is in {log.name}")
    with open_store(store) as opened:
        query = "SELECT value FROM steps WHERE run = ? AND name = ? ORDER BY step"
        lengths = [value for (value,) in opened.sql(query, [name, "response_length"]).rows]
        speeds = [value for (value,) in opened.sql(query, [name, "perf/tokens_per_s"]).rows]
    rollouts = 16  # of OPTIONS
    return {
        "tokens": sum(lengths) * rollouts,
        "tokens_per_s": float(np.median(speeds[1:] or speeds)),
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
    }


def row(code: str, runs: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """Medians over the turns; each is a pair of a run of one step and one of all."""
    cost = [(long["cpu_s"] - short["cpu_s"]) / (long["tokens"] - short["tokens"]) for short, long in runs]
    return {
        "code": code,
        "turns": len(runs),
        "tokens": round(float(np.median([long["tokens"] for _, long in runs]))),
        "tokens_per_s": round(float(np.median([long["tokens_per_s"] for _, long in runs])), 2),
        "cpu_s_per_token": round(float(np.median(cost)), 4),
        "peak_mib": round(float(np.median([long["peak_mib"] for _, long in runs]))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", default=BEFORE, help="the older commit")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "commits.csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        older = Path(folder) / "older"
        subprocess.run(["git", "worktree", "add", "--detach", str(older), args.before], cwd=ROOT, check=True)
        try:
            checkouts = {f"before, {args.before}": older, "now": ROOT}
            found: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {code: [] for code in checkouts}
            for turn in range(args.turns):
                for place, (code, checkout) in enumerate(checkouts.items()):
                    store = Path(folder) / f"store-{turn}-{place}"  # one each: an older reader may not know a newer run
                    store.mkdir()
                    found[code].append((run(checkout, store, "short", 1), run(checkout, store, "long", args.steps)))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(older)], cwd=ROOT, check=True)
    rows = [row(code, runs) for code, runs in found.items()]
    for one in rows:
        for key in ("tokens_per_s", "cpu_s_per_token", "peak_mib"):
            one[f"{key}_ratio"] = round(one[key] / rows[0][key], 3)
    write_rows(args.out, rows, ("torch", "transformers"))


if __name__ == "__main__":
    main()
