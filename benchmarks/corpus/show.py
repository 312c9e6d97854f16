"""Puts runs of the corpus into a store, to open them in the dashboard: their scalars and the alerts of today's rules.

python -m benchmarks.corpus.show c044 c108 --store corpus-runs && rlvr dashboard corpus-runs
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.corpus.load import PARTS, packed_runs
from monitor.alerts.engine import AlertEngine
from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="runs, as benchmarks/results/detectors_runs.csv names them")
    parser.add_argument("--store", type=Path, required=True)
    options = parser.parse_args()
    runs = {run.name: run for part in PARTS for run in packed_runs(part)}
    if unknown := set(options.names) - set(runs):
        raise SystemExit(f"No runs {', '.join(sorted(unknown))} in the corpus: it has {min(runs)} to {max(runs)}.")
    for name in options.names:
        config = runs[name].about["config"]
        warmup = config["weighting"]["warmup_steps"]
        info = RunInfo(
            name=name, model=config["model"], task=config["task"], weighting=config["weighting"]["kind"],
            seed=config["seed"], comparison="corpus", warmup_steps=warmup, config=config,
        )  # fmt: skip
        series = runs[name].series
        with Recorder(options.store, info, engine=AlertEngine(warmup_steps=warmup)) as recorder:
            for row, step in enumerate(series["step"]):
                known = {
                    key: values[row] for key, values in series.items() if key != "step" and np.isfinite(values[row])
                }
                recorder.record(StepRecord(int(step), {key: float(value) for key, value in known.items()}))
        print(f"{name}: {len(series['step'])} steps in {options.store}")


if __name__ == "__main__":
    main()
