"""`rlvr watch`: alerts of every run of a store, in the terminal and through the routes of an alerts file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from monitor.alerts.marks import read_marks
from monitor.alerts.settings import AlertSettings, load_alerts
from monitor.commands.live import print_alert, stop_signals
from monitor.commands.output import DEFAULT_STORE
from monitor.commands.parsing import StoreFolder, call
from monitor.errors import MonitorError
from monitor.records import SEVERITY_RANK, Alert
from monitor.store.runs import require_store

if TYPE_CHECKING:
    from monitor.alerts.delivery import Delivery
    from monitor.alerts.watch import Change, Watcher


def main(argv: list[str]) -> int:
    """`rlvr watch`."""
    return call(watch, argv, "watch")


def watch(
    store: StoreFolder = DEFAULT_STORE,
    /,
    *,
    alerts: str | None = None,
    once: bool = False,
    poll_s: float = 2.0,
) -> int:
    """Judge every run of a live store, also of other trainers, and tell of alerts and of runs that stop.

    Runs that are judged where they are recorded keep the alerts that they have. Ctrl-C and SIGTERM end it with 0.

    Args:
        store: folder of the store
        alerts: TOML file of rules and routes (docs/notifications.md); none: the default rules, told here only
        once: look once; exit with 1 if a warning or worse fires that is neither acknowledged nor muted
        poll_s: seconds between two looks
    """
    from monitor.alerts.watch import Watcher

    if not poll_s > 0:
        raise MonitorError(f"--poll-s is {poll_s}, expected more than 0 seconds.")
    root = require_store(store)
    settings = load_alerts(alerts) if alerts else AlertSettings()
    delivery = _delivery(root, settings)
    watcher = Watcher(root, settings.rules)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    try:
        with stop_signals() as stop:
            _look(watcher, delivery, console, first=True)
            while not once and not stop.wait(poll_s):
                _look(watcher, delivery, console, first=False)
        return int(once and bool(_bad(root, watcher.firing())))
    finally:
        watcher.close()
        if delivery is not None:
            delivery.close()


def _delivery(root: Path, settings: AlertSettings) -> Delivery | None:
    """None without routes: then nothing is written into the store."""
    if not settings.routes:
        return None
    from monitor.alerts.delivery import Delivery, receivers
    from monitor.alerts.outbox import NAME, Outbox

    to = receivers(settings.routes)
    return Delivery(root, settings.routes, to, Outbox(root / NAME))


def _look(watcher: Watcher, delivery: Delivery | None, console: Console, *, first: bool) -> None:
    """One poll: deliver what is news, print what has changed; at first only what fires now."""
    changes = watcher.poll()
    firing = watcher.firing()
    for run in dict.fromkeys(change.run for change in changes):
        if delivery is not None:
            _hand_over(delivery, run, [c for c in changes if c.run == run], firing, live=watcher.is_live(run))
    if first:
        statuses = watcher.statuses()
        counts = ", ".join(f"{list(statuses.values()).count(s)} {s}" for s in dict.fromkeys(statuses.values()))
        console.print(f"{len(statuses)} runs{': ' if counts else ''}{counts}; {len(firing)} alerts fire.")
        for run, alert in firing:
            print_alert(console, run, alert)
        for run in dict.fromkeys(run for run, _ in firing):
            _print_verdict(watcher, console, run)
        return
    fired = {(run, a.rule, a.first_step) for run, a in watcher.fired()}
    for change in changes:
        if change.alert.state != "pending" and (change.run, change.alert.rule, change.alert.first_step) in fired:
            print_alert(console, change.run, change.alert)
    for run in dict.fromkeys(change.run for change in changes if change.alert.state != "pending"):
        _print_verdict(watcher, console, run)


def _print_verdict(watcher: Watcher, console: Console, run: str) -> None:
    verdict = watcher.verdict(run)
    if verdict:
        console.print(Text.assemble((f"         {run}: ", "bold"), verdict))


def _hand_over(
    delivery: Delivery, run: str, changes: Sequence[Change], firing: Sequence[tuple[str, Alert]], *, live: bool
) -> None:
    """Of a run that is seen for the first time only what fires now is news, and only while the run lives."""
    outbox = delivery.outbox
    fires = {(alert.rule, alert.first_step) for name, alert in firing if name == run}
    new_here = not outbox.knows(run)
    for change in changes:
        old = new_here and not (live and (change.alert.rule, change.alert.first_step) in fires)
        if old:
            outbox.skip(run, [change.alert], change.at)
        else:
            outbox.put(run, [change.alert], delivery.wanted, change.at)


def _bad(root: Path, firing: Sequence[tuple[str, Alert]]) -> list[Alert]:
    """Alerts of warning or worse that nobody has acknowledged or muted."""
    found = []
    for run, alert in firing:
        marks = read_marks(root, run)
        seen = marks.has_seen(alert.rule, alert.first_step) or marks.is_muted(alert.rule, alert.step)
        if SEVERITY_RANK[alert.severity] >= SEVERITY_RANK["warning"] and not seen:
            found.append(alert)
    return found
