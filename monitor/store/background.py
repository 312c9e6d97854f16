"""Compaction of a run while it is recorded, so that a query never has to open thousands of files."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import duckdb

from monitor.store.compact import TOGETHER, compact_closed, drop_replaced
from monitor.store.runs import heartbeat_files
from monitor.store.schema import run_dir
from monitor.store.segments import memory_connection

_PAUSE_S = 1.0  # the shortest time between two passes
_CLOSING_S = 10.0  # replaced files that are this old go when the recorder closes; the others wait for the next pass
Fault = Callable[[str, BaseException, int | None], None]


class Compactor:
    """Merges closed ranges of a run from a thread of its own, which starts when there is enough to merge.

    The writer goes on meanwhile; it waits only for the swap, some milliseconds. DuckDB merges with one thread and
    without the interpreter's lock. The thread has no lower priority, for then the trainer might wait for that lock
    while the system lets other processes go first. The lowest rank that records into the folder merges for all ranks.
    fault: takes errors, which stop a pass and nothing else.
    """

    def __init__(self, store: Path, run: str, rank: int, fault: Fault) -> None:
        self._store, self._run, self._rank, self._fault = store, run, rank, fault
        self._written = 0
        self._due = threading.Event()
        self._stopped = threading.Event()
        self._con: duckdb.DuckDBPyConnection | None = None
        self._thread: threading.Thread | None = None

    def wrote(self) -> None:
        """A segment of steps was written. Returns at once."""
        self._written += 1
        if self._written < TOGETHER:
            return
        if min((rank for rank, *_ in heartbeat_files(run_dir(self._store, self._run))), default=0) < self._rank:
            self._written = 0
            return
        self._due.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="rlvr-compaction", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:
                self._fault("compaction_error", error, None)

    def stop(self) -> None:
        """End a pass that is under way, which leaves the run as it was. Remove replaced files that are old enough."""
        self._stopped.set()
        self._due.set()
        thread = self._thread
        while thread is not None and thread.is_alive():
            with contextlib.suppress(AttributeError, duckdb.Error):
                self._con.interrupt()  # type: ignore[union-attr]
            thread.join(0.05)
        if thread is not None:
            with contextlib.suppress(OSError):
                drop_replaced(self._store, self._run, older_than_s=_CLOSING_S)

    def _work(self) -> None:
        while True:
            self._due.wait()
            if self._stopped.is_set():
                return
            self._due.clear()
            self._written = TOGETHER - max(1, TOGETHER // 4)  # looks again before as many are there as are merged
            try:
                with memory_connection() as self._con:
                    while not self._stopped.is_set() and compact_closed(self._store, self._run, self._con):
                        pass  # what was merged may be due in a higher tier
            except Exception as error:
                if not self._stopped.is_set():
                    self._fault("compaction_error", error, None)
            self._stopped.wait(_PAUSE_S)
