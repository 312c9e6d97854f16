"""Questions about alerts, verdicts and events."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np

from monitor.alerts.episodes import Episode, episodes
from monitor.queries.frames import Frame, frame, n_rows
from monitor.records import Alert
from monitor.store.reader import Store


def alert_log(con: duckdb.DuckDBPyConnection, runs: Sequence[str]) -> Frame:
    """Every transition of every alert, oldest first."""
    return frame(
        con,
        "SELECT run, step, ts, rule, severity, state, first_step, value, baseline, threshold, message, action "
        "FROM alerts WHERE run IN (SELECT unnest(?)) ORDER BY run, step, ts",
        [list(runs)],
    )


def alert_spans(log: Frame) -> Frame:
    """One row for each alert that fired: when it fired first, when it was worst, when it ended.

    run, rule, first_step; severity and worst_step: its highest severity and the step that it turned so; end_step: nan
    while it fires. What was measured stands with each transition alone: `alert_transitions`.
    """
    spans = [
        {
            "run": run,
            "rule": episode.first.rule,
            "severity": episode.worst.severity,
            "first_step": episode.first.first_step,
            "worst_step": episode.worst.step,
            "end_step": np.nan if episode.resolved_step is None else episode.resolved_step,
        }
        for run, episode in _episodes(log)
    ]
    kinds = {"first_step": int, "worst_step": int, "end_step": float}
    names = ("run", "rule", "severity", *kinds)
    return {name: np.array([span[name] for span in spans], kinds.get(name, object)) for name in names}


def alert_transitions(log: Frame) -> Frame:
    """One row for each transition of the alerts that fired, alert by alert, each with its own numbers.

    The columns of `alert_log`, and until: the step of the same alert's next transition, nan after the last one.
    first_step is the same in all transitions of an alert; pending ones never show.
    """
    rows = [
        vars(transition) | {"until": np.nan if following is None else following.step}
        for _, episode in _episodes(log)
        for transition, following in zip(episode.transitions, [*episode.transitions[1:], None], strict=True)
    ]
    kinds = {name: column.dtype for name, column in log.items()} | {"until": np.dtype(float)}
    return {name: np.array([row[name] for row in rows], kind) for name, kind in kinds.items()}


def _episodes(log: Frame) -> Iterator[tuple[str, Episode[Any]]]:
    of_run: dict[str, list[Any]] = {}
    for i in range(n_rows(log)):
        row = SimpleNamespace(**{name: column[i] for name, column in log.items()})
        of_run.setdefault(row.run, []).append(row)
    for run, rows in of_run.items():
        for episode in episodes(rows):
            yield run, episode


def verdicts(con: duckdb.DuckDBPyConnection | Store, runs: Sequence[str], until: int | None = None) -> Frame:
    """run, health, sentence, step (nan without one), ts: the newest word on each run that has one.

    It is the newest event of kind "verdict", in which a run's alert engine notes "<health>: <sentence>" as soon as it
    can judge the run, whenever an alert fires or resolves, and at the end. health is too early, healthy, info, warning
    or critical. Of a run without any (of an older version, or of another engine) it is the newest alert that fires: its
    severity and message. until: of what was said up to this step; None: of all.
    """
    return frame(
        con,
        """
        WITH asked AS (SELECT unnest(CAST(? AS VARCHAR[])) AS run), said AS (
            SELECT run, told.health, told.sentence, step, ts
            FROM (SELECT *, regexp_extract(message, '(?s)^(too early|healthy|info|warning|critical): (.+)$',
                                           ['health', 'sentence']) AS told
                  FROM events SEMI JOIN asked USING (run) WHERE kind = 'verdict'
                  AND (step <= ?::BIGINT) IS NOT FALSE)
            WHERE told.health <> ''
            QUALIFY row_number() OVER (PARTITION BY run ORDER BY attempt DESC, ts DESC) = 1
        ), newest AS (
            SELECT run, state, severity AS health, message AS sentence, step, ts
            FROM alerts SEMI JOIN asked USING (run) ANTI JOIN said USING (run)
            WHERE (step <= ?::BIGINT) IS NOT FALSE
            QUALIFY row_number() OVER (PARTITION BY run, rule ORDER BY step DESC, ts DESC) = 1
        ), fires AS (
            SELECT run, health, sentence, step, ts FROM newest WHERE state = 'firing'
            QUALIFY row_number() OVER (PARTITION BY run ORDER BY step DESC, ts DESC) = 1
        )
        SELECT run, health, sentence, CAST(step AS DOUBLE) AS step, ts
        FROM (FROM said UNION ALL FROM fires) ORDER BY run
        """,
        [list(runs), until, until],
    )


def verdict_texts(con: duckdb.DuckDBPyConnection | Store, runs: Sequence[str]) -> dict[str, str]:
    """{run: "<health>: <sentence>"} of `verdicts`, as commands print it."""
    rows = verdicts(con, runs)
    told = zip(rows["run"], rows["health"], rows["sentence"], strict=True)
    return {str(run): f"{health}: {sentence}" for run, health, sentence in told}


def actions(con: duckdb.DuckDBPyConnection, runs: Sequence[str]) -> Frame:
    """run, step, message of what the trainer did because of an alert, and of what it took back; oldest first."""
    return frame(
        con,
        "SELECT run, step, message FROM events WHERE run IN (SELECT unnest(?)) AND step IS NOT NULL "
        "AND kind IN ('action', 'action_undone') ORDER BY run, step, ts",
        [list(runs)],
    )


def milestones(con: duckdb.DuckDBPyConnection, run: str) -> Frame:
    """step, what ("checkpoint" or "resume"), message: saved checkpoints, and the first step of each later attempt."""
    return frame(
        con,
        """
        SELECT step, 'checkpoint' AS what, message FROM events
        WHERE run = ? AND kind = 'checkpoint' AND step IS NOT NULL
        UNION ALL
        SELECT min(step), 'resume', format('Attempt {} begins.', attempt) FROM committed
        WHERE run = ? AND attempt > 1 GROUP BY attempt
        ORDER BY step, what
        """,
        [run, run],
    )


def stop_step(con: duckdb.DuckDBPyConnection | Store, run: str, attempt: int) -> int | None:
    """The step at which the action `stop` ended an attempt of a run; None if none did."""
    rows = frame(
        con,
        "SELECT step FROM events WHERE run = ? AND attempt = ? AND kind = 'action' AND step IS NOT NULL "
        "AND starts_with(message, 'stop for ')",
        [run, attempt],
    )
    return int(rows["step"].max()) if n_rows(rows) else None


def events(con: duckdb.DuckDBPyConnection, runs: Sequence[str]) -> Frame:
    """run, step (nan for an event outside of steps), ts, kind, message; newest first."""
    return frame(
        con,
        "SELECT run, CAST(step AS DOUBLE) AS step, ts, kind, message FROM events "
        "WHERE run IN (SELECT unnest(?)) ORDER BY ts DESC, step DESC",
        [list(runs)],
    )


def to_alert(row: Mapping[str, Any]) -> Alert:
    """A row of the table `alerts` as the transition that it records; a NULL number is nan."""
    known = {spec.name: row[spec.name] for spec in fields(Alert)}
    numbers = {name: math.nan if known[name] is None else known[name] for name in ("value", "baseline", "threshold")}
    return Alert(**known | numbers)
