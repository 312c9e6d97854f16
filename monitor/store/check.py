"""`rlvr store check`: which files are left over, which are damaged, and which are gone.

Files are read one by one and never through the views, so that a damaged file is only a finding. Files that are gone
show when the rows on disk are compared with the heartbeats, which count them, and with what pruning recorded as
removed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from monitor.store.compact import pruned_rows
from monitor.store.runs import (
    RunState,
    heartbeat_files,
    is_run_name,
    json_fault,
    later_version,
    read_heartbeat,
    read_info,
    require_store,
    run_names,
    run_state,
)
from monitor.store.schema import GENERATION, INNER, TABLES, SegmentName, generation_of, run_dir, table_dir
from monitor.store.segments import QUARANTINED, crc32_of

_COMMITTED = ("tokens", "samples", "histograms", "alerts")  # tables whose rows need a commit mark
_TRIES = 3  # a compaction may swap the files of a run while they are read
Key = tuple[str, int, int]  # table, attempt, rank


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `check_store` found. `damage`: acknowledged data is lost or cannot be trusted."""

    kind: str
    run: str
    path: str
    message: str
    damage: bool


@dataclass(slots=True)
class _Files:
    """What the segments of a run hold."""

    rows: Counter[Key] = field(default_factory=Counter)
    steps: dict[Key, set[int]] = field(default_factory=dict)
    damaged: set[Key] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)


def check_store(store: str | Path) -> list[Finding]:
    """All findings about a store's files, damage first. Reads every byte. Raises StoreError."""
    root = require_store(store)
    found = [Finding("leftover", "", str(path), "Temporary file.", False) for path in root.glob("*.tmp")]
    for name in run_names(root):
        found += _check_run(root, name)
    for folder in (root / "runs").iterdir():
        if folder.name[0] not in "_." and not is_run_name(folder.name):
            message = "Its name is not UTF-8, so it is not shown as a run. Rename it if it is one."
            found.append(Finding("foreign", "", str(folder), message, False))
    return sorted(found, key=lambda finding: not finding.damage)


def _check_run(root: Path, run: str) -> list[Finding]:
    folder = run_dir(root, run)
    try:
        os.listdir(folder)
    except OSError as error:
        return [_unreadable(run, folder, error)]
    for _ in range(_TRIES):
        before = generation_of(folder)
        state = run_state(root, run)  # read first, because rows are on disk before the heartbeat counts them
        beats = [(path, read_heartbeat(path)) for _, _, path in heartbeat_files(folder)]
        files = _check_segments(root, run, live=state is not None and state.status in ("running", "stalled"))
        if generation_of(folder) == before:
            break
    if state is None and not files.rows and not (folder / "run.json").exists():
        files.findings.append(Finding("leftover", run, str(folder), "Folder of a run that never started.", False))
        return [finding for finding in files.findings if finding.kind != "no_data"]
    found = [*files.findings, *_check_folder(folder, run, state)]
    readable = [beat for _, beat in beats if beat is not None]
    found += _check_metadata(folder, run, [path for path, _ in beats], readable, files)
    found += _check_commits(root, run, state, files)
    for beat in readable:
        found += _check_counts(root, run, beat, files)
    return found


def _check_segments(root: Path, run: str, *, live: bool) -> _Files:
    files = _Files()
    data = run_dir(root, run) / "data"
    try:
        tables = sorted(os.listdir(data))
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            files.findings.append(_unreadable(run, data, error))
        elif data.is_symlink() or generation_of(data.parent) is None:
            message = f"No segments: {os.readlink(data) if data.is_symlink() else data.name} is gone."
            files.findings.append(Finding("no_data", run, str(data), message, True))
        return files
    for name in tables:
        if name in TABLES:
            live_folder = table_dir(root, run, name)
            for path in _listed(live_folder, run, files):
                _check_file(path, run, name, files, live=live)
            if live_folder.name != name:
                beside = [path for path in _listed(live_folder.parent, run, files) if not INNER.fullmatch(path.name)]
                for path in beside:
                    message = "Not a segment: it lies beside the folder of this table's segments."
                    files.findings.append(Finding("foreign", run, str(path), message, False))
        elif name != "pruned.json":
            files.findings.append(Finding("foreign", run, str(data / name), "Not a table of this version.", False))
    return files


def _listed(folder: Path, run: str, files: _Files) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except OSError as error:
        files.findings.append(_unreadable(run, folder, error))
        return []


def _check_file(path: Path, run: str, table: str, files: _Files, *, live: bool) -> None:
    def tell(kind: str, message: str, damage: bool) -> None:
        files.findings.append(Finding(kind, run, str(path), message, damage))

    if INNER.fullmatch(path.name):  # of another generation, in a run of an older version
        return
    name = SegmentName.parse(path.name.removesuffix(QUARANTINED))
    key = (table, name.attempt, name.rank) if name else None
    if path.name.endswith(".tmp"):
        if not live:
            tell("leftover", "Temporary file of a killed writer.", False)
    elif path.name.endswith(QUARANTINED):
        files.damaged |= {key} if key else set()
        tell("quarantined", "Set aside as unreadable.", True)
    elif name is None or key is None:
        tell("foreign", "Not a segment: not written by a recorder.", False)
    else:
        try:
            crc = crc32_of(path)
            if crc == name.crc32:
                rows, steps = _contents(path)
                files.rows[key] += rows
                files.steps.setdefault(key, set()).update(steps)
                return
            tell("checksum", f"Bytes have CRC-32 {crc:08x}, the name says {name.crc32:08x}.", True)
        except FileNotFoundError:
            return  # swapped away by a compaction just now
        except Exception as error:  # whatever a damaged file makes its reader throw
            files.findings.append(_unreadable(run, path, error))
        files.damaged.add(key)


def _contents(path: Path) -> tuple[int, set[int]]:
    """(rows, steps) of a segment."""
    with pq.ParquetFile(path) as file:
        steps = file.read(columns=["step"], use_threads=False)["step"].drop_null().to_numpy()
        return file.metadata.num_rows, {int(step) for step in np.unique(steps)}


def _check_folder(folder: Path, run: str, state: RunState | None) -> Iterator[Finding]:
    """What else lies in a run's folder, and how the run ended."""
    live = state is not None and state.status in ("running", "stalled")
    if state is not None and state.status in ("crashed", "failed", "stalled"):
        last = "none" if state.acknowledged is None else state.acknowledged
        message = f"The run {state.status}; last durable step: {last}."
        yield Finding(state.status, run, str(folder), message, False)
    current = generation_of(folder)
    for name in sorted(os.listdir(folder)):
        if GENERATION.fullmatch(name) and name != current:
            if not live:
                message = "Generation of a compaction: `rlvr store compact` removes it."
                yield Finding("leftover", run, str(folder / name), message, False)
        elif not live and name.endswith((".tmp", ".reserve")):
            yield Finding("leftover", run, str(folder / name), "File of a killed process.", False)


def _check_metadata(
    folder: Path, run: str, paths: list[Path], beats: list[dict[str, Any]], files: _Files
) -> Iterator[Finding]:
    """run.json and the heartbeats: whole, of the right types, and there."""
    for path in (folder / "run.json", *paths):
        kind = "run_json" if path.name == "run.json" else "heartbeat"
        fault = json_fault(path)
        if fault:
            yield Finding(kind, run, str(path), fault, True)
    info = read_info(folder / "run.json") or {}
    if later := later_version(info):
        yield Finding("later_version", run, str(folder / "run.json"), later, False)
    newest = {key[2]: max(k[1] for k in files.steps if k[2] == key[2]) for key in files.steps}
    marks = info.get("attempts") or []
    newest[0] = max(newest.get(0, 0), len(marks))
    known = {beat["rank"]: beat["attempt"] for beat in beats}  # sorted: the newest attempt stays
    broken = {(rank, attempt or 1) for rank, attempt, path in heartbeat_files(folder) if read_heartbeat(path) is None}
    for rank, attempt in newest.items():
        if attempt > known.get(rank, 0) and (rank, attempt) not in broken:
            message = f"The heartbeat of attempt {attempt}, rank {rank}, is gone: nothing says what it has recorded."
            yield Finding("heartbeat", run, str(folder), message, True)


def _check_commits(root: Path, run: str, state: RunState | None, files: _Files) -> Iterator[Finding]:
    """Rows without a commit mark, from the step that a killed writer was writing."""
    if state is not None and state.status in ("running", "stalled"):
        return
    for (table, attempt, rank), steps in sorted(files.steps.items()):
        left = sorted(steps - files.steps.get(("steps", attempt, rank), set()))
        if table in _COMMITTED and left:
            message = f"{table} rows of {len(left)} steps, {left[0]} to {left[-1]} (attempt {attempt}, rank {rank}),"
            yield Finding("uncommitted", run, str(table_dir(root, run, table)), f"{message} lack a commit mark.", False)


def _check_counts(root: Path, run: str, beat: dict[str, Any], files: _Files) -> Iterator[Finding]:
    """Compares what a heartbeat counts with what is on disk, and reports what it says was given up."""
    attempt, rank = beat["attempt"], beat["rank"]
    where = f"(attempt {attempt}, rank {rank})"
    pruned = pruned_rows(run_dir(root, run))
    gone: set[str] = set()
    for table, counted in (beat.get("tables") or {}).items():
        key = (table, attempt, rank)
        rows = counted.get("rows") if isinstance(counted, dict) else None
        if not isinstance(rows, int) or table not in TABLES or key in files.damaged:
            continue
        missing = rows - files.rows[key] - pruned.get(key, 0)
        if missing > 0:
            gone.add(table)
            kind = "lost_step" if table == "steps" else "lost_rows"
            message = f"{missing} of {rows} {table} rows {where} are gone: their segments were removed."
            yield Finding(kind, run, str(table_dir(root, run, table)), message, True)
    step, key = beat.get("acknowledged"), ("steps", attempt, rank)
    if step is not None and step not in files.steps.get(key, ()) and "steps" not in gone and key not in files.damaged:
        message = f"Step {step} was acknowledged {where} but its rows are gone."
        yield Finding("lost_step", run, str(table_dir(root, run, "steps")), message, True)
    folder = str(run_dir(root, run))
    if beat.get("lost_steps"):
        message = f"{beat['lost_steps']} steps were given up {where}: {beat.get('lost_why') or 'it is not known why'}."
        yield Finding("lost_steps", run, folder, message, True)
    dropped = beat.get("dropped") or {"tokens": beat.get("tokens_dropped") or 0}
    for table, count in dropped.items():
        if table != "steps" and isinstance(count, int) and count > 0:
            what = f"{count} tokens rows" if table == "tokens" else f"The {table} of {count} steps"
            yield Finding("gap", run, folder, f"{what} were not recorded {where}: see its events.", False)


def _unreadable(run: str, path: Path, error: Exception) -> Finding:
    text = str(error).partition("\n")[0]
    return Finding("unreadable", run, str(path), f"Cannot be read: {type(error).__name__}: {text}", True)
