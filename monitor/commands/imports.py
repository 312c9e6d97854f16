"""`rlvr import`: the files of another trainer or tracker as a run of the store, once or while they are written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from monitor.alerts.settings import load_alerts
from monitor.commands.live import print_alert, stop_signals
from monitor.commands.output import DEFAULT_STORE
from monitor.commands.parsing import call, column_map
from monitor.errors import MonitorError, nearest
from monitor.integrations.aliases import TRAINERS, shortened
from monitor.integrations.files.importing import Importer
from monitor.store.runs import safe_name


def main(argv: list[str]) -> int:
    """`rlvr import`."""
    return call(import_, argv, "import")


def import_(
    source: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[TRAINER] FILE|FOLDER")],
    /,
    *,
    run: str | None = None,
    store: str = DEFAULT_STORE,
    map: str = "",
    rollouts: str | None = None,
    follow: bool = False,
    every: float = 0.3,
    warmup: int | None = None,
    alerts: str | None = None,
) -> int:
    """Record what another trainer or tracker has written as a run of the store, and judge it by the alert rules.

    Reads what `rlvr check` reads (docs/integrations.md). Columns that are known by a key or alias are recorded under
    that key, others under their own names. Importing again adds what is new; a file that was begun anew opens the next
    attempt of the run. Exits with 0; with 1 if steps could not be written, with 2 for wrong use.

    Args:
        source: a file, or a folder with one run; before it the trainer, if other trainers' names must not count
        run: name of the run; none: that of the file or folder
        store: folder of the store, made if missing
        map: which columns to take: entropy=my/column,step=iteration
        rollouts: folder with a file of rollouts for each step (docs/integrations.md)
        follow: record each new row as it comes, until Ctrl-C or SIGTERM; a missing file is waited for
        every: seconds between two looks while following
        warmup: steps to leave out of the baseline; none: as the run has it, else 0
        alerts: TOML file with thresholds of the rules (docs/notifications.md); none: the default rules
    """
    if not every > 0:
        raise MonitorError(f"--every is {every}, expected more than 0 seconds.")
    if warmup is not None and warmup < 0:
        raise MonitorError(f"--warmup is {warmup}, expected 0 or more steps.")
    trainer, path = _trainer_and_path(source)
    run = run or safe_name(Path(path).expanduser().absolute().name.split(".")[0])
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    settings = {"rules": load_alerts(alerts).rules} if alerts else {}
    importer = Importer(
        path,
        store,
        run,
        column_map(map),
        live=follow,
        say=_say,
        trainer=trainer,
        warmup_steps=warmup,
        rollouts=rollouts,
        on_alert=lambda alert: None if alert.state == "pending" else print_alert(console, run, alert),
        **settings,
    )
    status = _follow(importer, every) if follow else _once(importer)
    _print(importer, console)
    if status == "failed":
        _say(f"steps could not be written: rlvr show {run} --store {store}")
    return int(status == "failed")


def _trainer_and_path(words: tuple[str, ...]) -> tuple[str | None, str]:
    if len(words) == 1:
        return None, words[0]
    if len(words) != 2:
        given = " ".join(words) or "nothing"
        raise MonitorError(f"{given!r} is given, expected a file or folder, or a trainer and one.")
    trainer, path = words
    if trainer not in TRAINERS:
        expected = f"Expected one of {', '.join(TRAINERS)}, or none."
        raise MonitorError(f"{trainer!r} is no known trainer.{nearest(trainer, TRAINERS)} {expected}")
    return trainer, path


def _once(importer: Importer) -> str:
    status = "failed"
    try:
        importer.look()
        _print_columns(importer)
        status = "finished"
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        status = importer.close(status)
    return status


def _follow(importer: Importer, every: float) -> str:
    status = "failed"
    told: tuple[int, int] | None = None
    with stop_signals() as stop:
        try:
            while True:
                importer.look()
                columns = (len(importer.columns.mapping), len(importer.columns.own))
                if importer.n_recorded + importer.n_held and columns != told:
                    told = columns
                    _print_columns(importer)
                if stop.wait(every):
                    break
            status = "stopped"
        finally:
            status = importer.close(status)
    return status


def _print_columns(importer: Importer) -> None:
    columns = importer.columns
    used = [key if key == column else f"{key} <- {column}" for key, column in columns.mapping.items()]
    _say(f"uses {shortened(used)}")
    if columns.own:
        _say(f"does not know, and records under their own names, {shortened(list(columns.own))}")
    if columns.left_out:
        _say(f"leaves out, without a number or a free name, {shortened(columns.left_out)}")


def _print(importer: Importer, console: Console) -> None:
    if importer.n_recorded:
        steps = "1 new step" if importer.n_recorded == 1 else f"{importer.n_recorded} new steps"
        console.print(f"{importer.run}: {steps}, {importer.first} to {importer.last}.")
    elif importer.n_held:
        console.print(f"{importer.run}: nothing new; it holds all {importer.n_held} steps of {importer.source}.")
    else:
        console.print(f"{importer.run}: {importer.source} has no steps.")


def _say(text: str) -> None:
    print(f"rlvr import: {text}", file=sys.stderr)
