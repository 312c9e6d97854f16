"""Replay of the alert rules on a recorded series: exactly the alerts that a live run would have raised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monitor.alerts.engine import SERIES, AlertEngine
from monitor.alerts.episodes import episodes
from monitor.alerts.rules import DEFAULT_RULES, Rule
from monitor.records import Alert, finite


def replay(series: Mapping[str, Any], *, warmup_steps: int = 0, rules: Sequence[Rule] = DEFAULT_RULES) -> list[Alert]:
    """Every transition of the rules over a series, oldest first.

    series: columns of equal length, "step" (strictly increasing integers) and "entropy" (nats), and where known
    "reward" and "response_length". None in a column is a missing value, nan or inf in "entropy" a broken one.
    Raises ValueError for missing, unequal or unordered columns.
    """
    missing = [key for key in ("step", "entropy") if key not in series]
    if missing:
        raise ValueError(f"The series has no column {', '.join(missing)}. Its columns: {', '.join(series) or 'none'}.")
    steps = [int(step) for step in series["step"]]
    columns = {key: series[key] for key in SERIES if key in series}
    for key, column in columns.items():
        if len(column) != len(steps):
            raise ValueError(f"Column {key!r} has {len(column)} rows, expected {len(steps)} like 'step'.")
    if np.any(np.diff(steps) <= 0):
        raise ValueError("Steps must be strictly increasing; sort the rows and keep the last of each step.")
    engine = AlertEngine(rules, warmup_steps)
    alerts = []
    for index, step in enumerate(steps):
        row = {key: float(column[index]) for key, column in columns.items() if column[index] is not None}
        alerts += engine.observe(step, row)
    return alerts


def evaluate_alerts(series: Mapping[str, Any], *, warmup_steps: int = 0) -> list[dict[str, Any]]:
    """The alerts that a recorded series raises, one dict for each that fired, by first firing; `rlvr check` in Python.

    series: columns of equal length, "step" (strictly increasing integers) and "entropy" (nats), and where known
    "reward" and "response_length"; None is a missing value. warmup_steps: steps after the first that the baseline
    leaves out. Keys of each dict: rule, severity, step, value, baseline, threshold, message, action, resolved_step.
    Raises ValueError for missing, unequal or unordered columns.

    Example: evaluate_alerts({"step": steps, "entropy": entropies})[0]["message"]
    """
    return fired(replay(series, warmup_steps=warmup_steps))


def fired(alerts: Sequence[Alert]) -> list[dict[str, Any]]:
    """One dict for each alert that fired, by first firing; never one that stayed pending.

    "severity" and "message" are those of its worst transition, "step" that of its first firing, "value", "baseline"
    and "threshold" those at the first firing, "resolved_step" None while it still fires at the end.
    """
    return [
        {
            "rule": episode.first.rule,
            "severity": episode.worst.severity,
            "step": episode.first.first_step,
            "value": finite(episode.first.value),
            "baseline": finite(episode.first.baseline),
            "threshold": finite(episode.first.threshold),
            "message": episode.worst.message
            + (f" (step {episode.worst.step})" if episode.worst is not episode.first else ""),
            "action": episode.first.action,
            "resolved_step": episode.resolved_step,
        }
        for episode in episodes(alerts)
    ]
