"""One function per question: a DuckDB connection and arguments in, a Frame (dict of numpy columns) out.

The connection shows the tables of monitor.store.schema as views: a Tail's `cursor()` or an opened catalog. `frame`
takes a Store too. `series.py` asks about runs and scalars, `distributions.py` about histograms, `alerts.py` about
alerts and events, `rollouts.py` about samples and tokens, `differences.py` about several runs at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np

from monitor.store.reader import Store

Frame = dict[str, np.ndarray]
MAX_POINTS = 2000


def frame(con: duckdb.DuckDBPyConnection | Store, sql: str, parameters: Sequence[Any] = ()) -> Frame:
    """The result of a query as plain numpy columns; NULL is nan in numbers and '' in text (of a Store: None)."""
    if isinstance(con, Store):
        return con.sql(sql, parameters).frame()
    columns = con.execute(sql, list(parameters)).fetchnumpy()
    return {name: _plain(column) for name, column in columns.items()}


def _plain(column: np.ndarray) -> np.ndarray:
    if not isinstance(column, np.ma.MaskedArray):
        return column
    if column.dtype.kind in "fiub":
        return np.ma.filled(column.astype(np.float64), np.nan) if column.mask.any() else column.data
    return column.filled("")


def n_rows(rows: Frame) -> int:
    return len(next(iter(rows.values()))) if rows else 0


def select(rows: Frame, mask: np.ndarray) -> Frame:
    """The rows of a frame where `mask` holds."""
    return {name: column[mask] for name, column in rows.items()}
