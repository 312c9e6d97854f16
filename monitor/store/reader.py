"""Asking a store in SQL, also while runs write into it: `open_store(path).sql(query)`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from monitor.errors import StoreError
from monitor.store.catalog import build_catalog, ensure_catalog
from monitor.store.runs import RunState, get_run, list_runs, require_store, run_names
from monitor.store.schema import TABLES
from monitor.store.segments import (
    QUARANTINED,
    SEED_RUN,
    list_segments,
    memory_connection,
    quarantine_if_damaged,
    write_seeds,
)

_TRIES = 6  # a compaction swaps one run after the other; each swap can hit a query that spans them all once
_NAMED_FILE = re.compile(r"""["']([^"']+\.parquet)["']""")


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
    """A store opened for questions. Use one Store in as many threads as you like: each query has its own cursor.

    The tables and views are those of docs/store.md. `locked` is for text that is not trusted: one SELECT at a time,
    no file outside the store, nothing written.
    """

    def __init__(self, path: str | Path, *, locked: bool = False) -> None:
        self.root = require_store(path)
        self.locked = locked
        with contextlib.suppress(OSError, duckdb.IOException):  # a store that cannot be written can still be read
            ensure_catalog(self.root)
        self._con = memory_connection(threads=2)
        self._con.execute("SET python_enable_replacements = false")  # a table's name must not find a Python variable
        self._repairing(lambda: build_catalog(self._con, self.root))
        if locked:
            self._con.execute("SET allowed_directories = [?]", [str(self.root)])
            self._con.execute("SET enable_external_access = false")
            self._con.execute("SET lock_configuration = true")

    def sql(self, query: str, params: Sequence[Any] = ()) -> Result:
        """Run one query. `?` in it takes `params` in order.

        Files that a compaction removed meanwhile are looked up again; damaged files are set aside
        (`*.parquet.quarantined`) and the query is answered from the rest. Raises duckdb.Error for a faulty query,
        StoreError for anything but one SELECT on a locked store.
        """
        if self.locked:
            self._require_select(query)

        def run() -> Result:
            with self._con.cursor() as cursor:
                relation = cursor.sql(query, params=list(params))
                return Result(relation.to_arrow_table() if relation is not None else pa.table({}))

        return self._repairing(run)

    def runs(self) -> list[RunState]:
        """All runs, oldest first."""
        return list_runs(self.root)

    def run(self, name: str) -> RunState:
        """One run. Raises UnknownRunError with the nearest known name."""
        return get_run(self.root, name)

    def quarantined(self) -> list[Path]:
        """Damaged files that were set aside."""
        return sorted(self.root.glob(f"runs/*/data/*/*{QUARANTINED}"))

    def close(self) -> None:
        self._con.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_select(self, query: str) -> None:
        statements = self._con.extract_statements(query)
        kinds = [str(statement.type).rpartition(".")[2] for statement in statements]
        if kinds != ["SELECT"]:
            raise StoreError(f"A locked store answers one SELECT at a time, got {', '.join(kinds) or 'nothing'}.")

    def _repairing(self, run: Any) -> Any:
        for left in reversed(range(_TRIES)):
            try:
                return run()
            except (duckdb.IOException, duckdb.InvalidInputException, duckdb.InternalException) as error:
                if left == 0 or not self._repair(str(error)):
                    raise

    def _repair(self, message: str) -> bool:
        """True if the cause of a failed read is gone: the file was swapped away, or is set aside now."""
        if "No files found" in message and "*" in message:  # an empty glob: the seeds are gone
            write_seeds(self.root)
            return True
        named = [Path(found) for found in _NAMED_FILE.findall(message)]
        inside = [path for path in named if self.root in path.parents]
        if any(SEED_RUN in path.parts for path in inside):
            for path in inside:
                path.unlink(missing_ok=True)
            write_seeds(self.root)
            return True
        if inside:
            return sum(not path.exists() or quarantine_if_damaged(path) for path in inside) > 0  # look at each
        return self._quarantine_all()  # DuckDB does not name the file in every error

    def _quarantine_all(self) -> bool:
        paths = [p for run in run_names(self.root) for table in TABLES for _, p in list_segments(self.root, run, table)]
        return sum(quarantine_if_damaged(path) for path in paths) > 0  # look at each


def open_store(path: str | Path, *, locked: bool = False) -> Store:
    """Open the store in a folder. Raises StoreError if there is none.

    Example: open_store("runs").sql("SELECT run, max(step) FROM steps GROUP BY run").rows
    """
    return Store(path, locked=locked)
