"""`rlvr export`: one run as a file to hand on."""

from __future__ import annotations

from typing import Annotated

import tyro

from monitor.commands.output import DEFAULT_STORE
from monitor.commands.parsing import RunName, call
from monitor.errors import MonitorError
from monitor.store.export import export_run, export_tables


def main(argv: list[str]) -> int:
    """`rlvr export`."""
    return call(export, argv, "export")


def export(
    run: RunName,
    out: Annotated[str, tyro.conf.arg(metavar="OUT")],
    /,
    *,
    store: str = DEFAULT_STORE,
    parquet: bool = False,
    csv: bool = False,
) -> int:
    """Write one run as a native DuckDB file, with all rows, views and macros of the store.

    `rlvr store merge OUT.duckdb` puts it into another store. Exits with 1 if files of the run could not be read.

    Args:
        run: name of the run
        out: the file to make; with --parquet or --csv a folder with a file for each table
        store: folder of the store
        parquet: a Parquet file for each table, as the views show them
        csv: a CSV file for each table
    """
    if parquet and csv:
        raise MonitorError("--parquet and --csv exclude each other. Export twice.")
    kind = "parquet" if parquet else "csv"
    left_out = export_tables(store, run, out, kind) if parquet or csv else export_run(store, run, out)
    print(f"{run} is in {out!r}.")
    for path in left_out:
        print(f"Left out, unreadable: {path}")
    return 1 if left_out else 0
