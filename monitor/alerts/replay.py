"""Replay of the alert rules on a recorded series: exactly the alerts that a live run would have raised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monitor.alerts.engine import AlertEngine
from monitor.alerts.episodes import episodes
from monitor.alerts.judgement import Verdict
from monitor.alerts.rules import DEFAULT_RULES, Rule
from monitor.records import Alert, finite


def replay(series: Mapping[str, Any], *, warmup_steps: int = 0, rules: Sequence[Rule] = DEFAULT_RULES) -> list[Alert]:
    """Every transition of the rules over a series, oldest first.

    series: columns of equal length, "step" (strictly increasing integers) and any keys of METRICS; those that no rule
    looks at are ignored. None in a column is a missing value, nan or inf a broken one. Raises ValueError for missing,
    unequal or unordered columns, and if no rule can judge any of them.
    """
    return observe_all(series, warmup_steps=warmup_steps, rules=rules)[1]


def observe_all(
    series: Mapping[str, Any], *, warmup_steps: int = 0, rules: Sequence[Rule] = DEFAULT_RULES
) -> tuple[AlertEngine, list[Alert]]:
    """(an engine that has observed a whole series, the transitions on the way); as `replay`, which see."""
    if "step" not in series:
        raise ValueError(f"The series has no column step. Its columns: {', '.join(series) or 'none'}.")
    steps = [int(step) for step in series["step"]]
    engine = AlertEngine(rules, warmup_steps)
    columns = {key: series[key] for key in engine.series if key in series}
    if not any(all(key in columns for key in rule.needs) for rule in engine.rules):
        raise ValueError(
            f"No rule can judge the columns {', '.join(series)}. Expected entropy (nats) or reward, best both."
        )
    for key, column in columns.items():
        if len(column) != len(steps):
            raise ValueError(f"Column {key!r} has {len(column)} rows, expected {len(steps)} like 'step'.")
    if np.any(np.diff(steps) <= 0):
        raise ValueError("Steps must be strictly increasing; sort the rows and keep the last of each step.")
    alerts = []
    for index, step in enumerate(steps):
        alerts += engine.observe(step, {key: column[index] for key, column in columns.items()})
    return engine, alerts


def verdict(
    series: Mapping[str, Any],
    *,
    warmup_steps: int = 0,
    step_s: float | None = None,
    total_steps: int | None = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> Verdict:
    """What there is to say of a series so far: what is happening, since when, how long to the floor, what to do.

    Pure: the same series gives the same verdict, live and replayed. series: as `replay` takes it. step_s: seconds of a
    step, for minutes and costs; total_steps: of the run, for what stopping now would save. Raises ValueError as
    `replay` does.

    Example: verdict({"step": steps, "entropy": entropies, "reward": rewards}).sentence
    """
    engine, _ = observe_all(series, warmup_steps=warmup_steps, rules=rules)
    engine.total_steps = total_steps
    return engine.verdict(step_s)


def evaluate_alerts(series: Mapping[str, Any], *, warmup_steps: int = 0) -> list[dict[str, Any]]:
    """The alerts that a recorded series raises, one dict for each that fired, by first firing; `rlvr check` in Python.

    series: columns of equal length, "step" (strictly increasing integers) and any keys of METRICS, best "entropy"
    (nats) and "reward"; None is a missing value. warmup_steps: steps after the first that baselines leave out. Keys of
    each dict: those of `fired`. Raises ValueError for missing, unequal or unordered columns.

    Example: evaluate_alerts({"step": steps, "entropy": entropies})[0]["message"]
    """
    return fired(replay(series, warmup_steps=warmup_steps))


def fired(alerts: Sequence[Alert]) -> list[dict[str, Any]]:
    """One dict for each alert that fired, by first firing; never one that stayed pending.

    "rule"; "severity" of its worst transition; "step", "value", "baseline", "threshold", "message" and "action" of its
    first firing; "resolved_step", None while it still fires at the end; "transitions": state, step, severity, value,
    threshold and message of each, with their own numbers.
    """
    return [
        {
            "rule": episode.first.rule,
            "severity": episode.worst.severity,
            "step": episode.first.first_step,
            "value": finite(episode.first.value),
            "baseline": finite(episode.first.baseline),
            "threshold": finite(episode.first.threshold),
            "message": episode.first.message,
            "action": episode.first.action,
            "resolved_step": episode.resolved_step,
            "transitions": [
                {
                    "state": alert.state,
                    "step": alert.step,
                    "severity": alert.severity,
                    "value": finite(alert.value),
                    "threshold": finite(alert.threshold),
                    "message": alert.message,
                }
                for alert in episode.transitions
            ],
        }
        for episode in episodes(alerts)
    ]
