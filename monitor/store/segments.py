"""Segments: the immutable Parquet files of a run, written so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import logging
import os
import zlib
from pathlib import Path

import duckdb
import pyarrow as pa

from monitor.store.schema import TABLES, SegmentName, run_dir, table_dir

_log = logging.getLogger("rlvr.monitor")
_COPY = "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, PARQUET_VERSION v2)"
_CHUNK = 1 << 22  # bytes read at once for the CRC
SEED_RUN = "_seed"
QUARANTINED = ".quarantined"


def quote(text: str) -> str:
    """An SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def memory_connection(threads: int = 1) -> duckdb.DuckDBPyConnection:
    """A private in-memory DuckDB. One thread by default: the writer must not take the trainer's cores."""
    return duckdb.connect(":memory:", config={"threads": threads})


def select_columns(table: str, run: str, attempt: int, rank: int) -> str:
    """SELECT list that gives a table's columns, in order and type, from a relation without the run's constants."""
    constants = {"run": quote(run), "attempt": str(attempt), "rank": str(rank)}
    return ", ".join(f'{constants.get(c, f"{chr(34)}{c}{chr(34)}")}::{t} AS "{c}"' for c, t in TABLES[table].items())


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def crc32_of(path: Path, *, sync: bool = False) -> int:
    """CRC-32 of a file's bytes; with `sync` also fsync it. Raises OSError."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
        if sync:
            os.fsync(file.fileno())
    return crc


def copy_segment(con: duckdb.DuckDBPyConnection, query: str, folder: Path, key: tuple[int, int, int, int]) -> Path:
    """Write a query's rows as one durable segment: tmp, fsync, CRC into the name, rename, fsync the folder.

    `key` is (attempt, rank, first step, last step). Raises OSError or duckdb.Error; the temporary file is removed.
    """
    tmp = folder / f"{'-'.join(str(part) for part in key)}.parquet.tmp"
    try:
        con.execute(f"COPY ({query}) TO {quote(str(tmp))} {_COPY}")
        final = folder / str(SegmentName(*key, crc32_of(tmp, sync=True)))
        os.rename(tmp, final)
    except BaseException:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise
    fsync_folder(folder)
    return final


def write_segment(
    con: duckdb.DuckDBPyConnection, store: Path, run: str, table: str, rows: pa.Table, key: tuple[int, int, int, int]
) -> Path:
    """Write `rows` (all columns but run, attempt and rank) as one durable segment of a run's table."""
    con.register("segment_rows", rows)
    try:
        query = f"SELECT {select_columns(table, run, key[0], key[1])} FROM segment_rows"
        return copy_segment(con, query, table_dir(store, run, table), key)
    finally:
        con.unregister("segment_rows")


def list_segments(store: Path, run: str, table: str) -> list[tuple[SegmentName, Path]]:
    """The segments of one table of a run, by attempt, rank and first step; other files are left out."""
    with contextlib.suppress(FileNotFoundError), os.scandir(table_dir(store, run, table)) as entries:
        found = [(name, Path(entry.path)) for entry in entries if (name := SegmentName.parse(entry.name))]
        return sorted(found, key=lambda item: (item[0].attempt, item[0].rank, item[0].first_step, item[0].last_step))
    return []


def quarantine_if_damaged(path: Path) -> bool:
    """Set a segment aside if its bytes are not those that were written; the rest of the store stays readable.

    True if the file is gone from the globs now: damaged and renamed to `*.quarantined`, or removed by a compaction.
    """
    name = SegmentName.parse(path.name)
    try:
        if name is not None and crc32_of(path) == name.crc32:
            return False
        os.rename(path, path.with_name(path.name + QUARANTINED))
    except FileNotFoundError:
        return True
    _log.warning("Damaged file set aside: %s. `rlvr store check` lists all; the rest stays readable.", path)
    return True


def write_seeds(store: Path) -> None:
    """Zero-row files that fix every table's schema and keep every glob of the catalog from being empty."""
    seed = run_dir(store, SEED_RUN)
    todo = [table for table in TABLES if not (seed / "data" / table / "seed.parquet").exists()]
    for name in ("seed-run.json", "seed-heartbeat-r000.json"):
        if not (seed / name).exists():
            seed.mkdir(parents=True, exist_ok=True)
            replace_text(seed / name, "{}")
    if not todo:
        return
    with memory_connection() as con:
        for table in todo:
            folder = seed / "data" / table
            folder.mkdir(parents=True, exist_ok=True)
            columns = ", ".join(f'NULL::{t} AS "{c}"' for c, t in TABLES[table].items())
            tmp = folder / f"seed.{os.getpid()}-{id(con)}.parquet.tmp"
            con.execute(f"COPY (SELECT {columns} WHERE false) TO {quote(str(tmp))} {_COPY}")
            os.rename(tmp, folder / "seed.parquet")


def replace_text(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new text, never half. Raises OSError."""
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        tmp.write_text(text, encoding="utf-8")
        os.replace(tmp, path)
    except OSError:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise
