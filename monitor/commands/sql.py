"""`rlvr sql`: any question to a store."""

from __future__ import annotations

import argparse

import duckdb

from monitor.commands.output import DEFAULT_STORE, print_csv, print_json, print_table, warn_unreadable
from monitor.errors import MonitorError
from monitor.store.reader import open_store

_ABOUT = """Run one SQL query on a store, also while runs write into it.

Views: runs, steps, histograms, tokens, samples, alerts, events, edges; with _all also replaced attempts.
docs/store.md has their columns and ten useful queries."""


def main(argv: list[str]) -> int:
    """Print the rows of a query. A faulty query is wrong use: exit code 2."""
    parser = argparse.ArgumentParser(
        prog="rlvr sql", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("query", help="the query, in quotes")
    parser.add_argument("store", nargs="?", default=DEFAULT_STORE, help="folder of the store (default: runs)")
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table")
    parser.add_argument(
        "--locked",
        action="store_true",
        help="for text you do not trust: one SELECT, no writes, limits",
    )
    args = parser.parse_args(argv)
    with open_store(args.store, locked=args.locked) as store:
        try:
            result = store.sql(args.query)
        except duckdb.Error as error:
            raise MonitorError(f"The query failed. {error}") from None
        left_out = store.unreadable()
    if args.format == "json":
        print_json([dict(zip(result.columns, row, strict=True)) for row in result.rows])
    elif args.format == "csv":
        print_csv(result.columns, result.rows)
    else:
        print_table(result.columns, result.rows)
    warn_unreadable(left_out)
    return 0
