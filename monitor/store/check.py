"""`rlvr store check`: what is left over, and what is damaged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from monitor.store.reader import open_store
from monitor.store.runs import RunState, list_runs, require_store
from monitor.store.schema import TABLES, SegmentName, run_dir, table_dir
from monitor.store.segments import QUARANTINED, SEED_RUN, crc32_of

_GENERATION = re.compile(r"^data\.g\d+(\.tmp)?$")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `check_store` found. `damage`: acknowledged data is lost or cannot be trusted."""

    kind: str
    run: str
    path: str
    message: str
    damage: bool


def check_store(store: str | Path) -> list[Finding]:
    """Everything worth knowing about a store's files, damage first. Reads every byte. Raises StoreError."""
    root = require_store(store)
    found = [Finding("leftover", "", str(path), "Temporary file.", False) for path in root.glob("*.tmp")]
    runs = list_runs(root)
    for state in runs:
        found += _check_files(root, state)
        found += _check_run(root, state)
    found += _check_commits(root, runs)
    return sorted(found, key=lambda finding: not finding.damage)


def _check_files(root: Path, state: RunState) -> Iterator[Finding]:
    live = state.status in ("running", "stalled")
    for table in TABLES:
        for path in sorted(table_dir(root, state.name, table).glob("*")):
            name = SegmentName.parse(path.name)
            if path.name.endswith(".tmp"):
                if not live:
                    yield Finding("leftover", state.name, str(path), "Temporary file of a killed writer.", False)
            elif path.name.endswith(QUARANTINED):
                yield Finding("quarantined", state.name, str(path), "Set aside as unreadable.", True)
            elif name is None:
                yield Finding("foreign", state.name, str(path), "Not a segment: not written by a recorder.", False)
            else:
                try:
                    crc = crc32_of(path)
                except FileNotFoundError:
                    continue  # swapped away by a compaction just now
                if crc != name.crc32:
                    message = f"Bytes have CRC-32 {crc:08x}, the name says {name.crc32:08x}."
                    yield Finding("checksum", state.name, str(path), message, True)


def _check_run(root: Path, state: RunState) -> Iterator[Finding]:
    folder = run_dir(root, state.name)
    current = (folder / "data").resolve().name
    if state.status in ("crashed", "failed", "stalled"):
        last = "none" if state.acknowledged is None else state.acknowledged
        yield Finding(
            state.status, state.name, str(folder), f"The run {state.status}; last durable step: {last}.", False
        )
    for path in folder.iterdir():
        if _GENERATION.match(path.name) and path.name != current:
            yield Finding("leftover", state.name, str(path), "Generation of an interrupted compaction.", False)


def _check_commits(root: Path, runs: list[RunState]) -> Iterator[Finding]:
    """Rows without a commit mark, and acknowledged steps without rows."""
    quiet = {state.name: state for state in runs if state.status not in ("running", "stalled")}
    with open_store(root) as store:
        for table in ("tokens", "samples", "histograms", "alerts"):
            rows = store.sql(
                f"SELECT run, attempt, rank, min(step), max(step), count(*) FROM {table}_all t ANTI JOIN "
                "(SELECT DISTINCT run, attempt, rank, step FROM steps_all) USING (run, attempt, rank, step) "
                "GROUP BY ALL ORDER BY ALL"
            ).rows
            for run, attempt, rank, first, last, count in rows:
                if run in quiet:
                    message = f"{count} {table} rows of steps {first} to {last} (attempt {attempt}, rank {rank}) lack"
                    yield Finding("uncommitted", run, str(table_dir(root, run, table)), f"{message} a commit.", False)
        have = set(store.sql("SELECT DISTINCT run, attempt, rank, step FROM steps_all").rows)
    for name, state in quiet.items():
        for beat in state.heartbeats:
            step = beat.get("acknowledged")
            if step is not None and (name, beat["attempt"], beat["rank"], step) not in have and name != SEED_RUN:
                message = f"Step {step} was acknowledged (attempt {beat['attempt']}) but its rows are gone."
                yield Finding("lost_step", name, str(table_dir(root, name, "steps")), message, True)
