"""`rlvr check`: the alert rules on a run or on any series."""

from __future__ import annotations

import math
import sys
from typing import Annotated, Any

import tyro

from monitor.alerts.judgement import Verdict
from monitor.alerts.replay import fired, observe_all
from monitor.alerts.rules import DEFAULT_RULES
from monitor.alerts.settings import load_alerts
from monitor.alerts.window import BASELINE_ROWS
from monitor.commands.output import DEFAULT_STORE, print_json
from monitor.commands.parsing import call, column_map
from monitor.errors import MonitorError
from monitor.integrations.aliases import shortened
from monitor.integrations.files.series import Series, read_series
from monitor.records import SEVERITY_RANK


def main(argv: list[str]) -> int:
    """`rlvr check`."""
    return call(check, argv, "check")


def check(
    source: Annotated[str, tyro.conf.arg(metavar="FILE|FOLDER|RUN")],
    /,
    *,
    map: str = "",
    store: str = DEFAULT_STORE,
    warmup: int | None = None,
    alerts: str | None = None,
    json: bool = False,
) -> int:
    """Replay the alert rules on a series: a run of the store, or what another trainer or tracker has written.

    Reads .csv (W&B's exports too), .jsonl (verl's file log too), .parquet, trainer_state.json, W&B's .wandb files and
    TensorBoard's event files, or a folder with one run of these. Every column that is named by a key of docs/metrics.md
    or by an alias of docs/integrations.md is used. Exits with 1 if an alert of severity warning or worse fired, 0 if
    none did, 2 for wrong use.

    Args:
        source: a file, a folder, or a run of the store
        map: which columns to take: entropy=my/column,step=iteration
        store: folder of the store that holds RUN
        warmup: steps to leave out of the baseline; none: the run's
        alerts: TOML file with thresholds of the rules (docs/notifications.md); none: the default rules
        json: print {"alerts": [...], "verdict": {...}, "mapping": {...}, "unmapped": [...]}
    """
    if warmup is not None and warmup < 0:
        raise MonitorError(f"--warmup is {warmup}, expected 0 or more steps.")
    series = read_series(source, store, column_map(map))
    _print_columns(series)
    rules = load_alerts(alerts).rules if alerts else DEFAULT_RULES
    if not any(all(key in series.columns for key in rule.needs) for rule in rules):
        raise MonitorError(
            f"{source!r} has no column that a rule can judge: expected entropy (nats) or reward, best both. Its other "
            f"columns: {shortened(list(series.unmapped)) or 'none'}. Say which it is: --map entropy=COLUMN"
        )
    warmup = series.warmup_steps if warmup is None else warmup
    engine, transitions = observe_all(series.columns, warmup_steps=warmup, rules=rules)
    found, verdict = fired(transitions), engine.verdict()
    usable = _finite_rows(series, warmup)
    if usable < BASELINE_ROWS + DEFAULT_RULES[0].for_rows:
        print(
            f"rlvr check: {usable} rows with a finite entropy after {warmup} warm-up steps are too few to judge; "
            f"a baseline takes {BASELINE_ROWS} and an alert {DEFAULT_RULES[0].for_rows} more.",
            file=sys.stderr,
        )
    if json:
        print_json(
            {"alerts": found, "verdict": verdict.as_dict(), "mapping": series.mapping, "unmapped": series.unmapped}
        )
    else:
        _print(source, series, found, verdict)
    return int(any(SEVERITY_RANK[alert["severity"]] >= SEVERITY_RANK["warning"] for alert in found))


def _print_columns(series: Series) -> None:
    used = [key if key == column else f"{key} <- {column}" for key, column in series.mapping.items()]
    lines = [*series.notes, f"uses {shortened(used)}"]
    if series.unmapped:
        lines.append(f"does not know {shortened(list(series.unmapped))}")
    for line in lines:
        print(f"rlvr check: {line}", file=sys.stderr)


def _finite_rows(series: Series, warmup: int) -> int:
    steps, entropies = series.columns["step"], series.columns.get("entropy", [None] * len(series))
    present = [step for step, value in zip(steps, entropies, strict=True) if value is not None]
    start = present[0] + warmup if present else 0
    return sum(
        value is not None and math.isfinite(value) and step >= start
        for step, value in zip(steps, entropies, strict=True)
    )


def _print(name: str, series: Series, found: list[dict[str, Any]], verdict: Verdict) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    steps = series.columns["step"]
    span = f"{len(steps)} rows, steps {steps[0]} to {steps[-1]}" if steps else "no rows"
    console.print(Text(f"{name}: {span}"), soft_wrap=True)
    console.print(Text(verdict.sentence, style="bold"), soft_wrap=True)
    if not found:
        console.print(Text("No alert fired."), soft_wrap=True)
    colours = {"info": "cyan", "warning": "yellow", "critical": "bold red"}
    for alert in found:
        until = "still firing at the end" if alert["resolved_step"] is None else f"until step {alert['resolved_step']}"
        head = Text(f"{alert['severity'].upper():8} ", style=colours[alert["severity"]])
        head.append(f"{alert['rule']} at step {alert['step']}, {until}", style="bold")
        console.print(head, soft_wrap=True)
        for told in alert["transitions"]:
            if told["state"] == "firing":
                said = f"         step {told['step']} ({told['severity']}): {told['message']}"
                console.print(Text(said), soft_wrap=True)
        console.print(Text(f"         {alert['action']}", style="dim"), soft_wrap=True)
