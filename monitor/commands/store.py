"""`rlvr store check|compact|prune`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

import tyro
from rich.console import Console
from rich.progress import Progress

from monitor.commands.output import DEFAULT_STORE, print_json, print_table, size
from monitor.commands.parsing import StoreFolder, call
from monitor.errors import StoreError
from monitor.store.check import check_store
from monitor.store.compact import Compaction, compact_run, kept_steps
from monitor.store.runs import get_run, list_runs

COMMANDS = """usage: rlvr store check|compact|prune [STORE] [OPTIONS]

Look after a store; `rlvr store COMMAND --help` explains a command.

  check    report leftovers and damage; exit 1 only for damaged data
  compact  merge the small files of ended runs
  prune    drop raw tokens of most steps of ended runs, keep those around alerts and everything else"""
_Runs = tyro.conf.UseAppendAction[tuple[str, ...]]


def main(argv: list[str]) -> int:
    """`rlvr store`."""
    commands: dict[str, Callable[..., int]] = {"check": check, "compact": compact, "prune": prune}
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
    """Merge the small files of ended runs.

    Args:
        store: folder of the store
        run: only this run; may be given again
        json: one JSON list of objects
    """
    return _compact(store, run, None, json)


def prune(store: StoreFolder = DEFAULT_STORE, /, *, thin_tokens: str, run: _Runs = (), json: bool = False) -> int:
    """Drop raw tokens of most steps of ended runs. Scalars, histograms, rollouts and alerts of all steps stay.

    So do the raw tokens around alerts: of the step at which one began, got worse or ended, 3 before it and 2 after it.

    Args:
        store: folder of the store
        thin_tokens: steps whose raw tokens stay beside those around alerts: "1,50,100" names the steps ("50," is one
            step); a single number like "5" keeps that many steps of each run, evenly spaced over those that have
            tokens, first and last included; "0" keeps none
        run: only this run; may be given again
        json: one JSON list of objects
    """
    kept_steps(thin_tokens, [])  # a faulty value stops here, before the first run is touched
    return _compact(store, run, thin_tokens, json)


def _compact(store: str, runs: Sequence[str], thin: str | None, as_json: bool) -> int:
    if runs:
        chosen = [get_run(store, run).name for run in runs]
    else:
        states = list_runs(store)
        chosen = [state.name for state in states if state.status not in ("running", "stalled")]
        for state in states:
            if state.name not in chosen and not as_json:
                print(f"{state.name} is {state.status}: left alone.")
    done: list[Compaction] = []
    refused: list[str] = []
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        for run in progress.track(chosen, description="Compacting"):
            try:
                done.append(compact_run(store, run, thin_tokens=thin))
            except StoreError as error:
                if runs:
                    raise
                refused.append(str(error))  # the others can still be compacted
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
