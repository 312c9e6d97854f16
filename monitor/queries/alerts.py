"""Questions about alerts and events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np

from monitor.queries.frames import Frame, frame, n_rows


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

    severity, value and message are those of the worst firing transition; pending transitions never show.
    """
    spans: dict[tuple[Any, ...], dict[str, Any]] = {}
    ranks = {"info": 0, "warning": 1, "critical": 2}
    for i in range(n_rows(log)):
        row = {name: column[i] for name, column in log.items()}
        key = (row["run"], row["rule"], row["first_step"])
        if row["state"] == "firing":
            known = spans.get(key)
            if known is None or ranks.get(row["severity"], 0) > ranks.get(known["severity"], 0):
                spans[key] = row | {"end_step": np.nan}
            else:
                known["end_step"] = np.nan
        elif row["state"] == "resolved" and key in spans:
            spans[key]["end_step"] = float(row["step"])
    names = ("run", "rule", "severity", "first_step", "end_step", "value", "baseline", "threshold", "message", "action")
    kinds = {"first_step": int, "end_step": float, "value": float, "baseline": float, "threshold": float}
    ordered = sorted(spans.values(), key=lambda span: (span["run"], span["first_step"]))
    return {name: np.array([span[name] for span in ordered], kinds.get(name, object)) for name in names}


def events(con: duckdb.DuckDBPyConnection, runs: Sequence[str]) -> Frame:
    """run, step (nan outside any), ts, kind, message; newest first."""
    return frame(
        con,
        "SELECT run, CAST(step AS DOUBLE) AS step, ts, kind, message FROM events "
        "WHERE run IN (SELECT unnest(?)) ORDER BY ts DESC, step DESC",
        [list(runs)],
    )
