"""`rlvr alerts list|ack|mute|unmute|test-fire`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from monitor.alerts.episodes import Episode, episodes
from monitor.alerts.marks import acknowledge, read_marks
from monitor.alerts.marks import mute as mute_rule
from monitor.alerts.marks import unmute as unmute_rule
from monitor.alerts.rules import RULES
from monitor.alerts.settings import STATUS_RULES, load_alerts
from monitor.commands.output import DEFAULT_STORE, ago, print_json, print_table
from monitor.commands.parsing import RunName, call
from monitor.errors import MonitorError, nearest
from monitor.records import Alert
from monitor.store.runs import get_run, require_store

COMMANDS = """usage: rlvr alerts list|ack|mute|unmute|test-fire [ARGUMENTS]

Look after alerts; `rlvr alerts COMMAND --help` explains a command.

  list       alerts that have fired, whether they still do, who has seen them
  ack        mark the newest alert of a rule as seen
  mute       keep a rule of a run from all routes
  unmute     deliver it again
  test-fire  send a test message through every route of an alerts file"""
RuleName = Annotated[str, tyro.conf.arg(metavar="RULE")]


def main(argv: list[str]) -> int:
    """`rlvr alerts`."""
    commands: dict[str, Callable[..., int]] = {
        "list": list_alerts,
        "ack": ack,
        "mute": mute,
        "unmute": unmute,
        "test-fire": test_fire,
    }
    name = argv[0] if argv else ""
    if name in commands:
        return call(commands[name], argv[1:], f"alerts {name}")
    print(COMMANDS, file=sys.stdout if name in ("-h", "--help") else sys.stderr)
    return 0 if name in ("-h", "--help") else 2


def list_alerts(
    run: Annotated[str, tyro.conf.arg(metavar="[RUN]")] = "",
    /,
    *,
    store: str = DEFAULT_STORE,
    json: bool = False,
) -> int:
    """List the recorded alerts that have fired, by run and first step.

    Args:
        run: only this run
        store: folder of the store
        json: one JSON list of objects
    """
    root = require_store(store)
    names = [get_run(root, run).name] if run else None
    rows = [
        _row(root, name, episode) for name, alerts in _recorded(root, names).items() for episode in episodes(alerts)
    ]
    if json:
        print_json(rows)
    elif not rows:
        print("No alert has fired.")
    else:
        columns = ("run", "rule", "severity", "step", "state", "acknowledged", "muted", "message")
        shown = [[_shown(name, row[name]) for name in columns] for row in rows]
        print_table(columns, shown)
    return 0


def ack(run: RunName, rule: RuleName, /, *, store: str = DEFAULT_STORE) -> int:
    """Mark the newest alert of a rule as seen; it no longer counts for `rlvr watch --once`, a later one does.

    Args:
        run: name of the run
        rule: name of the rule
        store: folder of the store
    """
    root = require_store(store)
    get_run(root, run)
    _check_rule(rule)
    first = _newest(root, run, rule)
    if first is None:
        raise MonitorError(f"{rule} has not fired in run {run!r}. `rlvr alerts list {run}` shows what has.")
    acknowledge(root, run, rule, first)
    print(f"{rule} of run {run}, firing from step {first}, is acknowledged.")
    return 0


def mute(run: RunName, rule: RuleName, /, *, store: str = DEFAULT_STORE, until_step: int | None = None) -> int:
    """Keep a rule of a run from all routes. It goes on judging, and its alerts are recorded.

    Args:
        run: name of the run
        rule: name of the rule
        store: folder of the store
        until_step: the last muted step; none: until it is unmuted
    """
    root = require_store(store)
    get_run(root, run)
    _check_rule(rule)
    if until_step is not None and until_step < 0:
        raise MonitorError(f"--until-step is {until_step}, expected 0 or more.")
    mute_rule(root, run, rule, until_step)
    print(f"{rule} of run {run} is muted {'until unmuted' if until_step is None else f'to step {until_step}'}.")
    return 0


def unmute(run: RunName, rule: RuleName, /, *, store: str = DEFAULT_STORE) -> int:
    """Deliver a muted rule again, from its next transition on.

    Args:
        run: name of the run
        rule: name of the rule
        store: folder of the store
    """
    root = require_store(store)
    get_run(root, run)
    _check_rule(rule)
    unmute_rule(root, run, rule)
    print(f"{rule} of run {run} is not muted.")
    return 0


def test_fire(*, alerts: str) -> int:
    """Send a test message through every route of an alerts file. Exits with 1 if one did not arrive.

    Args:
        alerts: TOML file of rules and routes
    """
    from monitor.alerts.delivery import send_test

    routes = load_alerts(alerts).routes
    if not routes:
        raise MonitorError(f"{alerts!r} has no [[routes]]: there is nowhere to send a test to.")
    told = send_test(routes, "TEST: rlvr alerts test-fire")
    rows = [[source, "FAILED" if reason else "arrived", reason] for source, reason in told.items()]
    print_table(["route", "", "why"], rows)
    return 1 if any(row[2] for row in rows) else 0


def _recorded(root: Path, runs: list[str] | None) -> dict[str, list[Alert]]:
    """The recorded transitions of runs, or of all, oldest first."""
    from monitor.queries.alerts import to_alert
    from monitor.store.reader import open_store

    with open_store(root) as store:
        found = store.sql("SELECT * FROM alerts ORDER BY run, step, ts")
    alerts: dict[str, list[Alert]] = {}
    for values in found.rows:
        row = dict(zip(found.columns, values, strict=True))
        if runs is None or row["run"] in runs:
            alerts.setdefault(row["run"], []).append(to_alert(row))
    return alerts


def _newest(root: Path, run: str, rule: str) -> int | None:
    """First step of the newest episode of a rule: as recorded, or as `rlvr watch` sees it."""
    recorded = [e for e in episodes(_recorded(root, [run]).get(run, [])) if e.first.rule == rule]
    if recorded:
        return recorded[-1].first.first_step
    from monitor.alerts.watch import Watcher

    watcher = Watcher(root)
    try:
        watcher.poll()
        found = [alert.first_step for name, alert in watcher.fired() if (name, alert.rule) == (run, rule)]
    finally:
        watcher.close()
    return max(found, default=None)


def _check_rule(rule: str) -> None:
    known = [*RULES, *STATUS_RULES]
    if rule not in known:
        raise MonitorError(f"No rule is called {rule!r}.{nearest(rule, known)} Rules: {', '.join(known)}.")


def _row(root: Path, run: str, episode: Episode[Alert]) -> dict[str, Any]:
    alert, marks = episode.worst, read_marks(root, run)
    muted = marks.muted.get(alert.rule)
    seen = marks.has_seen(alert.rule, alert.first_step)
    return {
        "run": run,
        "rule": alert.rule,
        "severity": alert.severity,
        "step": alert.first_step,
        "resolved_step": episode.resolved_step,
        "state": "firing" if episode.resolved_step is None else f"resolved at step {episode.resolved_step}",
        "value": alert.value if math.isfinite(alert.value) else None,
        "acknowledged": marks.acknowledged[alert.rule].ts if seen else None,
        "muted": muted is not None,
        "muted_until_step": None if muted is None else muted.until_step,
        "message": alert.message,
    }


def _shown(name: str, value: Any) -> Any:
    if name == "acknowledged":
        return ago(value)
    return ("yes" if value else "-") if name == "muted" else value
