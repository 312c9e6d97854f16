"""Recorders that judge what they record, for whoever trains: rules, routes, and the baselines of a run that goes on."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from monitor.alerts.engine import AlertEngine
from monitor.alerts.settings import DEFAULT_ACTIONS, AlertsError, AlertSettings, load_alerts
from monitor.by_name import resolve
from monitor.recorder import Recorder
from monitor.records import Alert, RunInfo
from monitor.store.reader import open_store

_log = logging.getLogger("rlvr.monitor")


def tell(alert: Alert) -> None:
    """Logs an alert that fires."""
    if alert.state == "firing":
        _log.warning("Alert %s (%s) at step %d: %s", alert.rule, alert.severity, alert.step, alert.message)


def alert_settings(alerts: bool | str | Path) -> AlertSettings | None:
    """Of `alerts`: True the default rules, False None, a path that file. Raises AlertsError."""
    if isinstance(alerts, bool):
        return AlertSettings() if alerts else None
    settings = load_alerts(alerts)
    if settings.actions is not DEFAULT_ACTIONS:
        raise AlertsError(
            f"{str(alerts)!r}: actions: this run is only watched, so nobody can take them. Leave the sections out and "
            "use on_alert, or train with `rlvr train` or attach(..., guard=...)."
        )
    return settings


def judged_recorder(
    store: str | Path,
    info: RunInfo,
    *,
    settings: AlertSettings | None = None,
    rank: int = 0,
    resume: bool = False,
    on_alert: Callable[[Alert], None] = tell,
    mirror: str | None = None,
) -> Recorder:
    """An open Recorder; rank 0 judges by `settings`, with the baselines that a resumed run has. Raises StoreError.

    The caller must end it, at the end of the process too, for it knows best how the run ended (`exit_status`).
    """
    engine, sinks = None, []
    if settings is not None and rank == 0:
        engine = AlertEngine(settings.rules, info.warmup_steps)
        past = history(store, info.name, engine.series) if resume else {}
        for step, scalars in past.items():
            engine.observe(step, scalars)
        if settings.routes:
            sinks.append(resolve("monitor.alerts.delivery:AlertSink")(store, settings.routes))
    recorder = Recorder(
        store, info, rank=rank, resume=resume, engine=engine, sinks=sinks, on_alert=on_alert, mirror=mirror
    )
    atexit.unregister(recorder.close)  # which would call every end of the process "stopped"
    return recorder


def exit_status() -> Literal["finished", "stopped", "failed"]:
    """How a process that is ending ends, for a run that nobody has finished."""
    uncaught = getattr(sys, "last_value", None)  # what the interpreter has just printed
    if uncaught is None:
        return "finished"
    return "failed" if isinstance(uncaught, Exception) else "stopped"


def history(store: str | Path, run: str, series: Sequence[str]) -> dict[int, dict[str, float]]:
    """{step: scalars} of a run that goes on, so that its alerts keep their baselines."""
    rows: dict[int, dict[str, float]] = {}
    query = (
        "SELECT step, name, value FROM steps WHERE run = ? AND rank = 0 AND name IN (SELECT unnest(?)) ORDER BY step"
    )
    with open_store(store) as opened:
        for step, name, value in opened.sql(query, [run, list(series)]).rows:
            rows.setdefault(int(step), {})[str(name)] = float("nan") if value is None else float(value)
    return rows


def installed(packages: Sequence[str]) -> dict[str, str]:
    """{package: version} of those that are installed."""
    found: dict[str, Any] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
