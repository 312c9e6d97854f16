"""`rlvr store push|pull`: copies of runs in an object store, and copies of those in a local store."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from monitor.commands.live import stop_signals
from monitor.commands.output import DEFAULT_STORE, print_json, size
from monitor.errors import MonitorError
from monitor.store.pull import Puller
from monitor.store.push import Pusher, pause_s
from monitor.store.remote import RemoteError
from monitor.store.runs import get_run, require_store

_GRACE_S = 5.0  # how long replaced files stay for queries under way after a single pull
_Runs = tyro.conf.UseAppendAction[tuple[str, ...]]
_Url = Annotated[str, tyro.conf.arg(metavar="URL")]
_Folder = Annotated[str, tyro.conf.arg(metavar="STORE")]


def push(
    store: _Folder, url: _Url, /, *, run: _Runs = (), follow: bool = False, every: float = 1.0, json: bool = False
) -> int:
    """Copy runs to an object store, segments first, then for each rank a manifest that says which of them count.

    Nothing in the store is changed. Pushing again copies what is new. Exits with 1 if something was not copied.

    Args:
        store: folder of the store
        url: s3://BUCKET/PREFIX, gs://..., az://... or file:///...; the environment has the credentials (docs/store.md)
        run: only this run; may be given again
        follow: go on copying what is recorded, until Ctrl-C or SIGTERM
        every: seconds between two looks while following
        json: one JSON object
    """
    for name in run:
        get_run(store, name)
    pusher = Pusher(require_store(store), url, runs=run or None)
    outcome = _follow(pusher, every, "push") if follow else _once(pusher, "push")
    return _print(outcome, f"Pushed to {url}", json)


def pull(
    url: _Url,
    store: _Folder = DEFAULT_STORE,
    /,
    *,
    run: _Runs = (),
    follow: bool = False,
    every: float = 1.0,
    json: bool = False,
) -> int:
    """Copy runs from where `rlvr store push` or --mirror put them into a store, which any reader may have open.

    Each segment's CRC is checked; one that is damaged is left out and named. Pulling again fetches what is new. Exits
    with 1 if something was left out.

    Args:
        url: where the runs were pushed to
        store: folder of the store, made if missing
        run: only this run; may be given again
        follow: go on fetching what is new, until Ctrl-C or SIGTERM
        every: seconds between two looks while following; runs without news are looked at less often
        json: one JSON object
    """
    puller = Puller(url, store, runs=run or None)
    outcome = _follow(puller, every, "pull") if follow else _once(puller, "pull")
    if not follow and outcome["replaced"]:
        time.sleep(_GRACE_S)
        for name in outcome["replaced"]:
            puller.tidy(name, older_than_s=_GRACE_S)
    return _print(outcome, f"Pulled into {store!r}", json)


def _once(mirror: Pusher | Puller, name: str) -> dict[str, Any]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(f"rlvr store {name}: segments", total=None)
        total = _no_outcome()
        try:
            _add(total, mirror.look(lambda done, of: progress.update(task, completed=done, total=of)))
        except RemoteError as error:
            total["refused"].append(f"{error} Nothing is lost: run the command again to go on.")
    return total


def _follow(mirror: Pusher | Puller, every: float, name: str) -> dict[str, Any]:
    """Look until told to stop, and once more then. An object store that does not answer is waited for."""
    if not every > 0:
        raise MonitorError(f"--every is {every}, expected more than 0 seconds.")
    total = _no_outcome()
    failed = 0
    known: set[str] = set()
    with stop_signals() as stop:
        while True:
            last = stop.is_set()
            try:
                found = mirror.look()
                _add(total, found)
                for text in found.refused:
                    if text not in known:
                        _say(name, text)
                known = set(found.refused)
                if failed:
                    _say(name, "goes on.")
                failed = 0
            except RemoteError as error:
                if not failed:
                    _say(name, f"{error} It is tried again.")
                failed += 1
            if last:
                break
            stop.wait(pause_s(every, failed))
    total["refused"] = sorted(known)
    if failed:
        total["refused"].append("The object store did not answer: run the command again to go on.")
    return total


def _no_outcome() -> dict[str, Any]:
    return {"runs": [], "segments": 0, "bytes": 0, "replaced": [], "refused": []}


def _add(total: dict[str, Any], found: Any) -> None:
    total["segments"] += found.segments
    total["bytes"] += found.bytes
    for name in ("runs", "replaced"):
        total[name] = sorted({*total[name], *getattr(found, name, ())})
    total["refused"] += found.refused


def _print(outcome: dict[str, Any], what: str, as_json: bool) -> int:
    refused = outcome["refused"]
    if as_json:
        print_json({name: outcome[name] for name in ("runs", "segments", "bytes", "refused")})
    else:
        runs = ", ".join(outcome["runs"]) or ("nothing" if refused else "nothing new")
        print(f"{what}: {runs} ({outcome['segments']} segments, {size(outcome['bytes'])}).")
        for text in refused:
            print(text)
    return 1 if refused else 0


def _say(name: str, text: str) -> None:
    print(f"rlvr store {name}: {text}", file=sys.stderr, flush=True)
