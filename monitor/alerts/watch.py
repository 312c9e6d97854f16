"""Watcher: the alerts of every run of a store, also of those that nobody judges, and of those that stop.

A run whose recorder has an engine (`judged` in its heartbeat; where an older version wrote it, rows in `alerts`) is not
judged again: its recorded transitions are taken as they are. The others are judged here, from their first step on, so
that the state is right whenever the watcher starts. Nothing is written into a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monitor.alerts.engine import AlertEngine
from monitor.alerts.episodes import episodes
from monitor.alerts.rules import DEFAULT_RULES, Rule
from monitor.alerts.settings import STATUS_RULES
from monitor.queries.alerts import to_alert, verdict_texts
from monitor.records import Alert
from monitor.store.runs import patience_s
from monitor.store.tail import RunEntry, Tail

LIVE = ("running", "stalled")


@dataclass(frozen=True, slots=True)
class Change:
    """A transition of a run. at: for `Outbox.put`, of a rule on the run's status."""

    run: str
    alert: Alert
    at: float | None = None


@dataclass(slots=True)
class _Watched:
    """What is known of one run."""

    version: int = -1
    status: str = "running"
    attempt: int = 0
    engine: AlertEngine | None = None
    step: int = -1  # of the newest rows that were judged here, and
    keys: set[str] = field(default_factory=set)  # which of its scalars
    alerts: list[Alert] = field(default_factory=list)  # transitions of the run's line of history
    stops: list[Change] = field(default_factory=list)  # transitions of its status
    returned: set[tuple[object, ...]] = field(default_factory=set)  # what a poll has returned before

    def history(self) -> list[Alert]:
        return [*self.alerts, *(change.alert for change in self.stops)]


class Watcher:
    """Follows the store at `store`; `poll()` returns what has changed since the last one."""

    def __init__(self, store: Path, rules: Sequence[Rule] = DEFAULT_RULES) -> None:
        self._tail = Tail(store, min_interval_s=0.0, histograms=False)
        self._rules = rules
        self._runs: dict[str, _Watched] = {}

    def poll(self) -> list[Change]:
        """Every new transition, by run, the first time all there are; oldest first."""
        self._tail.poll()
        for gone in self._runs.keys() - self._tail.runs.keys():
            del self._runs[gone]
        return [change for entry in list(self._tail.runs.values()) for change in self._follow(entry)]

    def is_live(self, run: str) -> bool:
        """Whether a run's writer lives."""
        return self._tail.runs[run].status in LIVE

    def statuses(self) -> dict[str, str]:
        """The status of every run."""
        return {name: entry.status for name, entry in self._tail.runs.items()}

    def firing(self) -> list[tuple[str, Alert]]:
        """(run, worst transition) of every alert that fires now."""
        return [
            (run, episode.worst)
            for run, watched in self._runs.items()
            for episode in episodes(watched.history())
            if episode.resolved_step is None
        ]

    def fired(self) -> list[tuple[str, Alert]]:
        """(run, first transition) of every alert that has fired, ended ones too."""
        return [(run, e.first) for run, watched in self._runs.items() for e in episodes(watched.history())]

    def verdict(self, run: str) -> str | None:
        """What there is to say of a run, after its health: the newest of the run itself, or of the engine here."""
        engine = self._runs[run].engine
        if engine is not None:
            found = engine.verdict()
            return f"{found.health}: {found.sentence}"
        return verdict_texts(self._tail.cursor(), [run]).get(run)

    def close(self) -> None:
        self._tail.close()

    def _follow(self, entry: RunEntry) -> list[Change]:
        watched = self._runs.setdefault(entry.name, _Watched())
        if entry.version == watched.version:
            return []
        watched.version = entry.version
        attempt = max((int(beat.get("attempt", 0)) for beat in entry.heartbeats), default=0)
        if attempt != watched.attempt:  # its history may have changed: judge it again
            watched.attempt, watched.engine, watched.step, watched.alerts = attempt, None, -1, []
        if self._is_judged(entry):
            watched.alerts = self._recorded(entry)
        else:
            watched.alerts += self._judge(entry, watched)
        watched.stops += _status_changes(entry, watched)
        changes = [*(Change(entry.name, alert) for alert in watched.alerts), *watched.stops]
        fresh = [change for change in changes if _key(change) not in watched.returned]
        watched.returned.update(map(_key, fresh))
        return fresh

    def _is_judged(self, entry: RunEntry) -> bool:
        told = [beat["judged"] for beat in entry.heartbeats if isinstance(beat.get("judged"), bool)]
        if told:
            return any(told)
        found = self._tail.cursor().execute("SELECT 1 FROM alerts WHERE run = ? LIMIT 1", [entry.name]).fetchone()
        return found is not None

    def _recorded(self, entry: RunEntry) -> list[Alert]:
        cursor = self._tail.cursor().execute("SELECT * FROM alerts WHERE run = ? ORDER BY step, ts", [entry.name])
        names = [column[0] for column in cursor.description or ()]
        return [to_alert(dict(zip(names, row, strict=True))) for row in cursor.fetchall()]

    def _judge(self, entry: RunEntry, watched: _Watched) -> list[Alert]:
        """Feed the engine what is new: a later value of the newest step (an evaluation) comes as a row of its own."""
        if watched.engine is None:
            watched.engine = AlertEngine(self._rules, max(0, int(entry.info.get("warmup_steps") or 0)))
        rows: dict[int, dict[str, float]] = {}
        query = (
            "SELECT step, name, value FROM steps WHERE run = ? AND rank = 0 AND step >= ? "
            "AND name IN (SELECT unnest(?)) ORDER BY step"
        )
        asked = [entry.name, watched.step, list(watched.engine.series)]
        for step, name, value in self._tail.cursor().execute(query, asked).fetchall():
            if step > watched.step or name not in watched.keys:
                rows.setdefault(step, {})[name] = math.nan if value is None else value
        alerts = []
        for step, scalars in rows.items():
            alerts += watched.engine.observe(step, scalars)
            watched.keys = set(scalars) | (watched.keys if step == watched.step else set())
            watched.step = step
        return alerts


def _key(change: Change) -> tuple[object, ...]:
    alert = change.alert
    return alert.rule, alert.first_step, alert.state, alert.severity, alert.step, change.at


def _status_changes(entry: RunEntry, watched: _Watched) -> list[Change]:
    """Transitions of `stalled` and `crashed`, once an episode."""
    before, watched.status = watched.status, entry.status
    if entry.status == before:
        return []
    beat = max(entry.heartbeats, key=lambda one: (one.get("attempt", 0), one.get("ts") or 0.0), default={})
    step = max((int(one.get("acknowledged") or 0) for one in entry.heartbeats), default=0)
    changes = []
    for rule in STATUS_RULES:
        was, now = _rule_of(before) == rule, _rule_of(entry.status) == rule
        if now and not was:
            since = (beat.get("last_step_ts") if rule == "stalled" else beat.get("ts")) or beat.get("started") or 0.0
            changes.append(Change(entry.name, _status_alert(rule, entry, beat, step, "firing"), since))
        elif was and not now:
            first = next(c.alert.first_step for c in reversed(watched.stops) if c.alert.rule == rule)
            alert = _status_alert(rule, entry, beat, max(step, first), "resolved", first)
            changes.append(Change(entry.name, alert, beat.get("ts") or 0.0))
    return changes


def _rule_of(status: str) -> str:
    return {"stalled": "stalled", "crashed": "crashed", "failed": "crashed"}.get(status, "")


def _status_alert(
    rule: str, entry: RunEntry, beat: Mapping[str, Any], step: int, state: Any, first: int | None = None
) -> Alert:
    ts, last = beat.get("ts") or 0.0, beat.get("last_step_ts")
    idle_s = max(0.0, ts - last) if last else math.nan
    patience = patience_s(beat)
    action = ""
    if state == "resolved":
        message = f"The run is {entry.status}; it was {rule} after step {step if first is None else first}."
    elif rule == "stalled":
        message = f"No step has come for {idle_s:.0f} s after step {step}; expected one within {patience:.0f} s."
        action = "Look at what the trainer waits for: a reward function, a rollout server, a lost device or rank."
    else:
        how = "has failed" if entry.status == "failed" else "has crashed: its process is gone"
        message = f"The run {how}. Its last durable step is {step}."
        action = f"Read its output and its events (rlvr show {entry.name}); go on from the newest checkpoint."
    return Alert(
        rule=rule,
        severity="warning" if rule == "stalled" else "critical",
        state=state,
        step=step,
        first_step=step if first is None else first,
        value=idle_s,
        baseline=math.nan,
        threshold=patience if rule == "stalled" else math.nan,
        message=message,
        action=action,
    )
