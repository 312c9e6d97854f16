"""Questions about alerts and events."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import duckdb
import numpy as np

from monitor.alerts.episodes import episodes
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
