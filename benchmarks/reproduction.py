"""A first comparison of weightings on the built-in task, at three learning rates; rows for docs/reproduction.md.

    python benchmarks/reproduction.py [--store reproduction] [--jobs 2]

Every comparison is one `rlvr compare` with the demo's settings. Finished runs are not trained again, so a second call
only collects their figures. There are 72 runs, each about a minute and a half on one CPU core. Afterwards:
python -m docs.make_reproduction
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import RESULTS, write_rows

ARMS = (
    "uniform", "ict:keep=0.1", "ict:keep=0.3", "ict_frequent:keep=0.9", "random:keep=0.1", "random:keep=0.3",
    "top_entropy:keep=0.2", "stapo",
)  # fmt: skip
SEEDS = {"1e-4": 5, "3e-4": 3, "3e-5": 1}  # learning rate -> seeds
COLUMNS = ("when", "figure", "arm", "n", "mean", "sd", "baseline_mean", "difference", "low", "high", "p", "p_smallest")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("reproduction"))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for lr, seeds in SEEDS.items():
        name = f"lr-{lr}"
        command = [sys.executable, "-m", "monitor.cli", "compare", "demo", "--arms", *ARMS, "--seeds", str(seeds)]
        command += ["--comparison", name, "--optim.lr", lr, "--checkpoint.every", "0", "--jobs", str(options.jobs)]
        if subprocess.run([*command, "--store", str(options.store)], check=False).returncode:
            return 1
        found = json.loads((options.store / "comparisons" / f"{name}.json").read_text())
        run = found["arms"]["uniform"]["0"]
        info = json.loads((options.store / "runs" / run / "run.json").read_text())
        for row in found["rows"]:
            kept = {key: row.get(key) for key in COLUMNS}
            values = ";".join(f"{value:.6g}" for value in row["values"].values() if value is not None)
            rows.append({"lr": lr, **kept, "values": values, "run_commit": info["environment"]["commit"][:7]})
    write_rows(RESULTS / "reproduction.csv", rows, ("torch", "transformers", "scipy"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
