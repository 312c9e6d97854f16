"""What people said of a run's alerts: acknowledged and muted rules, in alerts.json beside the run's data.

The rules go on judging and their alerts are recorded as ever. A muted rule is not delivered; an acknowledged episode
does not count for the exit code of `rlvr watch --once`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from monitor.errors import StoreError
from monitor.store.locks import FileLock
from monitor.store.runs import read_json
from monitor.store.schema import run_dir
from monitor.store.segments import replace_text

FILE = "alerts.json"
_WAIT_S = 5.0  # for another command that changes the marks


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """Somebody has seen the episode of a rule that began at first_step, at the time ts (seconds since 1970)."""

    first_step: int
    ts: float


@dataclass(frozen=True, slots=True)
class Muted:
    """A rule is not delivered, up to until_step, or until it is unmuted (None)."""

    until_step: int | None
    ts: float


@dataclass(frozen=True, slots=True)
class Marks:
    """The marks of one run, by rule."""

    acknowledged: dict[str, Acknowledged]
    muted: dict[str, Muted]

    def has_seen(self, rule: str, first_step: int) -> bool:
        """Whether the rule's episode from first_step is acknowledged; a later one needs its own."""
        found = self.acknowledged.get(rule)
        return found is not None and found.first_step == first_step

    def is_muted(self, rule: str, step: int) -> bool:
        """Whether a transition of the rule at `step` is kept from the routes."""
        found = self.muted.get(rule)
        return found is not None and (found.until_step is None or step <= found.until_step)


def read_marks(store: str | Path, run: str) -> Marks:
    """The marks of a run; none where the file is missing, damaged or of a later version."""
    found = read_json(run_dir(Path(store), run) / FILE) or {}
    acknowledged, muted = found.get("acknowledged"), found.get("muted")
    return Marks(
        {
            rule: Acknowledged(one["first_step"], float(one["ts"]))
            for rule, one in (acknowledged if isinstance(acknowledged, dict) else {}).items()
            if _has(one, "first_step", int) and _has(one, "ts", int, float)
        },
        {
            rule: Muted(one.get("until_step"), float(one["ts"]))
            for rule, one in (muted if isinstance(muted, dict) else {}).items()
            if _has(one, "ts", int, float) and (one.get("until_step") is None or _has(one, "until_step", int))
        },
    )


def acknowledge(store: str | Path, run: str, rule: str, first_step: int) -> None:
    """Mark an episode as seen. Raises StoreError."""
    _change(store, run, "acknowledged", rule, Acknowledged(first_step, time.time()))


def mute(store: str | Path, run: str, rule: str, until_step: int | None = None) -> None:
    """Keep a rule from the routes. Raises StoreError."""
    _change(store, run, "muted", rule, Muted(until_step, time.time()))


def unmute(store: str | Path, run: str, rule: str) -> None:
    """Deliver a rule again, from its next transition on. Raises StoreError."""
    _change(store, run, "muted", rule, None)


def _change(store: str | Path, run: str, kind: str, rule: str, mark: Any) -> None:
    folder = run_dir(Path(store), run)
    try:
        lock = FileLock(folder / "alerts.lock", wait_s=_WAIT_S)
        try:
            marks = asdict(read_marks(store, run))
            marks[kind].pop(rule, None)
            if mark is not None:
                marks[kind][rule] = asdict(mark)
            replace_text(folder / FILE, json.dumps(marks, indent=1))
        finally:
            lock.release()
    except OSError as error:
        raise StoreError(f"Cannot write {str(folder / FILE)!r}: {error}. Check who may write there.") from None


def _has(one: Any, name: str, *kinds: type) -> bool:
    return isinstance(one, dict) and isinstance(one.get(name), kinds) and not isinstance(one[name], bool)
