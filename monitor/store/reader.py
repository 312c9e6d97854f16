"""Asking a store in SQL, also while runs write into it: `open_store(path).sql(query)`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from monitor.store.catalog import ensure_catalog
from monitor.store.listing import Unreadable
from monitor.store.locked import Limits, LockedSession
from monitor.store.runs import RunState, get_run, list_runs, require_store, run_names
from monitor.store.schema import TABLES, table_dir
from monitor.store.segments import QUARANTINED
from monitor.store.session import Session, fetch_all


class Result:
    """The rows of a query, all fetched: later writes or compactions cannot disturb them."""

    def __init__(self, table: pa.Table) -> None:
        self.arrow = table

    @property
    def columns(self) -> list[str]:
        return list(self.arrow.column_names)

    @cached_property
    def rows(self) -> list[tuple[Any, ...]]:
        """Rows as tuples of Python values; exact decimals (sums of integers, too) become int or float."""
        columns = [_plain(column).to_pylist() for column in self.arrow.columns]
        return list(zip(*columns, strict=True))

    def frame(self) -> dict[str, np.ndarray]:
        """Columns as numpy arrays: NULL numbers are nan, texts and lists are objects."""
        return {name: _numpy(_plain(column)) for name, column in zip(self.columns, self.arrow.columns, strict=True)}

    def __len__(self) -> int:
        return self.arrow.num_rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_decimal(column.type):
        return column
    if column.type.scale:
        return column.cast(pa.float64())
    values: list[Decimal | None] = column.to_pylist()
    whole = [None if value is None else int(value) for value in values]
    fits = all(value is None or -(2**63) <= value < 2**63 for value in whole)
    return pa.chunked_array([pa.array(whole, pa.int64() if fits else pa.float64())])


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_list(column.type):
        values = np.empty(len(column), object)
        for index, item in enumerate(column):
            values[index] = None if item.as_py() is None else np.asarray(item.as_py())
        return values
    return column.to_numpy()


class Store:
    """A store opened for queries. Threads may share one Store, because each query has its own cursor.

    The tables and views are those of docs/store.md. Nothing in the store is ever changed. What cannot be read is left
    out, and `unreadable` names it. `locked` is for queries that are not trusted (monitor/store/locked.py): it allows
    one SELECT at a time on the views, within `limits`, and runs it in a process that cannot write.
    """

    def __init__(self, path: str | Path, *, locked: bool = False, limits: Limits | None = None) -> None:
        self.root = require_store(path)
        self.locked = locked
        self._faults: dict[str, list[Unreadable]] = {}
        with contextlib.suppress(OSError, duckdb.Error):  # for other clients; not needed here
            ensure_catalog(self.root)
        self._session = LockedSession(self.root, limits or Limits()) if locked else Session(self.root)

    def sql(self, query: str, params: Sequence[Any] = ()) -> Result:
        """Run one query. `?` in it takes `params` in order.

        The bytes of a file are checked when a query first reads it. If a compaction removes files meanwhile, the query
        is repeated on the new ones. Damaged files are left out. Raises duckdb.Error for a faulty query. On a locked
        store, raises StoreError for anything but a plain SELECT, and for a query beyond the limits.
        """
        if isinstance(self._session, LockedSession):
            return Result(self._session.run(query, params))
        table = self._session.run(query, params, fetch_all)
        return Result(pa.table({}) if table is None else table)

    def unreadable(self) -> list[Unreadable]:
        """The files that the queries so far, `runs` and `run` had to leave out, and why.

        Only files that were needed have been read; `rlvr store check` reads every byte of a store.
        """
        found = {*self._session.unreadable(), *(one for faults in self._faults.values() for one in faults)}
        return sorted(found, key=lambda one: (one.run, str(one.path)))

    def runs(self) -> list[RunState]:
        """All runs, oldest first."""
        return [self._noted(state) for state in list_runs(self.root)]

    def run(self, name: str) -> RunState:
        """One run. Raises UnknownRunError with the nearest known name."""
        return self._noted(get_run(self.root, name))

    def _noted(self, state: RunState) -> RunState:
        self._faults[state.name] = [Unreadable(state.name, path, fault) for path, fault in state.faults]
        return state

    def quarantined(self) -> list[Path]:
        """Damaged files that were set aside."""
        return sorted(
            path
            for run in run_names(self.root)
            for table in TABLES
            for path in table_dir(self.root, run, table).glob(f"*{QUARANTINED}")
        )

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_store(path: str | Path, *, locked: bool = False, limits: Limits | None = None) -> Store:
    """Open the store in a folder. Raises StoreError if there is none.

    Example: open_store("runs").sql("SELECT run, max(step) FROM steps GROUP BY run").rows
    """
    return Store(path, locked=locked, limits=limits)
