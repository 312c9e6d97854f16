"""Child processes of `rlvr demo` and `rlvr compare`: they run `rlvr train`, each with a log, and all end cleanly."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from monitor.children import RLVR, child_environment

TRAINER_PATIENCE_S = 30.0  # a trainer answers SIGTERM by saving its policy and closing its run


def interrupts_raise() -> None:
    """Makes SIGINT and SIGTERM raise KeyboardInterrupt. A shell's background job would otherwise ignore SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def start_trainer(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Starts `rlvr train ARGUMENTS`, its output appended to `log`.

    It gets a session of its own, so that the terminal's Ctrl-C does not reach it: we end it ourselves, once.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as sink:
        return subprocess.Popen(
            [*RLVR, "train", *arguments],
            stdout=sink,
            stderr=sink,
            text=True,
            start_new_session=True,
            env=child_environment() | dict(environment or {}),
        )


def run_bars(console: Console, disable: bool = False) -> Progress:
    """Progress bars of runs; a task's field `now` is the text behind its bar."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    return Progress(*columns, console=console, disable=disable)


def end_all(processes: Sequence[subprocess.Popen[str]], patience_s: float = TRAINER_PATIENCE_S) -> None:
    """Ends the processes that still run: SIGTERM to all at once, then SIGKILL to those still alive after patience_s."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + patience_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


@contextmanager
def ending(process: subprocess.Popen[str], patience_s: float = TRAINER_PATIENCE_S) -> Iterator[subprocess.Popen[str]]:
    """Ends the process when the `with` block ends; see `end_all`."""
    try:
        yield process
    finally:
        end_all([process], patience_s)
