"""A DuckDB in memory that shows a store: views over checked files, refreshed before each query that reads them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from monitor.store.catalog import (
    BEAT_COLUMNS,
    RUN_COLUMNS,
    RUNS_COLUMNS,
    create_edges,
    no_rows,
    segments_query,
    view_statements,
)
from monitor.store.listing import Listing, Unreadable, segment_groups
from monitor.store.macros import MACROS, comment_statements
from monitor.store.runs import RunState, list_runs
from monitor.store.schema import TABLES
from monitor.store.segments import escape_glob, memory_connection, quote

T = TypeVar("T")

_TRIES = 6  # a compaction swaps the files of one run after another, and each swap may make a query fail once
_WORD = re.compile(r"[a-z][a-z0-9_]*")
_STATES: dict[str, Mapping[str, str]] = {"run_files": RUN_COLUMNS, "heartbeats": BEAT_COLUMNS, "runs": RUNS_COLUMNS}
_ANYTHING = {"query", "query_table"}  # functions whose text may name a view in pieces
# Errors of the query itself or of its limits: no file is to blame.
_NOT_OF_A_FILE = (
    duckdb.ParserException,
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.SyntaxException,
    duckdb.InterruptException,
    duckdb.OutOfMemoryException,
    duckdb.PermissionException,
)


class Session:
    """Answers queries on a store. Threads may share it: each query has its own cursor."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.con = memory_connection(threads=2)
        self.con.execute("SET python_enable_replacements = false")  # a table's name must not find a Python variable
        self.con.execute("SET parquet_metadata_cache = true")  # footers are read once, not by each query
        self._listing = Listing(root, self.con.cursor())
        self._shown = dict.fromkeys(TABLES, 0)  # versions of the listing that the views show
        self._faults: list[Unreadable] = []  # of run.json and heartbeats
        self._own_names = True  # False once a statement may have made views or macros of its own
        self._lock = threading.Lock()
        for table in TABLES:
            self.con.execute(f"CREATE VIEW {table}_segments AS {segments_query(table, [])}")
        for name, columns in _STATES.items():
            self.con.execute(f"CREATE TABLE {name} AS {no_rows(columns)}")
        create_edges(self.con)
        for statement in [*view_statements(str(root)), *comment_statements()]:
            self.con.execute(statement)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._listing.close()
        self.con.close()

    def unreadable(self) -> list[Unreadable]:
        """What the queries so far had to leave out."""
        return [*self._listing.unreadable(), *self._faults]

    def run(self, query: str, params: Sequence[Any], fetch: Callable[[duckdb.DuckDBPyRelation], T]) -> T | None:
        """What `fetch` makes of the rows of a query; None for a statement without rows.

        If a read fails because a compaction removed files or because files are damaged by now, the query is repeated
        without these files. Raises duckdb.Error.
        """
        tables, states = self._named_in(query)
        for left in reversed(range(_TRIES)):
            try:
                self._refresh(tables, states)
                with self.con.cursor() as cursor:
                    relation = cursor.sql(query, params=list(params))
                    return None if relation is None else fetch(relation)
            except _NOT_OF_A_FILE:
                raise
            except duckdb.Error:
                if left == 0 or not self._listing.recheck(tables):
                    raise
        raise AssertionError("unreachable")

    def _named_in(self, query: str) -> tuple[list[str], bool]:
        """(tables that a query may read, whether it may read the state of runs), judged by the words in its text."""
        words = set(_WORD.findall(query.lower()))
        if self._own_names and words & {"create", "prepare"}:
            self._own_names = False
        if not self._own_names or words & _ANYTHING:
            return list(TABLES), True
        found = {table for table in TABLES if words & {table, f"{table}_all", f"{table}_segments"}}
        found.update(table for name in words & MACROS.keys() for table in MACROS[name].tables)
        if words & ({"commits"} | TABLES.keys() - {"events"}):
            found.add("steps")
        return list(found), bool(words & _STATES.keys())

    def _refresh(self, tables: Iterable[str], states: bool) -> None:
        with self._lock:
            self._listing.refresh(tuple(tables))
            for table in tables:
                version = self._listing.version(table)
                if version == self._shown[table]:
                    continue
                groups = segment_groups(self._listing.segments(table))
                lists = [f"[{', '.join(quote(escape_glob(path)) for path in paths)}]" for paths in groups]
                self.con.execute(f"CREATE OR REPLACE VIEW {table}_segments AS {segments_query(table, lists)}")
                self._shown[table] = version
            if states:
                self._show_states(list_runs(self.root))

    def _show_states(self, states: Sequence[RunState]) -> None:
        """The tables of run.json, of heartbeats and of what both say together."""
        self._faults = [Unreadable(state.name, path, fault) for state in states for path, fault in state.faults]
        rows: dict[str, list[dict[str, Any]]] = {
            "run_files": [{**state.info, "run": state.name} for state in states],
            "heartbeats": [{**beat, "run": state.name} for state in states for beat in state.heartbeats],
            "runs": [_run_row(state) for state in states],
        }
        for name, columns in _STATES.items():
            fields = ", ".join(f"try_cast(row->>'$.{field}' AS {kind}) AS {field}" for field, kind in columns.items())
            text = json.dumps(rows[name], ensure_ascii=False, default=str).encode("utf-8", "replace").decode()
            self.con.execute(
                f"CREATE OR REPLACE TABLE {name} AS SELECT {fields} FROM "
                "(SELECT unnest(from_json(?::JSON, '[\"JSON\"]')) AS row)",
                [text],
            )


def _run_row(state: RunState) -> dict[str, Any]:
    own = {name: getattr(state, name) for name in RUNS_COLUMNS if hasattr(state, name)}
    return {**state.info, **own, "run": state.name, "ranks": len(state.heartbeats)}


def fetch_all(relation: duckdb.DuckDBPyRelation) -> pa.Table:
    return relation.to_arrow_table()
