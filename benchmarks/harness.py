"""What the benchmarks share: rows of a CSV that say on which machine, with which versions and commit they were made."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def no_options(description: str | None) -> None:
    """For a benchmark without options: --help says what it measures instead of measuring, and a mistake is told."""
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=description, formatter_class=raw).parse_args()


def provenance(packages: Sequence[str] = ("numpy",)) -> dict[str, str]:
    """Columns that end every row: when, machine, cores, versions, commit ("+": with changes other than results)."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return {
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {_cpu()}, {os.cpu_count()} cores",
        "versions": "; ".join([f"python {platform.python_version()}", *versions]),
        "commit": _commit(),
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], packages: Sequence[str] = ("numpy",)) -> None:
    """Write rows of equal keys as a CSV, with provenance; an older file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = provenance(packages)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *stamp], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **stamp} for row in rows)
    print(f"{len(rows)} rows in {path}")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


def _commit() -> str:
    """The commit. RLVR_COMMIT names it where the files are a copy without their repository."""
    changed = _git("status", "--porcelain", "-uno", "--", ":!results")
    found = _git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    return found or os.environ.get("RLVR_COMMIT", "")


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
