"""Replay of the alert rules on a recorded series: exactly the alerts that a live run would have raised."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monitor.alerts.engine import SERIES, SEVERITY_RANK, AlertEngine
from monitor.alerts.rules import DEFAULT_RULES, FOR_ROWS, Rule
from monitor.alerts.series import Series, read_series
from monitor.alerts.window import BASELINE_ROWS
from monitor.errors import MonitorError
from monitor.records import Alert


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
    episodes: dict[tuple[str, int], dict[str, Any]] = {}
    for alert in alerts:
        key = (alert.rule, alert.first_step)
        if alert.state == "firing" and key not in episodes:
            episodes[key] = {
                "rule": alert.rule,
                "severity": alert.severity,
                "step": alert.first_step,
                "value": _finite(alert.value),
                "baseline": _finite(alert.baseline),
                "threshold": _finite(alert.threshold),
                "message": alert.message,
                "action": alert.action,
                "resolved_step": None,
            }
        elif alert.state == "firing" and SEVERITY_RANK[alert.severity] > SEVERITY_RANK[episodes[key]["severity"]]:
            episodes[key] |= {"severity": alert.severity, "message": f"{alert.message} (step {alert.step})"}
        elif alert.state == "resolved" and key in episodes:
            episodes[key]["resolved_step"] = alert.step
    return sorted(episodes.values(), key=lambda episode: episode["step"])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main(argv: list[str]) -> int:
    """`rlvr check`: 0 if no alert fired, 1 if one did, 2 for wrong use."""
    parser = argparse.ArgumentParser(
        prog="rlvr check",
        description="Replay the alert rules on a series: columns step, entropy and, where known, reward, "
        "response_length. Exits 1 if an alert fired.",
    )
    parser.add_argument("series", metavar="SERIES.csv|.jsonl|.parquet|RUN", help="a file, or a run of the store")
    parser.add_argument("--store", default="runs", help="folder of the store that holds RUN (default: runs)")
    parser.add_argument(
        "--warmup", type=int, metavar="N", help="steps to leave out of the baseline (default: the run's)"
    )
    parser.add_argument("--json", action="store_true", help='print {"alerts": [...]}')
    args = parser.parse_args(argv)
    try:
        if args.warmup is not None and args.warmup < 0:
            raise MonitorError(f"--warmup is {args.warmup}, expected 0 or more steps.")
        series = read_series(args.series, args.store)
    except MonitorError as error:
        print(f"rlvr check: {error}", file=sys.stderr)
        return 2
    for note in series.notes:
        print(f"rlvr check: {note}", file=sys.stderr)
    warmup = series.warmup_steps if args.warmup is None else args.warmup
    found = evaluate_alerts(series.columns, warmup_steps=warmup)
    usable = _finite_rows(series, warmup)
    if usable < BASELINE_ROWS + FOR_ROWS:
        print(
            f"rlvr check: {usable} rows with a finite entropy after {warmup} warm-up steps are too few to judge; "
            f"a baseline takes {BASELINE_ROWS} and an alert {FOR_ROWS} more.",
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps({"alerts": found}, indent=2))
    else:
        _print(args.series, series, found)
    return 1 if found else 0


def _finite_rows(series: Series, warmup: int) -> int:
    steps, entropies = series.columns["step"], series.columns["entropy"]
    present = [step for step, value in zip(steps, entropies, strict=True) if value is not None]
    start = present[0] + warmup if present else 0
    return sum(
        value is not None and math.isfinite(value) and step >= start
        for step, value in zip(steps, entropies, strict=True)
    )


def _print(name: str, series: Series, found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    steps = series.columns["step"]
    span = f"{len(steps)} rows, steps {steps[0]} to {steps[-1]}" if steps else "no rows"
    console.print(Text(f"{name}: {span}"), soft_wrap=True)
    if not found:
        console.print(Text("No alert fired."), soft_wrap=True)
    colours = {"info": "cyan", "warning": "yellow", "critical": "bold red"}
    for alert in found:
        until = "still firing at the end" if alert["resolved_step"] is None else f"until step {alert['resolved_step']}"
        head = Text(f"{alert['severity'].upper():8} ", style=colours[alert["severity"]])
        head.append(f"{alert['rule']} at step {alert['step']}, {until}", style="bold")
        console.print(head, soft_wrap=True)
        console.print(Text(f"         {alert['message']}"), soft_wrap=True)
        console.print(Text(f"         {alert['action']}", style="dim"), soft_wrap=True)
