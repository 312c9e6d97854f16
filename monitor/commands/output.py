"""What the commands print: tables, JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from monitor.records import finite

if TYPE_CHECKING:
    from monitor.store.listing import Unreadable


DEFAULT_STORE = "runs"
_PIPED_WIDTH = 240  # characters in a line of a table that goes to a file or a pipe, where no value may be cut off
STATUS_STYLE = {"running": "green", "stalled": "yellow", "crashed": "red", "failed": "red"}
SEVERITY_STYLE = {"info": "cyan", "warning": "yellow", "critical": "bold red"}


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """A table as wide as the terminal. Texts are printed as they are: markup in them means nothing."""
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=_PIPED_WIDTH)
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    filled = [[cell(value) for value in row] for row in rows]
    for index, name in enumerate(columns):
        number = bool(filled) and all(_is_number(row[index]) for row in filled)
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in filled:
        table.add_row(*row)
    console.print(table)


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 or not math.isfinite(value) else f"{value:.6e}"
    if isinstance(value, list):
        return "[" + ", ".join(cell(item) for item in value) + "]"
    return str(value)


def print_json(value: Any) -> None:
    """Prints JSON that any parser reads: values that are not finite become null."""
    print(json.dumps(finite(value), indent=1, default=str))


def print_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints CSV with a header. Lists and objects are written as JSON."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([json.dumps(value) if isinstance(value, list | dict) else value for value in row])


def warn_unreadable(left_out: Sequence[Unreadable]) -> None:
    """Prints one line on stderr if files had to be left out of an answer."""
    if left_out:
        first, more = left_out[0], f", and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        files = "file was" if len(left_out) == 1 else "files were"
        print(
            f"rlvr: {len(left_out)} {files} left out: {first.path}: {first.reason}{more}. "
            "`rlvr store check` names all.",
            file=sys.stderr,
        )


def size(n_bytes: float) -> str:
    """A number of bytes in a unit that people read, e.g. 1.2 MB."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} GB"


def ago(ts: float | None) -> str:
    """How long ago a time was."""
    if not ts:
        return "-"
    seconds = max(0.0, time.time() - ts)
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit} ago"
    return f"{seconds / 86400:.0f} days ago"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == "-"
    return True
