"""Questions about alerts and events."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np

from monitor.alerts.episodes import episodes
from monitor.alerts.marks import read_marks
from monitor.queries.frames import Frame, frame, n_rows
from monitor.records import Alert


def alert_log(con: duckdb.DuckDBPyConnection, runs: Sequence[str]) -> Frame:
    """Every transition of every alert, oldest first."""
    return frame(
        con,
        "SELECT run, step, ts, rule, severity, state, first_step, value, baseline, threshold, message, action "
        "FROM alerts WHERE run IN (SELECT unnest(?)) ORDER BY run, step, ts",
        [list(runs)],
    )


def alert_spans(log: Frame) -> Frame:
    """One row for each alert that fired: run, rule, severity, first_step, end_step (nan while it fires), value, ...

    severity, value and message are those of the worst firing transition. Alerts that were only pending have no row.
    """
    rows = [SimpleNamespace(**{name: column[i] for name, column in log.items()}) for i in range(n_rows(log))]
    spans = [
        vars(episode.worst) | {"end_step": np.nan if episode.resolved_step is None else float(episode.resolved_step)}
        for run in dict.fromkeys(row.run for row in rows)
        for episode in episodes(row for row in rows if row.run == run)
    ]
    names = ("run", "rule", "severity", "first_step", "end_step", "value", "baseline", "threshold", "message", "action")
    kinds = {"first_step": int, "end_step": float, "value": float, "baseline": float, "threshold": float}
    return {name: np.array([span[name] for span in spans], kinds.get(name, object)) for name in names}


def events(con: duckdb.DuckDBPyConnection, runs: Sequence[str]) -> Frame:
    """run, step (nan for an event outside of steps), ts, kind, message; newest first."""
    return frame(
        con,
        "SELECT run, CAST(step AS DOUBLE) AS step, ts, kind, message FROM events "
        "WHERE run IN (SELECT unnest(?)) ORDER BY ts DESC, step DESC",
        [list(runs)],
    )


def acknowledgements(store: str | Path, run: str) -> Frame:
    """run, rule, kind (acknowledged or muted), step, ts; step: of the seen episode's start, or the last muted one.

    step is nan for a rule that is muted until it is unmuted. Reads alerts.json of the run; none if there is none.
    """
    marks = read_marks(store, run)
    rows: list[tuple[str, str, float, float]] = [
        *((rule, "acknowledged", float(one.first_step), one.ts) for rule, one in marks.acknowledged.items()),
        *(
            (rule, "muted", math.nan if one.until_step is None else float(one.until_step), one.ts)
            for rule, one in marks.muted.items()
        ),
    ]
    columns: dict[str, Any] = {"run": [run] * len(rows)}
    columns |= {name: [row[i] for row in rows] for i, name in enumerate(("rule", "kind", "step", "ts"))}
    kinds = {"step": float, "ts": float}
    return {name: np.array(column, kinds.get(name, object)) for name, column in columns.items()}


def to_alert(row: Mapping[str, Any]) -> Alert:
    """A row of the table `alerts` as the transition that it records; a NULL number is nan."""
    known = {spec.name: row[spec.name] for spec in fields(Alert)}
    numbers = {name: math.nan if known[name] is None else known[name] for name in ("value", "baseline", "threshold")}
    return Alert(**known | numbers)
