"""Child processes of the commands that start others: `rlvr train` with a log, its progress, and a clean end for all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

RLVR = (sys.executable, "-m", "monitor.cli")
TRAINER_PATIENCE_S = 30.0  # a trainer answers SIGTERM by saving its policy and closing its run


def interrupts_raise() -> None:
    """SIGINT and SIGTERM raise KeyboardInterrupt; SIGINT too, which a shell's background job inherits as ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def start_trainer(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """`rlvr train ARGUMENTS`, its output added to `log`; in a session of its own: Ctrl-C reaches it once, from us."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as sink:
        return subprocess.Popen(
            [*RLVR, "train", *arguments],
            stdout=sink,
            stderr=sink,
            text=True,
            start_new_session=True,
            env=os.environ | dict(environment or {}),
        )


def run_bars(console: Console, disable: bool = False) -> Progress:
    """Progress bars of runs; a task's field `now` is the text behind its bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    return Progress(*columns, console=console, disable=disable)


def end_all(processes: Sequence[subprocess.Popen[str]], patience_s: float = TRAINER_PATIENCE_S) -> None:
    """Ends what still runs: SIGTERM to all at once, then SIGKILL to those that outlast the patience."""
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
    """Ends the process on the way out; see `end_all`."""
    try:
        yield process
    finally:
        end_all([process], patience_s)
