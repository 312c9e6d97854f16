"""What all readers of files share: the rows that they give, and how a file that grows is read on.

A reader is made for one source. Each `read()` gives the rows that are new since the last one, so a file that is still
being written costs what was added to it. If what was read before is no longer there, because the file was begun anew,
`read()` raises BegunAnew, and a new reader gives all rows again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

Row = tuple[str, Mapping[str, Any]]  # (where it stands, e.g. "line 7", {column: value})
TIME = "_timestamp"  # the column of a row's wall time, seconds since 1970, as W&B calls it
_KNOWN_BYTES = 512  # of its beginning and of the end of what was read, by which a file is known again


class BegunAnew(Exception):
    """The file does not go on from what was read of it."""


class Reader(Protocol):
    """Rows as they stand in a source. A row may lack columns, as loggers write some of them apart.

    names: {column: its name without what the file puts before it, such as a run's name}; it may grow with each read.
    notes: what was left out. config: settings of the run, where the source has them.
    """

    names: dict[str, str]
    notes: list[str]
    config: dict[str, Any]

    def read(self) -> list[Row]: ...


class GrowingFile:
    """The bytes that are new in a file. Raises BegunAnew, also for another file of the same name that is longer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None
        self._at, self._head, self._last = 0, b"", b""

    def new_bytes(self) -> bytes:
        """What was added behind the bytes that `take` has taken; b"" while the file is as it was."""
        found = os.stat(self.path)
        seen = (found.st_size, found.st_mtime_ns)
        if seen == self._seen:
            return b""
        with self.path.open("rb") as file:
            if self._at:
                head = file.read(len(self._head))
                file.seek(self._at - len(self._last))
                if (head, file.read(len(self._last))) != (self._head, self._last):
                    raise BegunAnew(self.path)
            added = file.read()
        self._seen = seen
        return added

    def take(self, data: bytes) -> None:
        """Count bytes at the beginning of what `new_bytes` gave as read; the others are given again."""
        self._head = (self._head + data)[:_KNOWN_BYTES] if len(self._head) < _KNOWN_BYTES else self._head
        self._last = (self._last + data)[-_KNOWN_BYTES:]
        self._at += len(data)
