"""What a first import costs: `rlvr import` of a log of many rows, most of it judging them, in a process of its own.

The log has seven series of a calm run. CPU seconds and wall seconds include the start of the interpreter, and every
write is fsynced. `--against` takes a folder with the files of another commit; both then take turns, and `times` is how
many times as much CPU that one took, by medians.

    python benchmarks/bench_import.py [--rows 50000] [--against DIR] [--out benchmarks/results/import.csv]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import RESULTS, write_rows

HERE = Path(__file__).resolve().parent.parent
SERIES = ("entropy", "reward", "loss", "grad_norm", "response_length", "kl", "lr")


def write_log(path: Path, rows: int) -> None:
    """A log of `rows` steps."""
    rng = np.random.default_rng(0)
    levels = np.array([1.0, 0.5, 0.5, 0.5, 200.0, 0.01, 1e-6])
    values = levels * (1 + 0.02 * rng.standard_normal((rows, len(SERIES))))
    table = np.column_stack([np.arange(rows), values])
    np.savetxt(path, table, fmt=["%d", *["%.6g"] * len(SERIES)], delimiter=",", comments="",
               header=",".join(("step", *SERIES)))  # fmt: skip


def seconds_of(code: Path, log: Path, store: Path) -> tuple[float, float]:
    """(CPU, wall) seconds of one import by the files in `code`."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "rlvr_monitor", "import", str(log), "--run", "r", "--store", str(store)]
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=code, env=environment, capture_output=True)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", type=Path, help="folder with the files of another commit")
    parser.add_argument("--out", type=Path, default=RESULTS / "import.csv")
    options = parser.parse_args()
    codes = {"this": HERE} | ({"before": options.against.resolve()} if options.against else {})
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in codes}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        write_log(log, options.rows)
        for repeat in range(options.repeats):
            for name, code in codes.items():
                found[name].append(seconds_of(code, log, Path(folder) / f"{name}-{repeat}"))
    medians = {
        name: [statistics.median(column) for column in zip(*times, strict=True)] for name, times in found.items()
    }
    rows = [
        {
            "code": name,
            "rows": options.rows,
            "series": len(SERIES),
            "repeats": options.repeats,
            "cpu_s": round(cpu, 2),
            "wall_s": round(wall, 2),
            "us_per_row": round(1e6 * cpu / options.rows, 1),
            "times": round(cpu / medians["this"][0], 2),
        }
        for name, (cpu, wall) in medians.items()
    ]
    for row in rows:
        print(row)
    write_rows(options.out, rows, ("numpy", "duckdb", "pyarrow"))


if __name__ == "__main__":
    main()
