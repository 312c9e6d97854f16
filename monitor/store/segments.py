"""Segments: the immutable Parquet files of a run, written so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from pathlib import Path

import duckdb
import pyarrow as pa

from monitor.store.schema import SCHEMA_VERSION, TABLES, SegmentName, run_dir, table_dir

_COPY = "FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, PARQUET_VERSION v2, WRITE_BLOOM_FILTER false"
_CHUNK = 1 << 22  # bytes read at once for the CRC
SEED_RUN = "_seed"
_SEED_STEPS = (SCHEMA_VERSION, SCHEMA_VERSION)
QUARANTINED = ".quarantined"


def quote(text: str) -> str:
    """An SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def escape_glob(path: str) -> str:
    """A path for DuckDB's list of globs, with *, ? and [ escaped."""
    return re.sub(r"([*?\[])", r"[\1]", path)


def memory_connection(threads: int = 1) -> duckdb.DuckDBPyConnection:
    """A private in-memory DuckDB. It has one thread by default, so that the writer leaves the trainer its cores."""
    return duckdb.connect(":memory:", config={"threads": threads})


def select_columns(table: str, run: str, attempt: int, rank: int) -> str:
    """SELECT list that gives a table's columns, in order and type, from a relation without the run's constants."""
    constants = {"run": quote(run), "attempt": str(attempt), "rank": str(rank)}
    return ", ".join(f'{constants.get(c, f"{chr(34)}{c}{chr(34)}")}::{t} AS "{c}"' for c, t in TABLES[table].items())


def fsync_file(path: Path) -> None:
    """Make a file's bytes durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable, so also renames. Raises OSError."""
    fsync_file(folder)


def crc32_of(path: Path, *, sync: bool = False) -> int:
    """CRC-32 of a file's bytes; with `sync` also fsync it. Raises OSError."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
        if sync:
            os.fsync(file.fileno())
    return crc


def copy_segment(
    con: duckdb.DuckDBPyConnection,
    query: str,
    folder: Path,
    key: tuple[int, int, int, int],
    group_rows: int | None = None,
    sync: bool = True,
) -> Path:
    """Write a query's rows as one durable segment: tmp, fsync, CRC into the name, rename, fsync the folder.

    `key` is (attempt, rank, first step, last step), group_rows the rows of a row group. Without `sync` nothing is
    fsynced: the segment then survives this process, but maybe no power cut. Raises OSError or duckdb.Error; the
    temporary file is removed.
    """
    tmp = folder / f"{'-'.join(str(part) for part in key)}.parquet.tmp"
    try:
        size = f", ROW_GROUP_SIZE {group_rows}" if group_rows else ""
        con.execute(f"COPY ({query}) TO {quote(str(tmp))} ({_COPY}{size})")
        final = folder / str(SegmentName(*key, crc32_of(tmp, sync=sync)))
        os.rename(tmp, final)
    except BaseException:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise
    if sync:
        fsync_folder(folder)
    return final


def write_segment(
    con: duckdb.DuckDBPyConnection,
    store: Path,
    run: str,
    table: str,
    rows: pa.Table,
    key: tuple[int, int, int, int],
    *,
    sync: bool = True,
) -> Path:
    """Write `rows` (all columns but run, attempt and rank) as one segment of a run's table, like `copy_segment`."""
    con.register("segment_rows", rows)
    try:
        query = f"SELECT {select_columns(table, run, key[0], key[1])} FROM segment_rows"
        return copy_segment(con, query, table_dir(store, run, table), key, sync=sync)
    finally:
        con.unregister("segment_rows")


def list_segments(store: Path, run: str, table: str) -> list[tuple[SegmentName, Path]]:
    """The segments of one table of a run, by attempt, rank and first step; other files are left out."""
    with contextlib.suppress(FileNotFoundError), os.scandir(table_dir(store, run, table)) as entries:
        found = [(name, Path(entry.path)) for entry in entries if (name := SegmentName.parse(entry.name))]
        return sorted(found, key=lambda item: (item[0].attempt, item[0].rank, item[0].first_step, item[0].last_step))
    return []


def write_seeds(store: Path) -> None:
    """Writes zero-row segments and empty JSON objects into a folder that is not a run's.

    They fix the types of the columns for the globs of store.duckdb, and no such glob is ever empty. The steps in their
    names are the version of the schema. Our own readers list files and need no seeds. Raises OSError.
    """
    seed = run_dir(store, SEED_RUN)
    for name in ("run.json", "heartbeat-r000.json"):
        if not (seed / name).exists():
            seed.mkdir(parents=True, exist_ok=True)
            replace_text(seed / name, "{}")
    todo = [table for table in TABLES if not _has_seed(store, table)]
    if not todo:
        return
    with memory_connection() as con:
        for table in todo:
            folder = table_dir(store, SEED_RUN, table)
            folder.mkdir(parents=True, exist_ok=True)
            columns = ", ".join(f'NULL::{t} AS "{c}"' for c, t in TABLES[table].items())
            tmp = folder / f"seed.{os.getpid()}-{id(con)}.parquet.tmp"  # several processes may open a new store at once
            con.execute(f"COPY (SELECT {columns} WHERE false) TO {quote(str(tmp))} ({_COPY})")
            os.rename(tmp, folder / str(SegmentName(0, 0, *_SEED_STEPS, crc32_of(tmp, sync=True))))


def _has_seed(store: Path, table: str) -> bool:
    """Whether some seed of a table is there and whole."""
    for name, path in list_segments(store, SEED_RUN, table):
        with contextlib.suppress(OSError):
            if (name.first_step, name.last_step) == _SEED_STEPS and crc32_of(path) == name.crc32:
                return True
    return False


def replace_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Replace a small file so that a reader sees the old or the new text, never half. Raises OSError.

    With `sync` the text is fsynced before it takes the old one's place, but not the folder.
    """
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "w", encoding="utf-8") as file:
            file.write(text)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(tmp, path)
    except OSError:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise
