"""The history of all runs' alerts, read run by run as they change, and what people said of them."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from monitor.alerts.marks import FILE, Marks, read_marks
from monitor.queries.alerts import alert_log, alert_transitions
from monitor.queries.frames import Frame, n_rows, select
from monitor.records import SEVERITY_RANK
from monitor.store.schema import run_dir
from monitor.store.tail import Tail

NO_MARKS = Marks({}, {})


class MarksReader:
    """The marks of runs. A run's file is read again only when it changed; until then the same object is returned."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._known: dict[str, tuple[tuple[int, ...], Marks]] = {}

    def read(self, run: str) -> Marks:
        try:
            found = os.stat(run_dir(self._store, run) / FILE)
        except OSError:
            self._known.pop(run, None)
            return NO_MARKS
        state = (found.st_mtime_ns, found.st_size, found.st_ino)
        if run not in self._known or self._known[run][0] != state:
            self._known[run] = (state, read_marks(self._store, run))
        return self._known[run][1]


@dataclass(frozen=True, slots=True, eq=False)
class PastAlert:
    """One alert that fired, from its first firing on, with all its transitions (columns of `alert_transitions`)."""

    run: str
    rule: str
    severity: str  # the highest it had
    first_step: int
    end_step: int | None  # None while it fires
    ts: float  # of its newest transition
    message: str  # of its newest transition
    transitions: Frame


class AlertHistory:
    """Every alert of a store that fired. Threads may share it."""

    def __init__(self, tail: Tail) -> None:
        self._tail = tail
        self._lock = threading.Lock()
        self._versions: dict[str, int] = {}
        self._of: dict[str, list[PastAlert]] = {}
        self._marks = MarksReader(tail.store)

    def read(self) -> list[tuple[PastAlert, Marks]]:
        """Alerts with the marks of their runs: those that fire first, then by the time of their last transition."""
        with self._lock:
            entries = dict(self._tail.runs)
            for gone in self._versions.keys() - entries.keys():
                self._versions.pop(gone)
                self._of.pop(gone, None)
            changed = [name for name, entry in entries.items() if self._versions.get(name) != entry.version]
            if changed:
                rows = alert_transitions(alert_log(self._tail.cursor(), changed))
                for name in changed:
                    self._versions[name] = entries[name].version
                    self._of[name] = _alerts(select(rows, rows["run"] == name))
            found = [(alert, self._marks.read(name)) for name, alerts in self._of.items() for alert in alerts]
            return sorted(found, key=lambda one: (one[0].end_step is not None, -one[0].ts, one[0].run, one[0].rule))


def _alerts(rows: Frame) -> list[PastAlert]:
    """The alerts of one run from its transitions."""
    found = []
    keys = [(str(rule), int(first)) for rule, first in zip(rows["rule"], rows["first_step"], strict=True)]
    for rule, first in dict.fromkeys(keys):
        mine = select(rows, np.array([key == (rule, first) for key in keys]))
        last = n_rows(mine) - 1
        worst = max((str(severity) for severity in mine["severity"]), key=lambda one: SEVERITY_RANK.get(one, 0))
        end = int(mine["step"][last]) if mine["state"][last] == "resolved" else None
        found.append(
            PastAlert(str(mine["run"][0]), rule, worst, first, end, float(mine["ts"][last]),
                      str(mine["message"][last]), mine)
        )  # fmt: skip
    return found
