"""The outbox: which transitions are news, written to a file before they are delivered, and which have been delivered.

One message for an episode, one for each escalation and one for its end; a replay of steps that were told already, after
a restart say, is no news. The file is a line of JSON for each thing that happened, appended and fsynced. A killed
process loses none of what it has put there, and a message whose delivery is not noted is delivered again: at least
once, with the same id. Opening it leaves only what is still of use: the last news of each rule and what still waits.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from monitor.errors import StoreError
from monitor.records import SEVERITY_RANK, Alert, finite
from monitor.store.locks import FileLock
from monitor.store.segments import fsync_folder, replace_text

_log = logging.getLogger("rlvr.monitor")
WAITING = 1000  # messages that wait for delivery; a storm's further ones are left out and counted
NAME = "alerts-outbox.jsonl"  # in a run's folder (of its trainer) or in a store (of `rlvr watch`)


@dataclass(frozen=True, slots=True)
class Message:
    """One piece of news. id: the same whenever it is delivered again. to: the routes that wanted it, by source."""

    id: str
    run: str
    alert: Alert
    to: tuple[str, ...]
    ts: float


@dataclass(frozen=True, slots=True)
class _Told:
    """The last news of a rule of a run. at: its step, or whatever grows from one episode to the next."""

    state: str
    first_step: int
    severity: str
    at: float


class Outbox:
    """The news of one run or store. Safe to share by threads. Raises StoreError if another process has it open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out = 0
        self._told: dict[tuple[str, str], _Told] = {}
        self._runs: set[str] = set()  # that have been looked at before
        self._waiting: dict[str, Message] = {}  # by id, oldest first
        self._undone: dict[str, set[str]] = {}  # id: sources that still have to deliver it
        self._changed = threading.Condition()
        self._torn = self._faulty = False
        try:
            self._lock = FileLock(path.with_suffix(".lock"))
        except BlockingIOError:
            raise StoreError(f"Another process delivers from {str(path)!r}. Stop it first.") from None
        except OSError as error:
            raise StoreError(f"Cannot open {str(path)!r}: {error}. Check who may write there.") from None
        try:
            self._read()
            self._rewrite()
            self._file = path.open("a", encoding="utf-8")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._lock.release()
            raise StoreError(f"Cannot write {str(path)!r}: {error}. Free some space there.") from None

    def knows(self, run: str) -> bool:
        """Whether news of a run was put here before."""
        return run in self._runs

    def put(
        self,
        run: str,
        alerts: Sequence[Alert],
        to: Callable[[str, Alert], Iterable[str]],
        at: float | None = None,
    ) -> list[Alert]:
        """Those of the transitions that are news, now durable; `to` says which sources want one.

        at: what tells episodes apart that steps cannot (a run that crashes twice at one step); none: the step.
        """
        with self._changed:
            lines, news = self._seen(run), []
            for alert in alerts:
                if not self._is_news(run, alert, alert.step if at is None else at):
                    continue
                news.append(alert)
                sources = tuple(dict.fromkeys(to(run, alert)))
                message = Message(_id(run, alert, at), run, alert, sources, time.time())
                if sources and len(self._waiting) >= WAITING:
                    self.left_out += 1
                    if self.left_out == 1:
                        _log.warning("%d alerts wait for delivery: further ones are not delivered.", WAITING)
                    message = replace(message, to=())
                self._hold(message)
                lines.append(_line(message, at))
            self._append(lines)
            self._changed.notify_all()
            return news

    def skip(self, run: str, alerts: Sequence[Alert], at: float | None = None) -> None:
        """Take transitions as told: the past of a run that is looked at for the first time."""
        self.put(run, alerts, lambda run, alert: (), at)

    def next(self, source: str, index: int, timeout_s: float) -> Message | None:
        """The message at `index`, counted round, of those that a source still has to deliver; waits for one."""
        with self._changed:
            self._changed.wait_for(lambda: self._of(source), timeout_s)
            waiting = self._of(source)
            return waiting[index % len(waiting)] if waiting else None

    def done(self, source: str, message: Message, how: str) -> None:
        """Note that a source need not deliver a message (again): it was "sent", "muted" or "given_up"."""
        with self._changed:
            self._finish(source, message.id)
            self._append([{"done": message.id, "source": source, "how": how, "ts": time.time()}])
            self._changed.notify_all()

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until nothing waits for delivery."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout_s)

    def keep_only(self, sources: Iterable[str]) -> None:
        """Forget what waits for sources that are no longer there."""
        known = set(sources)
        with self._changed:
            for id in list(self._waiting):
                for source in self._undone[id] - known:
                    self._finish(source, id)

    @property
    def waiting(self) -> list[Message]:
        with self._changed:
            return list(self._waiting.values())

    def close(self) -> None:
        """Let go of the file. What waits stays in it."""
        with self._changed:
            self._file.close()
            self._lock.release()

    def _of(self, source: str) -> list[Message]:
        return [message for id, message in self._waiting.items() if source in self._undone[id]]

    def _seen(self, run: str) -> list[dict[str, Any]]:
        if run in self._runs:
            return []
        self._runs.add(run)
        return [{"run": run}]

    def _is_news(self, run: str, alert: Alert, at: float) -> bool:
        """Whether people have to hear of a transition; if so, it counts as told."""
        told = self._told.get((run, alert.rule))
        if alert.state == "firing":
            same = told is not None and told.state == "firing" and told.first_step == alert.first_step
            if told is not None and same:
                news = SEVERITY_RANK[alert.severity] > SEVERITY_RANK[told.severity]
            else:
                news = told is None or at > told.at
        else:
            news = alert.state == "resolved" and told is not None and told.state == "firing" and at >= told.at
        if news:
            self._told[run, alert.rule] = _Told(alert.state, alert.first_step, alert.severity, at)
        return news

    def _hold(self, message: Message) -> None:
        if message.to:
            self._waiting[message.id] = message
            self._undone[message.id] = set(message.to)

    def _finish(self, source: str, id: str) -> None:
        undone = self._undone.get(id, set())
        undone.discard(source)
        if not undone:
            self._waiting.pop(id, None)
            self._undone.pop(id, None)

    def _read(self) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                self._replay(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError):  # cut off by a kill, or of a later version
                continue

    def _replay(self, found: dict[str, Any]) -> None:
        if "done" in found:
            self._finish(found["source"], found["done"])
        elif "told" in found:
            self._runs.add(found["run"])
            self._told[found["run"], found["rule"]] = _Told(**found["told"])
        elif "id" in found:
            self._runs.add(found["run"])
            raw: dict[str, Any] = {key: math.nan if value is None else value for key, value in found["alert"].items()}
            message = Message(found["id"], found["run"], Alert(**raw), tuple(found["to"]), float(found["ts"]))
            alert, at = message.alert, found["at"]
            self._told[message.run, alert.rule] = _Told(alert.state, alert.first_step, alert.severity, at)
            self._hold(message)
        else:
            self._runs.add(found["run"])

    def _rewrite(self) -> None:
        lines: list[dict[str, Any]] = [{"run": run} for run in sorted(self._runs)]
        for id, message in self._waiting.items():
            lines.append(_line(replace(message, to=tuple(sorted(self._undone[id]))), None))
        for (run, rule), told in self._told.items():  # last: the news that waits may be older
            lines.append({"run": run, "rule": rule, "told": asdict(told)})
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        fsync_folder(self.path.parent)

    def _append(self, lines: list[dict[str, Any]]) -> None:
        """Make lines durable. Where the disk refuses, delivery goes on from memory."""
        if not lines:
            return
        text = ("\n" if self._torn else "") + "".join(json.dumps(line) + "\n" for line in lines)
        try:
            self._file.write(text)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._torn = False
        except (OSError, ValueError) as error:  # ValueError: closed
            self._torn = True
            if not self._faulty:
                self._faulty = True
                _log.warning("Cannot write %s: %s. A restart may deliver alerts again.", self.path, error)


def _id(run: str, alert: Alert, at: float | None) -> str:
    parts = [run, alert.rule, alert.first_step, alert.state, alert.severity, alert.step]
    return "/".join(str(part) for part in ([*parts, at] if at is not None else parts))


def _line(message: Message, at: float | None) -> dict[str, Any]:
    alert = finite(asdict(message.alert))
    where = message.alert.step if at is None else at
    return {
        "id": message.id, "run": message.run, "alert": alert, "to": list(message.to), "ts": message.ts, "at": where
    }  # fmt: skip
