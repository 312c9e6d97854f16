"""What a run is doing, judged from its heartbeat alone: the one place that decides crashed and stalled."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from typing import Any

HEARTBEAT_FRESH_S = 15.0  # the recorder renews its heartbeat each second
STALL_MIN_S = 60.0
STALL_STEPS = 6.0  # median step times without a new step
_WORST_FIRST = ("failed", "crashed", "stalled", "running", "stopped", "finished")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it exists and is another user's
    return True


def run_status(
    heartbeat: Mapping[str, Any], now: float, median_step_s: float | None = None, last_step_ts: float | None = None
) -> str:
    """running, finished, stopped, stalled, crashed or failed.

    heartbeat: the content of heartbeat-rXXX.json (status, pid, host, ts). A final status is believed. "running" needs
    a heartbeat younger than 15 s and, on this host, a living process: else it crashed. With a fresh heartbeat but no
    step since `last_step_ts` (or the heartbeat's own `step_ts`) for max(60 s, 6 * median_step_s) it stalled.
    """
    status = str(heartbeat.get("status", "running"))
    if status != "running":
        return status
    if now - float(heartbeat.get("ts", 0.0)) > HEARTBEAT_FRESH_S:
        return "crashed"
    pid = int(heartbeat.get("pid", 0))
    if pid > 0 and heartbeat.get("host") == socket.gethostname() and not _alive(pid):
        return "crashed"
    stepped = last_step_ts if last_step_ts is not None else heartbeat.get("step_ts")
    patience = max(STALL_MIN_S, STALL_STEPS * (median_step_s or 0.0))
    if stepped is not None and now - float(stepped) > patience:
        return "stalled"
    return "running"


def worst_status(statuses: Iterable[str]) -> str:
    """The status of a run of several ranks: the worst of theirs; "crashed" when no rank ever gave a heartbeat."""
    known = set(statuses)
    return next((status for status in _WORST_FIRST if status in known), "crashed")
