"""What commands that run until they are stopped share."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from monitor.commands.output import SEVERITY_STYLE
from monitor.records import Alert


def print_alert(console: Console, run: str, alert: Alert) -> None:
    """An alert of a run, what it means and what to do."""
    resolved = alert.state == "resolved"
    head = "RESOLVED" if resolved else alert.severity.upper()
    line = Text.assemble((f"{head:8} ", "green" if resolved else SEVERITY_STYLE[alert.severity]))
    line.append(f"{run}: {alert.rule} at step {alert.step}", style="bold")
    console.print(line)
    console.print(Text(f"         {alert.message}"))
    if alert.action:
        console.print(Text(f"         {alert.action}", style="dim"))


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
