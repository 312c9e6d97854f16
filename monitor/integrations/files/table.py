"""Table: what each reader of a file makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Row = tuple[str, Mapping[str, Any]]  # (where it stands, e.g. "line 7", {column: value})


@dataclass(frozen=True, slots=True)
class Table:
    """A file's columns and rows as they stand in it. A row may lack columns, as loggers write some of them apart.

    names: {column: its name without what the file puts before it, such as a run's name}. notes: what was left out.
    """

    names: dict[str, str]
    rows: Iterable[Row]
    notes: tuple[str, ...] = ()
