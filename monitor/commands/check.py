"""`rlvr check`: the alert rules on a run or on any series."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from monitor.alerts.replay import fired, replay
from monitor.alerts.rules import FOR_ROWS
from monitor.alerts.series import Series, read_series
from monitor.alerts.window import BASELINE_ROWS
from monitor.errors import MonitorError


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
    found = fired(replay(series.columns, warmup_steps=warmup))
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
