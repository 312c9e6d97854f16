"""`rlvr store check|compact|prune|merge`; push and pull are in monitor/commands/mirror.py."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import Progress

from monitor.commands.mirror import pull, push
from monitor.commands.output import DEFAULT_STORE, print_json, print_table, size
from monitor.commands.parsing import StoreFolder, call
from monitor.errors import StoreError
from monitor.store.check import check_store
from monitor.store.compact import Compaction, compact_run, drop_replaced, kept_steps, prune_plan
from monitor.store.export import merge as merge_store
from monitor.store.runs import RunState, get_run, list_runs, require_store

COMMANDS = """usage: rlvr store check|compact|prune|merge|push|pull [STORE] [OPTIONS]

Look after a store; `rlvr store COMMAND --help` explains a command.

  check    report leftovers and damage; exit 1 only for damaged data
  compact  merge the small files of runs
  prune    drop raw tokens of most steps of ended runs, keep those around alerts and everything else
  merge    copy the runs of another store, or a run that was exported, into a store
  push     copy runs to an object store (s3://, gs://, az://), once or as they are recorded
  pull     copy runs from there into a store, once or as they come"""
_GRACE_S = 5.0  # how long replaced files of ended runs stay for queries under way
_Runs = tyro.conf.UseAppendAction[tuple[str, ...]]


def main(argv: list[str]) -> int:
    """`rlvr store`."""
    commands: dict[str, Callable[..., int]] = {
        "check": check, "compact": compact, "prune": prune, "merge": merge, "push": push, "pull": pull,
    }  # fmt: skip
    name = argv[0] if argv else ""
    if name in commands:
        return call(commands[name], argv[1:], f"store {name}")
    print(COMMANDS, file=sys.stdout if name in ("-h", "--help") else sys.stderr)
    return 0 if name in ("-h", "--help") else 2


def check(store: StoreFolder = DEFAULT_STORE, /, *, json: bool = False) -> int:
    """Report leftovers and damage. Exits with 1 only where acknowledged data is damaged.

    Args:
        store: folder of the store
        json: one JSON list of objects
    """
    found = check_store(store)
    damaged = sum(finding.damage for finding in found)
    if json:
        print_json([asdict(finding) for finding in found])
    else:
        if found:
            rows = [["DAMAGE" if f.damage else "note", f.kind, f.run, f.message, f.path] for f in found]
            print_table(["", "kind", "run", "what", "where"], rows)
        print(f"{damaged} damaged, {len(found) - damaged} other findings in {store!r}.")
    return 1 if damaged else 0


def compact(store: StoreFolder = DEFAULT_STORE, /, *, run: _Runs = (), json: bool = False) -> int:
    """Merge the small files of runs; of running ones those of closed ranges of steps.

    Args:
        store: folder of the store
        run: only this run; may be given again
        json: one JSON list of objects
    """
    return _compact(store, [state.name for state in _chosen(store, run)], None, json, named=bool(run))


def merge(
    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")],
    store: StoreFolder = DEFAULT_STORE,
    /,
    *,
    json: bool = False,
) -> int:
    """Copy the runs of another store, or a run that `rlvr export` wrote as a DuckDB file, into a store.

    A run whose name is taken, or that is running, is left alone, and the exit code is then 1.

    Args:
        source: the other store, or the exported file
        store: folder of the store that gets the runs
        json: one JSON object
    """
    done, refused = merge_store(store, source)
    if json:
        print_json({"merged": done, "refused": refused})
    else:
        print(f"Merged {', '.join(done) or 'no run'} into {store!r}.")
        for message in refused:
            print(message)
    return 1 if refused else 0


def prune(
    store: StoreFolder = DEFAULT_STORE,
    /,
    *,
    thin_tokens: str,
    run: _Runs = (),
    older_than_days: float | None = None,
    max_gb: float | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> int:
    """Drop raw tokens of most steps of ended runs. Scalars, histograms, rollouts and alerts of all steps stay.

    So do the raw tokens around alerts: of the step at which one began, got worse or ended, 3 before it and 2 after it.
    The space is free again when the command ends.

    Args:
        store: folder of the store
        thin_tokens: steps whose raw tokens stay beside those around alerts: "1,50,100" names the steps ("50," is one
            step); a single number like "5" keeps that many steps of each run, evenly spaced over those that have
            tokens, first and last included; "0" keeps none
        run: only this run; may be given again
        older_than_days: only runs whose last step is older
        max_gb: only as many runs, those whose last step is oldest first, that the store holds at most this many GB
        dry_run: change nothing, and say what would go
        json: one JSON list of objects
    """
    kept_steps(thin_tokens, [])  # a faulty value stops here, before the first run is touched
    chosen = []
    for state in _chosen(store, run):
        if state.status not in ("running", "stalled") or run:
            chosen.append(state)
        elif not json:
            print(f"{state.name} is {state.status}: left alone.")
    if older_than_days is not None:
        latest = time.time() - 86_400 * older_than_days
        chosen = [state for state in chosen if (state.last_step_ts or state.created) < latest]
    if max_gb is not None:
        held = sum(state.bytes for state in list_runs(store))
        by_age, chosen = sorted(chosen, key=lambda state: state.last_step_ts or state.created), []
        for state in by_age:
            if held <= 1e9 * max_gb:
                break
            chosen.append(state)
            held -= prune_plan(store, state.name, thin_tokens).freed
        if held > 1e9 * max_gb and not json:
            print(
                f"The store then holds {size(round(held))}, still more than {max_gb} GB: not all of it are raw tokens."
            )
    if dry_run:
        return _show_plans([prune_plan(store, state.name, thin_tokens) for state in chosen], json)
    return _compact(store, [state.name for state in chosen], thin_tokens, json, named=bool(run))


def _chosen(store: str, runs: Sequence[str]) -> list[RunState]:
    return [get_run(store, run) for run in runs] if runs else list_runs(store)


def _show_plans(plans: Sequence[Compaction], as_json: bool) -> int:
    if as_json:
        print_json([asdict(plan) for plan in plans])
        return 0
    rows = [[plan.run, size(plan.bytes_before), size(plan.bytes_after), len(plan.kept_steps or ())] for plan in plans]
    print_table(["run", "size now", "about", "steps that keep tokens"], rows)
    print(f"About {size(sum(plan.freed for plan in plans))} would be freed. Nothing was changed.")
    return 0


def _compact(store: str, chosen: Sequence[str], thin: str | None, as_json: bool, *, named: bool) -> int:
    running = {run for run in chosen if get_run(store, run).status in ("running", "stalled")}
    done: list[Compaction] = []
    refused: list[str] = []
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        for run in progress.track(chosen, description="Compacting"):
            try:
                done.append(compact_run(store, run, thin_tokens=thin, grace_s=None))
            except StoreError as error:
                if named:
                    raise
                refused.append(str(error))  # the others can still be compacted
    if any(one.files_after < one.files_before or one.freed for one in done):
        time.sleep(_GRACE_S)  # once for all runs
    for one in done:
        if one.run not in running:
            drop_replaced(require_store(store), one.run, older_than_s=_GRACE_S)
    if as_json:
        print_json([asdict(one) for one in done])
    elif done:
        rows = [
            [one.run, one.files_before, one.files_after, size(one.bytes_before), size(one.bytes_after)] for one in done
        ]
        print_table(["run", "files before", "after", "size before", "after"], rows)
    for message in refused:
        print(message)
    return 1 if refused else 0
