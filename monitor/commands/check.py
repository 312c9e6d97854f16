"""`rlvr check`: the alert rules on a run or on any series."""

from __future__ import annotations

import math
import sys
from typing import Annotated, Any

import tyro

from monitor.alerts.replay import evaluate_alerts
from monitor.alerts.rules import DEFAULT_RULES
from monitor.alerts.series import Series, read_series
from monitor.alerts.window import BASELINE_ROWS
from monitor.commands.output import DEFAULT_STORE, print_json
from monitor.commands.parsing import call
from monitor.errors import MonitorError


def main(argv: list[str]) -> int:
    """`rlvr check`."""
    return call(check, argv, "check")


def check(
    source: Annotated[str, tyro.conf.arg(metavar="SERIES.csv|.jsonl|.parquet|RUN")],
    /,
    *,
    store: str = DEFAULT_STORE,
    warmup: int | None = None,
    json: bool = False,
) -> int:
    """Replay the alert rules on a series: columns step, entropy and, where known, reward, response_length.

    Exits with 1 if an alert fired, 0 if none did, 2 for wrong use.

    Args:
        source: a file, or a run of the store
        store: folder of the store that holds RUN
        warmup: steps to leave out of the baseline; none: the run's
        json: print {"alerts": [...]}
    """
    if warmup is not None and warmup < 0:
        raise MonitorError(f"--warmup is {warmup}, expected 0 or more steps.")
    series = read_series(source, store)
    for note in series.notes:
        print(f"rlvr check: {note}", file=sys.stderr)
    warmup = series.warmup_steps if warmup is None else warmup
    found = evaluate_alerts(series.columns, warmup_steps=warmup)
    usable = _finite_rows(series, warmup)
    if usable < BASELINE_ROWS + DEFAULT_RULES[0].for_rows:
        print(
            f"rlvr check: {usable} rows with a finite entropy after {warmup} warm-up steps are too few to judge; "
            f"a baseline takes {BASELINE_ROWS} and an alert {DEFAULT_RULES[0].for_rows} more.",
            file=sys.stderr,
        )
    if json:
        print_json({"alerts": found})
    else:
        _print(source, series, found)
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
