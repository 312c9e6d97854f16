"""`rlvr sql`: any question to a store."""

from __future__ import annotations

from typing import Annotated, Literal

import duckdb
import tyro

from monitor.commands.output import DEFAULT_STORE, print_csv, print_json, print_table, warn_unreadable
from monitor.commands.parsing import StoreFolder, call
from monitor.errors import MonitorError
from monitor.store.reader import open_store


def main(argv: list[str]) -> int:
    """`rlvr sql`."""
    return call(sql, argv, "sql")


def sql(
    query: Annotated[str, tyro.conf.arg(metavar="QUERY")],
    store: StoreFolder = DEFAULT_STORE,
    /,
    *,
    format: Literal["table", "json", "csv"] = "table",
    locked: bool = False,
) -> int:
    """Run one SQL query on a store, also while runs write into it. A faulty query exits with 2.

    Views: runs, steps, histograms, tokens, samples, alerts, events, edges; with _all also replaced attempts.
    docs/store.md has their columns and ten useful queries.

    Args:
        query: the query, in quotes
        store: folder of the store
        format: how the rows are printed
        locked: for queries you do not trust: allow one SELECT, no writes, limited time and memory
    """
    with open_store(store, locked=locked) as opened:
        try:
            result = opened.sql(query)
        except duckdb.Error as error:
            raise MonitorError(f"The query failed. {error}") from None
        left_out = opened.unreadable()
    if format == "json":
        print_json([dict(zip(result.columns, row, strict=True)) for row in result.rows])
    elif format == "csv":
        print_csv(result.columns, result.rows)
    else:
        print_table(result.columns, result.rows)
    warn_unreadable(left_out)
    return 0
