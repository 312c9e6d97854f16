"""`rlvr store check|compact|prune`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich.console import Console
from rich.progress import Progress

from monitor.commands.output import DEFAULT_STORE, print_json, print_table, size
from monitor.errors import StoreError
from monitor.store.check import check_store
from monitor.store.compact import Compaction, compact_run, kept_steps
from monitor.store.runs import get_run, list_runs

_THIN = """steps whose raw tokens stay: "1,50,100" names the steps ("50," is one step); a single number like "5" keeps
that many steps of each run, evenly spaced over those that have tokens, first and last included; "0" keeps none.
Scalars, histograms, rollouts and alerts of all steps stay."""


def main(argv: list[str]) -> int:
    """Check, compact or prune a store; `check` returns 1 if acknowledged data is damaged."""
    parser = argparse.ArgumentParser(prog="rlvr store", description="Look after a store.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="report leftovers and damage; exit 1 only for damaged data")
    compact = commands.add_parser("compact", help="merge the small files of ended runs")
    prune = commands.add_parser("prune", help="drop raw tokens of most steps of ended runs, keep everything else")
    for command in (check, compact, prune):
        command.add_argument("store", nargs="?", default=DEFAULT_STORE, help="folder of the store (default: runs)")
        command.add_argument("--json", action="store_true", help="one JSON list of objects")
    for command in (compact, prune):
        command.add_argument("--run", action="append", help="only this run; may be given again")
    prune.add_argument("--thin-tokens", required=True, metavar="STEPS", help=_THIN)
    args = parser.parse_args(argv)
    if args.command == "check":
        return _check(args.store, args.json)
    thin = getattr(args, "thin_tokens", None)
    if thin is not None:
        kept_steps(thin, [])  # a faulty value stops here, before the first run is touched
    return _compact(args.store, args.run, thin, args.json)


def _check(store: str, as_json: bool) -> int:
    found = check_store(store)
    damaged = sum(finding.damage for finding in found)
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        if found:
            rows = [["DAMAGE" if f.damage else "note", f.kind, f.run, f.message, f.path] for f in found]
            print_table(["", "kind", "run", "what", "where"], rows)
        print(f"{damaged} damaged, {len(found) - damaged} other findings in {store!r}.")
    return 1 if damaged else 0


def _compact(store: str, runs: list[str] | None, thin: str | None, as_json: bool) -> int:
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
