"""`rlvr ls`: the runs of a store."""

from __future__ import annotations

from collections import Counter
from typing import Any

from monitor.commands.output import DEFAULT_STORE, ago, print_json, print_table, size, warn_unreadable
from monitor.commands.parsing import StoreFolder, call
from monitor.queries.alerts import verdict_texts
from monitor.store.reader import Store, open_store

_LATEST = """SELECT run, arg_max(value, step) FILTER (name = 'reward'), arg_max(value, step) FILTER (name = 'entropy')
FROM steps WHERE name IN ('reward', 'entropy') GROUP BY run"""
_FIRING = """SELECT run, count(*) FROM (
    SELECT run, rule, arg_max(state, ts) AS state FROM alerts GROUP BY run, rule
) WHERE state = 'firing' GROUP BY run"""


def main(argv: list[str]) -> int:
    """`rlvr ls`."""
    return call(ls, argv, "ls")


def ls(store: StoreFolder = DEFAULT_STORE, /, *, json: bool = False) -> int:
    """List the runs of a store, oldest first.

    Args:
        store: folder of the store
        json: one JSON list of objects
    """
    with open_store(store) as opened:
        found = rows(opened)
        left_out = opened.unreadable()
    if json:
        print_json(found)
    elif not found:
        print(f"No runs in {store!r} yet. `rlvr demo` records two.")
    else:
        shown = [
            [
                row["run"],
                row["status"] + (f" ({row['busy']})" if row["busy"] else ""),
                *(row[key] for key in ("task", "weighting", "seed", "step", "reward", "entropy")),
                row["firing"] or "-",
                size(row["bytes"]),
                ago(row["last_step_ts"]),
            ]
            for row in found
        ]
        columns = [
            "run",
            "status",
            "task",
            "weighting",
            "seed",
            "step",
            "reward",
            "entropy",
            "firing",
            "size",
            "last step",
        ]
        print_table(columns, shown)
        for row in found:
            if row["verdict"] and not row["verdict"].startswith("healthy"):
                print(f"{row['run']}: {row['verdict']}")
    warn_unreadable(left_out)
    return 0


def rows(store: Store) -> list[dict[str, Any]]:
    """One dict for each run. `step` is the last durable step, `firing` the number of alerts that are firing.

    `verdict` is the newest one on the run's health, as a sentence; None if there is none (monitor/queries/alerts.py).
    """
    latest = {run: (reward, entropy) for run, reward, entropy in store.sql(_LATEST).rows}
    firing = dict(store.sql(_FIRING).rows)
    states = store.runs()
    verdicts = verdict_texts(store, [state.name for state in states])
    unreadable = Counter(one.run for one in store.unreadable())
    return [
        {
            "run": state.name,
            "status": state.status,
            "busy": state.busy,
            **{key: state.info.get(key) for key in ("model", "task", "weighting", "seed", "comparison")},
            "created": state.created,
            "attempt": state.attempt,
            "step": state.acknowledged,
            "reward": latest.get(state.name, (None, None))[0],
            "entropy": latest.get(state.name, (None, None))[1],
            "firing": firing.get(state.name, 0),
            "verdict": verdicts.get(state.name),
            "last_step_ts": state.last_step_ts,
            "tokens_dropped": state.tokens_dropped,
            "lost_steps": state.lost_steps,
            "bytes": state.bytes,
            "quarantined": state.quarantined,
            "unreadable": unreadable[state.name],
        }
        for state in states
    ]
