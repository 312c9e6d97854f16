"""`rlvr show`: one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from monitor.commands.output import DEFAULT_STORE, ago, print_json, print_table, size, warn_unreadable
from monitor.commands.parsing import RunName, call
from monitor.metrics import metric
from monitor.queries.alerts import verdict_texts
from monitor.store.reader import Store, open_store

_LATEST = """SELECT name, max(step) AS step, arg_max(value, step) AS value FROM steps WHERE run = ? GROUP BY name
ORDER BY starts_with(name, 'perf/'), name"""
_ALERTS = """SELECT step, rule, severity, state, value, baseline, threshold, message, action FROM alerts
WHERE run = ? ORDER BY ts"""
_EVENTS = "SELECT step, kind, message FROM events WHERE run = ? ORDER BY ts DESC LIMIT 20"
_IDENTITY = ("model", "task", "weighting", "seed", "comparison")


def main(argv: list[str]) -> int:
    """`rlvr show`."""
    return call(show, argv, "show")


def show(run: RunName, /, *, store: str = DEFAULT_STORE, json: bool = False) -> int:
    """Show one run: status, configuration, latest values, alerts, events and sizes.

    Args:
        run: name of the run, as `rlvr ls` prints it
        store: folder of the store
        json: one JSON object
    """
    with open_store(store) as opened:
        report = describe(opened, run)
        left_out = [one for one in opened.unreadable() if one.run == run]
    if json:
        print_json(report)
    else:
        _print(report)
    warn_unreadable(left_out)
    return 0


def describe(store: Store, run: str) -> dict[str, Any]:
    """Everything `rlvr show` knows of a run. Raises UnknownRunError."""
    state = store.run(run)
    report = {
        "run": run,
        "status": state.status,
        "busy": state.busy,
        **{key: state.info.get(key) for key in _IDENTITY},
        "created": state.created,
        "attempt": state.attempt,
        "step": state.acknowledged,
        "last_step_ts": state.last_step_ts,
        "config": state.info.get("config") or {},
        "environment": state.info.get("environment") or {},
        "latest": {name: {"step": step, "value": value} for name, step, value in store.sql(_LATEST, [run]).rows},
        "verdict": verdict_texts(store, [run]).get(run),
        "alerts": _dicts(store, _ALERTS, run),
        "events": _dicts(store, _EVENTS, run)[::-1],
        "tokens": store.sql("SELECT count(*) FROM tokens WHERE run = ?", [run]).rows[0][0],
        "tokens_dropped": state.tokens_dropped,
        "lost_steps": state.lost_steps,
        "bytes": state.bytes,
        "quarantined": state.quarantined,
    }
    return report | {"unreadable": [str(one.path) for one in store.unreadable() if one.run == run]}


def _dicts(store: Store, query: str, run: str) -> list[dict[str, Any]]:
    result = store.sql(query, [run])
    return [dict(zip(result.columns, row, strict=True)) for row in result.rows]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _unit(name: str) -> str:
    try:
        return metric(name).unit
    except ValueError:  # recorded by a newer version
        return ""


def _print(report: dict[str, Any]) -> None:
    identity = ", ".join(f"{key} {report[key]}" for key in _IDENTITY if report[key] not in ("", None))
    busy = f" ({report['busy']})" if report["busy"] else ""
    print(f"{report['run']}: {report['status']}{busy}, attempt {report['attempt']}; {identity}")
    step = "no step yet" if report["step"] is None else f"step {report['step']}, {ago(report['last_step_ts'])}"
    dropped = f", {report['tokens_dropped']} more not recorded" if report["tokens_dropped"] else ""
    print(f"{step}; {size(report['bytes'])}, {report['tokens']} raw tokens{dropped}")
    if report["verdict"]:
        print(report["verdict"])
    if report["lost_steps"]:
        print(f"{report['lost_steps']} steps were handed over and could not be recorded.")
    if report["quarantined"]:
        print(f"{report['quarantined']} damaged files are set aside: `rlvr store check` lists them.")
    config = list(_flat(report["config"]))
    if config:
        print()
        print_table(["configuration", ""], config)
    if report["latest"]:
        print()
        rows = [(name, last["value"], _unit(name), last["step"]) for name, last in report["latest"].items()]
        print_table(["latest", "value", "unit", "step"], rows)
    if report["alerts"]:
        print()
        columns = ("step", "severity", "rule", "state", "message", "action")
        print_table(columns, [[alert[name] for name in columns] for alert in report["alerts"]])
    if report["events"]:
        print()
        print_table(["step", "event", ""], [list(event.values()) for event in report["events"]])
