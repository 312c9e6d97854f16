"""Arms x keep shares x learning rates x seeds on the built-in task; one CSV row for each run.

    python benchmarks/sweep_demo.py --store SWEEP --lrs 1e-4 3e-4 --seeds 0 1 2 --arms uniform:1 ict:0.3 random:0.3

Each run is an ordinary `rlvr train` with trainer/presets/demo.toml; all arms get the same settings. Runs that the
store already holds are not run again. This makes the table of the sample runs:
    --store sample_runs --lrs 3e-4 --names "{kind}-s{seed}" --out benchmarks/results/sample_runs.csv
docs/log.md discusses the rows.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from harness import write_rows

from monitor.queries.alerts import alert_log, alert_spans
from monitor.queries.differences import final_figures
from monitor.queries.series import scalar_series, series_of
from monitor.store.tail import Tail

ROOT = Path(__file__).parent.parent
PRESET = ROOT / "trainer" / "presets" / "demo.toml"
LEVEL = "eval/heldout/pass@1"
SERIES = (
    LEVEL,
    "eval/heldout/pass@4",
    "eval/heldout/distinct",
    "eval/ood/pass@1",
    "eval/multipath/distinct",
    "entropy",
    "reward",
    "entropy_selected",
    "selected_decided_share",
    "decided_share",
    "response_length",
    "perf/step_s",
    "perf/record_s",
)


def run_name(names: str, arm: str, lr: str, seed: int) -> str:
    kind, keep = arm.split(":")
    return names.format(kind=kind, keep=keep, lr=lr, seed=seed)


def train(store: Path, name: str, arm: str, lr: str, seed: int, extra: list[str]) -> None:
    kind, keep = arm.split(":")
    if (store / "runs" / name).exists():
        return
    settings = {
        "run": name, "store": store, "weighting.kind": kind, "weighting.keep": keep, "optim.lr": lr, "seed": seed,
        "comparison": f"lr{lr}",
    }  # fmt: skip
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    (store / "logs").mkdir(parents=True, exist_ok=True)
    with (store / "logs" / f"{name}.log").open("w") as log:
        command = [sys.executable, "-m", "monitor.cli", "train", str(PRESET), *options, *extra]
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    print(name, "ok" if code == 0 else f"ended with {code}", flush=True)


def rows(store: Path, names: str, arms: list[str], lrs: list[str], seeds: list[int]) -> list[dict[str, object]]:
    """One row a run: figures at the last step, and at the pass@1 that all arms of this (lr, seed) reached."""
    tail = Tail(store)
    tail.poll()
    con, found = tail.cursor(), []
    for lr, seed in itertools.product(lrs, seeds):
        runs = [name for arm in arms if (name := run_name(names, arm, lr, seed)) in tail.runs]
        figures = final_figures(con, runs, SERIES, LEVEL)
        spans = alert_spans(alert_log(con, runs))
        for run in runs:
            _, entropy = series_of(scalar_series(con, [run], ["entropy"], 10**9), run, "entropy")
            last, equal = figures["last"][run], figures["equal"].get(run, {})
            fired = [
                f"{r}@{s}"
                for r, s, name in zip(spans["rule"], spans["first_step"], spans["run"], strict=True)
                if name == run
            ]
            found.append(
                {"run": run, "lr": lr, "seed": seed, "steps": int(last["step"]), "entropy_first": round(entropy[0], 4)}
                | {key: round(last.get(key, np.nan), 4) for key in SERIES}
                | {f"equal/{key}": round(equal.get(key, np.nan), 4) for key in ("step", *SERIES[:3], "entropy")}
                | {"alerts": " ".join(fired)}
            )
    tail.close()
    return found


def markdown(table: list[dict[str, object]]) -> str:
    """Mean and standard deviation over seeds, a column for each (arm, learning rate)."""
    groups: dict[str, list[dict[str, object]]] = {}
    for row in table:
        groups.setdefault(str(row["run"]).rpartition("-s")[0], []).append(row)
    figures = [key for key in table[0] if key not in ("run", "lr", "seed", "alerts") and not key.startswith("perf/")]
    lines = [f"| | {' | '.join(groups)} |", f"|---|{'---|' * len(groups)}"]
    for key in figures:
        values = [np.array([float(str(row[key])) for row in rows]) for rows in groups.values()]
        cells = [f"{v.mean():.3g} ± {v.std(ddof=1):.2g}" if len(v) > 1 else f"{v[0]:.3g}" for v in values]
        lines.append(f"| {key.replace('eval/', '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=["uniform:1", "ict:0.3", "random:0.3"], help="kind:keep")
    parser.add_argument("--lrs", nargs="+", default=["1e-4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--names", default="{kind}{keep}-lr{lr}-s{seed}", help="how runs are called in the store")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sweep_demo.csv")
    options, extra = parser.parse_known_args()
    grid = list(itertools.product(options.seeds, options.lrs, options.arms))
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda g: train(options.store, run_name(options.names, g[2], g[1], g[0]), *g[::-1], extra), grid))
    table = rows(options.store, options.names, options.arms, options.lrs, options.seeds)
    write_rows(options.out, table, ("torch", "transformers"))
    print(markdown(table))


if __name__ == "__main__":
    main()
