"""Which runs a store holds and their status, from run.json, the heartbeats and the locks. No segment is opened."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monitor.errors import StoreError, UnknownRunError, nearest
from monitor.records import RunStatus
from monitor.store.locks import is_held, rank_lock
from monitor.store.schema import SCHEMA_VERSION, TABLES, run_dir, table_dir
from monitor.store.segments import QUARANTINED

# A heartbeat is compared with the reader's clock only where no lock can tell whether its writer lives. The limits on
# its age allow for clocks that differ by 20 s and for a disk that takes 30 s to write.
DEAD_AFTER_S = 60.0  # a heartbeat of another machine older than this: crashed
HUNG_AFTER_S = 120.0  # the writer lives but its heartbeat is older than this: stalled
STALL_MIN_S = 60.0  # no step for longer than this, and than STALL_STEPS median steps: stalled
STALL_STEPS = 6.0
FIRST_STEP_S = 600.0  # the first steps may take this long each: models are loaded, kernels compiled, no pace is known
# Worst first: a run has the status of its worst rank. The catalog's view `runs` uses the same order.
STATUS_ORDER: tuple[RunStatus, ...] = ("failed", "crashed", "stalled", "running", "stopped", "finished")

_BEAT_NAME = re.compile(r"heartbeat-r(\d{3,})(?:-a(\d{3,}))?\.json")
_BEAT_TYPES: dict[str, type] = {
    "run": str,
    "rank": int,
    "attempt": int,
    "status": str,
    "pid": int,
    "host": str,
    "lock": bool,
    "ts": float,
    "started": float,
    "acknowledged": int,
    "last_step_ts": float,
    "active_ts": float,
    "median_step_s": float,
    "busy": str,
    "busy_since": float,
    "tokens_dropped": int,
    "dropped": dict,
    "lost_steps": int,
    "lost_why": str,
    "tables": dict,
    "segments": int,
    "bytes": int,
    "queue": int,
    "errors": int,
    "judged": bool,
    "pulled": bool,
}
_INFO_TYPES: dict[str, type] = {
    "schema_version": int,
    "created": float,
    "attempts": list,
    "name": str,
    "model": str,
    "task": str,
    "weighting": str,
    "seed": int,
    "comparison": str,
    "warmup_steps": int,
    "config": dict,
    "environment": dict,
}


@dataclass(frozen=True, slots=True)
class RunState:
    """One run of a store. Times are seconds since 1970; `info` is run.json (the fields of RunInfo and more).

    busy: what the trainer does instead of its next step, in its own words. lost_steps: steps that were given up for
    good. heartbeats: the newest of each rank. faults: (path, what is wrong) of run.json and of these heartbeats.
    """

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
    busy: str | None = None
    lost_steps: int = 0
    faults: tuple[tuple[Path, str], ...] = ()


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None if the file is missing, half-written or holds something else."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return None
        value = json.loads(path.read_text(encoding="utf-8"))
        # a lone surrogate, half a character that no terminal, browser or database accepts, becomes "?"
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_info(path: Path) -> dict[str, Any] | None:
    """run.json without the fields whose type is wrong; None if it cannot be read."""
    found = read_json(path)
    return None if found is None else _typed(found, _INFO_TYPES)


def later_version(info: Mapping[str, Any]) -> str:
    """That a run was recorded in a later format than this version reads; "" if it was not."""
    schema = info.get("schema_version", 0)
    if schema <= SCHEMA_VERSION:
        return ""
    return (
        f"It was recorded by a later version (schema {schema}, this one reads {SCHEMA_VERSION}): update rlvr-monitor."
    )


def wrong_fields(path: Path) -> list[str]:
    """Names of the fields of a run.json or heartbeat whose type is wrong, each with its value."""
    found = read_json(path) or {}
    types = _BEAT_TYPES if _BEAT_NAME.fullmatch(path.name) else _INFO_TYPES
    wrong = {key for key, value in found.items() if value is not None} - _typed(found, types).keys()
    return [f"{key} = {str(found[key])[:40]!r}" for key in wrong]


def json_fault(path: Path) -> str:
    """What is wrong with a run.json or heartbeat; "" if nothing is."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return f"{path.name} is not a regular file."
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        return f"{path.name} is missing."
    except OSError as error:
        return f"Cannot be read: {error}."
    if read_json(path) is None:
        return f"{path.name} is {'empty' if found.st_size == 0 else 'not a JSON object, as if cut off'}."
    wrong = wrong_fields(path)
    return f"{path.name} has values of the wrong type: {', '.join(sorted(wrong))}." if wrong else ""


def heartbeat_name(rank: int, attempt: int) -> str:
    """The file of one attempt of a rank; stores of older versions have one file for a rank, without the attempt."""
    return f"heartbeat-r{rank:03d}-a{attempt:03d}.json"


def heartbeat_of(name: str) -> tuple[int, int] | None:
    """(rank, attempt) of the heartbeat with this file name, attempt 0 where it is not told; None for another file."""
    match = _BEAT_NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def heartbeat_files(folder: Path) -> list[tuple[int, int, Path]]:
    """(rank, attempt, path) of every heartbeat of a run, sorted; attempt 0 where the name does not say it."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    found = [match for name in names if (match := _BEAT_NAME.fullmatch(name))]
    return sorted((int(match[1]), int(match[2] or 0), folder / match[0]) for match in found)


def read_heartbeat(path: Path) -> dict[str, Any] | None:
    """A heartbeat without the fields whose type is wrong; None if it cannot be read."""
    match = _BEAT_NAME.fullmatch(path.name)
    found = read_json(path)
    if found is None:  # on a full disk it is rewritten in place, and may have been read half written
        time.sleep(0.002)
        found = read_json(path)
    if found is None or match is None:
        return None
    beat = _typed(found, _BEAT_TYPES)
    named = {"rank": int(match[1]), "attempt": int(match[2] or beat.get("attempt") or 1)}
    return beat | named


def read_heartbeats(store: Path, run: str) -> list[dict[str, Any]]:
    """The newest heartbeat of every rank, by rank. Those with status "running" also have `alive`, from the lock.

    alive: True while the writer lives, False when it is gone, None where only the heartbeat's age can tell. If the
    newest heartbeat of a rank cannot be read, its entry holds little more than the attempt.
    """
    folder = run_dir(store, run)
    newest = {rank: (attempt, path) for rank, attempt, path in heartbeat_files(folder)}
    found = []
    for rank, (attempt, path) in newest.items():
        beat = read_heartbeat(path) or {"run": run, "rank": rank, "attempt": max(1, attempt), "status": "running"}
        if beat.get("status") == "running":
            beat["alive"] = _alive(folder, beat)
        found.append(beat)
    return found


def _alive(folder: Path, beat: Mapping[str, Any]) -> bool | None:
    if beat.get("pulled"):  # from an object store: its writer may be anywhere
        return None
    held = is_held(rank_lock(folder, beat["rank"]))
    if held:
        return True
    if beat.get("host", socket.gethostname()) != socket.gethostname():
        return None  # a lock of another machine may be out of sight
    if held is False and beat.get("lock", True):
        return False
    return False if not pid_alive(beat.get("pid", 0)) else None  # its version or disk has no locks


def _typed(found: Mapping[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    """The fields of the right type, without nulls. Whole numbers may stand for floats, and unknown fields are kept."""

    def fits(value: object, kind: type) -> bool:
        if kind is float:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))

    return {key: value for key, value in found.items() if key not in types or fits(value, types[key])}


def pid_alive(pid: int) -> bool:
    """Whether a process of this machine exists and is not a zombie."""
    if not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        told = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True  # without /proc, a process that can be sent signals counts as alive
    return told.rpartition(")")[2].split()[0] != "Z"


def rank_status(beat: Mapping[str, Any], now: float) -> RunStatus:
    """Status of one rank from a heartbeat of `read_heartbeats`.

    `now`, the reader's clock, is compared only with the age of a heartbeat, for which limits are wide. Whether steps
    still come is judged at the time of the heartbeat, by the writer's own clock.
    """
    status: RunStatus = beat.get("status") or "crashed"
    if status != "running":
        return status if status in ("finished", "stopped", "failed") else "crashed"
    ts, alive = beat.get("ts") or 0.0, beat.get("alive")
    if alive is False or (alive is None and now - ts > DEAD_AFTER_S):
        return "crashed"
    if "ts" in beat and now - ts > HUNG_AFTER_S:
        return "stalled"
    if beat.get("busy"):
        return "running"
    last, active = beat.get("last_step_ts"), beat.get("active_ts") or 0.0
    if last is None:
        return "stalled" if ts - max(active, beat.get("started") or ts) > FIRST_STEP_S else "running"
    return "stalled" if ts - max(active, last) > patience_s(beat) else "running"


def patience_s(beat: Mapping[str, Any]) -> float:
    """Seconds without a step, after the first, after which a running rank counts as stalled."""
    median = beat.get("median_step_s")
    return FIRST_STEP_S if median is None else max(STALL_MIN_S, STALL_STEPS * median)


def busy_with(heartbeats: Sequence[Mapping[str, Any]]) -> str | None:
    """What a run does instead of steps, in its trainer's words ("evaluation"); None while it trains."""
    return next((beat["busy"] for beat in heartbeats if beat.get("status") == "running" and beat.get("busy")), None)


def data_bytes(store: Path, run: str) -> tuple[int, int]:
    """(bytes of the run's segments, number of quarantined files)."""
    total = quarantined = 0
    for table in TABLES:
        try:
            with os.scandir(table_dir(store, run, table)) as entries:
                for entry in entries:
                    if entry.name.endswith(QUARANTINED):
                        quarantined += 1
                    elif entry.name.endswith(".parquet"):
                        total += entry.stat().st_size
        except OSError:
            continue  # not written yet, swapped by a compaction just now, or not ours to read
    return total, quarantined


def run_state(store: Path, run: str, now: float | None = None) -> RunState | None:
    """State of one run; None for a folder that holds neither run.json nor a heartbeat, or is no folder at all."""
    path = run_dir(store, run) / "run.json"
    info = read_info(path)
    beats = read_heartbeats(store, run)
    if info is None and not beats and not os.path.isfile(path):
        return None
    newest = {rank: beat for rank, _, beat in heartbeat_files(path.parent)}
    faults = tuple((file, fault) for file in (path, *newest.values()) if (fault := json_fault(file)))
    info = info or {}
    if later := later_version(info):
        faults = ((path, later), *faults)
    now = time.time() if now is None else now
    attempt = max([beat["attempt"] for beat in beats] + [len(info.get("attempts") or []), 1])
    current = [beat for beat in beats if beat["attempt"] == attempt]
    found = {rank_status(beat, now) for beat in current} or {"crashed"}
    status: RunStatus = next((status for status in STATUS_ORDER if status in found), "crashed")
    acknowledged = [beat["acknowledged"] for beat in beats if beat.get("acknowledged") is not None]
    stamps = [beat["last_step_ts"] for beat in beats if beat.get("last_step_ts") is not None]
    size, quarantined = data_bytes(store, run)
    return RunState(
        name=run,
        status=status,
        created=info.get("created") or min((beat.get("started") or 0.0 for beat in beats), default=0.0),
        attempt=attempt,
        acknowledged=max(acknowledged, default=None),
        last_step_ts=max(stamps, default=None),
        tokens_dropped=sum(beat.get("tokens_dropped") or 0 for beat in beats),
        bytes=size,
        quarantined=quarantined,
        info=info,
        heartbeats=tuple(beats),
        busy=busy_with(current) if status == "running" else None,
        lost_steps=sum(beat.get("lost_steps") or 0 for beat in beats),
        faults=faults,
    )


def is_run_name(name: str) -> bool:
    """Whether a folder of this name may be a run: it is text, as databases and terminals take it, and not one of ours.

    Python shows bytes of a file's name that are not UTF-8 as lone surrogates.
    """
    try:
        return bool(name.encode()) and name[0] not in "_." and not set(name) & {"/", "\0"}
    except UnicodeEncodeError:
        return False


def run_names(store: Path) -> list[str]:
    """Names of the runs of a store, sorted; other folders are left out. Raises StoreError."""
    try:
        with os.scandir(store / "runs") as entries:
            return sorted(entry.name for entry in entries if is_run_name(entry.name) and entry.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"Cannot read store {str(store)!r}: {error}. Check who may read its folders.") from error


def safe_name(text: str) -> str:
    """A name that a run may have: what else there is in `text` becomes '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100] or "run"


def free_name(store: Path, wanted: str) -> str:
    """The name, with -2, -3, ... behind it if the store has it."""
    taken = set(run_names(store)) if (store / "runs").is_dir() else set()
    return next(name for name in (wanted, *(f"{wanted}-{n}" for n in range(2, 10_000))) if name not in taken)


def list_runs(store: str | Path) -> list[RunState]:
    """All runs of a store, oldest first. Raises StoreError if there is no store at that path."""
    root = require_store(store)
    states = [state for name in run_names(root) if (state := run_state(root, name)) is not None]
    return sorted(states, key=lambda state: (state.created, state.name))


def get_run(store: str | Path, name: str) -> RunState:
    """The state of one run. Raises UnknownRunError with the nearest known name."""
    root = require_store(store)
    state = run_state(root, name) if is_run_name(name) else None
    if state is None:
        known = run_names(root)
        listed = (
            f" Known runs: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}." if known else " It is empty."
        )
        raise UnknownRunError(f"No run {name!r} in store {str(root)!r}.{nearest(name, known)}{listed}")
    return state


def get_known_run(store: str | Path, name: str) -> RunState:
    """`get_run` for whoever rewrites or copies all of a run. Raises StoreError if a later version recorded it."""
    state = get_run(store, name)
    if later := later_version(state.info):
        raise StoreError(f"Run {name!r} is left alone. {later}")
    return state


def require_store(store: str | Path) -> Path:
    """The absolute path of an existing store. Raises StoreError if it is missing, a file, or another folder."""
    root = Path(store).expanduser().absolute()
    try:
        os.stat(root / "runs")
    except PermissionError as error:
        raise StoreError(f"Cannot read store {str(root)!r}: {error}. Check who may read its folders.") from error
    except OSError:
        pass
    if not root.exists():
        raise StoreError(f"No store at {str(root)!r}. Give the folder that a run was recorded into.")
    if not root.is_dir():
        hint = " Give its folder." if root.name == "store.duckdb" else ""
        raise StoreError(f"{str(root)!r} is a file, expected a store folder.{hint}")
    if not (root / "runs").is_dir():
        raise StoreError(f"{str(root)!r} is not a store: it has no 'runs' folder. Give the folder that holds it.")
    return root
