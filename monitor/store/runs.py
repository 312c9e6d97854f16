"""Which runs a store holds and how they fare, from run.json and the heartbeats alone: no segment is opened."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monitor.errors import StoreError, UnknownRunError, nearest
from monitor.records import RunStatus
from monitor.store.schema import TABLES, run_dir
from monitor.store.segments import QUARANTINED

DEAD_AFTER_S = 15.0  # a heartbeat older than this: crashed
STALL_MIN_S = 60.0  # no step for longer than this, and than STALL_STEPS median steps: stalled
STALL_STEPS = 6.0
FIRST_STEP_S = 600.0  # the first step may take this long: models are loaded, kernels compiled
# The worst rank speaks for the run. The catalog's `runs` view holds the same order.
STATUS_ORDER: tuple[RunStatus, ...] = ("failed", "crashed", "stalled", "running", "stopped", "finished")


@dataclass(frozen=True, slots=True)
class RunState:
    """One run of a store. Times are seconds since 1970; `info` is run.json (the fields of RunInfo and more)."""

    name: str
    status: RunStatus
    created: float
    attempt: int
    acknowledged: int | None
    last_step_ts: float | None
    tokens_dropped: int
    bytes: int
    quarantined: int
    info: dict[str, Any] = field(default_factory=dict)
    heartbeats: tuple[dict[str, Any], ...] = ()


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None if the file is missing, half-written or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_heartbeats(store: Path, run: str) -> list[dict[str, Any]]:
    """The newest heartbeat of every rank, by rank."""
    paths = sorted(run_dir(store, run).glob("heartbeat-r*.json"))
    return [beat for path in paths if (beat := read_json(path)) is not None]


def pid_alive(pid: int) -> bool:
    """Whether a process of this machine exists and is not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True  # no /proc here: a process that takes signals counts as alive
    return stat.rpartition(")")[2].split()[0] != "Z"


def rank_status(beat: dict[str, Any], now: float) -> RunStatus:
    """Status of one rank from its heartbeat."""
    status: RunStatus = beat.get("status", "crashed")
    if status != "running":
        return status
    dead = beat.get("host") == socket.gethostname() and not pid_alive(int(beat.get("pid", 0)))
    if dead or now - float(beat.get("ts", 0.0)) > DEAD_AFTER_S:
        return "crashed"
    last = beat.get("last_step_ts")
    if last is None:
        return "stalled" if now - float(beat.get("started", now)) > FIRST_STEP_S else "running"
    patience = max(STALL_MIN_S, STALL_STEPS * float(beat.get("median_step_s") or 0.0))
    return "stalled" if now - float(last) > patience else "running"


def data_bytes(store: Path, run: str) -> tuple[int, int]:
    """(bytes of the run's segments, number of quarantined files)."""
    total = quarantined = 0
    for table in TABLES:
        try:
            with os.scandir(run_dir(store, run) / "data" / table) as entries:
                for entry in entries:
                    if entry.name.endswith(QUARANTINED):
                        quarantined += 1
                    elif entry.name.endswith(".parquet"):
                        total += entry.stat().st_size
        except FileNotFoundError:
            continue  # not written yet, or swapped by a compaction just now
    return total, quarantined


def run_state(store: Path, run: str, now: float | None = None) -> RunState | None:
    """State of one run, or None where run.json is missing."""
    info = read_json(run_dir(store, run) / "run.json")
    if info is None:
        return None
    now = time.time() if now is None else now
    beats = read_heartbeats(store, run)
    attempt = max([int(beat.get("attempt", 1)) for beat in beats] + [len(info.get("attempts", [])), 1])
    current = [beat for beat in beats if beat.get("attempt") == attempt]
    found = {rank_status(beat, now) for beat in current} or {"crashed"}
    acknowledged = [beat["acknowledged"] for beat in beats if beat.get("acknowledged") is not None]
    stamps = [beat["last_step_ts"] for beat in beats if beat.get("last_step_ts") is not None]
    size, quarantined = data_bytes(store, run)
    return RunState(
        name=run,
        status=next((status for status in STATUS_ORDER if status in found), "crashed"),
        created=float(info.get("created", 0.0)),
        attempt=attempt,
        acknowledged=max(acknowledged, default=None),
        last_step_ts=max(stamps, default=None),
        tokens_dropped=sum(int(beat.get("tokens_dropped", 0)) for beat in beats),
        bytes=size,
        quarantined=quarantined,
        info=info,
        heartbeats=tuple(beats),
    )


def run_names(store: Path) -> list[str]:
    """Names of the runs of a store, sorted; folders that start with '_' or '.' are not runs."""
    try:
        with os.scandir(store / "runs") as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] not in "_.")
    except FileNotFoundError:
        return []


def list_runs(store: str | Path) -> list[RunState]:
    """All runs of a store, oldest first. Raises StoreError if there is no store at that path."""
    root = require_store(store)
    states = [state for name in run_names(root) if (state := run_state(root, name)) is not None]
    return sorted(states, key=lambda state: (state.created, state.name))


def get_run(store: str | Path, name: str) -> RunState:
    """The state of one run. Raises UnknownRunError with the nearest known name."""
    root = require_store(store)
    state = run_state(root, name) if name and "/" not in name and name[0] not in "_." else None
    if state is None:
        known = run_names(root)
        listed = (
            f" Known runs: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}." if known else " It is empty."
        )
        raise UnknownRunError(f"No run {name!r} in store {str(root)!r}.{nearest(name, known)}{listed}")
    return state


def require_store(store: str | Path) -> Path:
    """The absolute path of an existing store. Raises StoreError if it is missing, a file, or another folder."""
    root = Path(store).expanduser().absolute()
    if not root.exists():
        raise StoreError(f"No store at {str(root)!r}. Give the folder that a run was recorded into (--store).")
    if not root.is_dir():
        hint = " Give its folder." if root.name == "store.duckdb" else ""
        raise StoreError(f"{str(root)!r} is a file, expected a store folder.{hint}")
    if not (root / "runs").is_dir():
        raise StoreError(f"{str(root)!r} is not a store: it has no 'runs' folder. Give the folder that holds it.")
    return root
