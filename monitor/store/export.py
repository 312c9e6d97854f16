"""Taking runs out of a store and into another: a native DuckDB file, Parquet or CSV files; merging stores and exports.

An export as a DuckDB file holds everything of a run, also replaced attempts, with the views and macros of a store. So
it answers what the store answers, in any DuckDB client and without this package, and `merge` can put it back.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from monitor.errors import StoreError
from monitor.store.catalog import FORMAT, create_edges, view_statements
from monitor.store.compact import PRUNED, understood
from monitor.store.macros import comment_statements
from monitor.store.reserve import told
from monitor.store.runs import (
    get_known_run,
    heartbeat_files,
    is_run_name,
    later_version,
    read_json,
    require_store,
    run_names,
    run_state,
)
from monitor.store.schema import SCHEMA_VERSION, TABLES, run_dir
from monitor.store.segments import (
    copy_segment,
    crc32_of,
    fsync_folder,
    list_segments,
    memory_connection,
    quote,
    replace_text,
    write_seeds,
)
from monitor.store.session import Session

_STATES = ("run_files", "heartbeats", "runs")
_TEXTS = ("run.json", "alerts.json")  # of a run's folder, beside its heartbeats, that go with it


def export_run(store: str | Path, run: str, target: str | Path) -> list[Path]:
    """Write one run as a native DuckDB file (storage format v1.2.0); returns what was left out as unreadable.

    Raises StoreError for an unknown run, a target that exists and where the disk refuses; then nothing is left behind.
    """
    root, target = require_store(store), Path(target)
    get_known_run(root, run)
    with _written(target) as tmp, Session(root) as session:
        session.run(f"ATTACH {quote(str(tmp))} AS exported (STORAGE_VERSION '{FORMAT}')", [], str)
        for table in TABLES:
            query = f"SELECT * FROM {table}_all WHERE run = {quote(run)} ORDER BY attempt, rank, step"
            session.run(f"CREATE OR REPLACE TABLE exported.{table}_rows AS {query}", [], str)
        for name in _STATES:
            query = f"SELECT * FROM {name} WHERE run = {quote(run)}"
            session.run(f"CREATE OR REPLACE TABLE exported.{name} AS {query}", [], str)
        con = session.con
        con.execute("CREATE TABLE exported.export_files (name VARCHAR, content VARCHAR)")
        for name, text in _texts(root, run).items():
            con.execute("INSERT INTO exported.export_files VALUES (?, ?)", [name, text])
        con.execute(
            f"CREATE TABLE exported.store_info AS SELECT {quote(run)} AS run, {SCHEMA_VERSION} AS schema_version"
        )
        con.execute("USE exported")
        create_edges(con)
        for table in TABLES:
            con.execute(
                f"CREATE VIEW {table}_segments AS SELECT *, '/runs/' || run || '/data' AS file FROM {table}_rows"
            )
        for statement in [*view_statements(""), *comment_statements()]:
            con.execute(statement)
        con.execute("USE memory")
        con.execute("DETACH exported")
        left_out = [one.path for one in session.unreadable() if one.run == run]
    return left_out


def export_tables(store: str | Path, run: str, folder: str | Path, kind: str) -> list[Path]:
    """Write the tables of one run, as the views show them, as files of a folder: kind "parquet" or "csv".

    Returns and raises like `export_run`.
    """
    root, folder = require_store(store), Path(folder)
    get_known_run(root, run)
    options = "FORMAT parquet, COMPRESSION zstd" if kind == "parquet" else "FORMAT csv, HEADER"
    with _written(folder) as tmp, Session(root) as session:
        tmp.mkdir()
        for table in TABLES:
            query = f"SELECT * FROM {table} WHERE run = {quote(run)} ORDER BY step, rank"
            session.run(f"COPY ({query}) TO {quote(str(tmp / f'{table}.{kind}'))} ({options})", [], str)
        (tmp / "run.json").write_text(_texts(root, run).get("run.json", "{}"), encoding="utf-8")
        left_out = [one.path for one in session.unreadable() if one.run == run]
    return left_out


def merge(store: str | Path, source: str | Path) -> tuple[list[str], list[str]]:
    """Copy the runs of another store, or of an export (a DuckDB file), into a store, which is made if missing.

    Returns (names of the runs that were copied, why others were not). Each run appears whole or not at all. A run that
    is there already is left alone. Raises StoreError if the source is neither, and where the disk refuses.
    """
    root, source = Path(store).expanduser().absolute(), Path(source).expanduser().absolute()
    done: list[str] = []
    refused: list[str] = []
    try:
        (root / "runs").mkdir(parents=True, exist_ok=True)
        write_seeds(root)
        names = [_export_name(source)] if source.is_file() else run_names(require_store(source))
        for name in names:
            reason = _why_not(root, source, name)
            if reason:
                refused.append(f"{name}: {reason}")
                continue
            staged = root / "runs" / f".{name}.{os.getpid()}.tmp"
            shutil.rmtree(staged, ignore_errors=True)
            try:
                if source.is_file():
                    _unpack(source, staged, name)
                else:
                    _copy(source, staged, name)
                os.rename(staged, run_dir(root, name))
                fsync_folder(root / "runs")
                done.append(name)
            except StoreError as error:
                refused.append(f"{name}: {error}")
            finally:
                shutil.rmtree(staged, ignore_errors=True)
    except (OSError, duckdb.Error) as error:
        raise StoreError(f"Cannot merge {str(source)!r} into {str(root)!r}: {told(error)}.") from error
    return done, refused


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """A path to write to, which takes the target's name when all went well. Raises StoreError."""
    if target.exists():
        raise StoreError(f"{str(target)!r} exists. Give a new name, or remove it first.")
    tmp = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        os.rename(tmp, target)
    except (OSError, duckdb.Error) as error:
        raise StoreError(f"Cannot export to {str(target)!r}: {told(error)}.") from error
    finally:
        for left in (tmp, tmp.with_name(f"{tmp.name}.wal")):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    left.unlink(missing_ok=True)


def _texts(root: Path, run: str) -> dict[str, str]:
    """The small files of a run that are not segments, by name."""
    folder = run_dir(root, run)
    paths = [folder / name for name in _TEXTS] + [path for *_, path in heartbeat_files(folder)]
    found = {path.name: json.dumps(content) for path in paths if (content := read_json(path)) is not None}
    pruned = read_json(folder / "data" / PRUNED)
    return found | ({PRUNED: json.dumps(pruned)} if pruned else {})


def _why_not(root: Path, source: Path, name: str) -> str:
    """Why a run is not copied; "" if it may be."""
    if not is_run_name(name):
        return "this is no name of a run."
    if run_dir(root, name).exists():
        return "a run of that name is there already. Rename its folder in the source to have both."
    state = None if source.is_file() else run_state(source, name)
    if state is not None and (later := later_version(state.info)):
        return later
    if state is not None and state.status in ("running", "stalled"):
        return f"it is {state.status}. Merge it when it has ended."
    return ""


def _export_name(path: Path) -> str:
    """The run that a file made by `export_run` holds. Raises StoreError for any other file."""
    try:
        with memory_connection() as con:
            con.execute(f"ATTACH {quote(str(path))} AS exported (READ_ONLY)")
            [(name, version)] = con.execute("SELECT run, schema_version FROM exported.store_info").fetchall()
    except (duckdb.Error, ValueError) as error:
        raise StoreError(f"{str(path)!r} is neither a store nor an export of a run ({told(error)}).") from error
    if version > SCHEMA_VERSION:
        raise StoreError(f"{str(path)!r} is of a later version (schema {version}, known: {SCHEMA_VERSION}).")
    return str(name)


def _unpack(source: Path, staged: Path, name: str) -> None:
    """The folder of a run from an export: a segment for each table, attempt and rank."""
    with memory_connection(threads=2) as con:
        con.execute(f"ATTACH {quote(str(source))} AS exported (READ_ONLY)")
        for table, columns in TABLES.items():
            folder = staged / "data.g0" / table / "g0"
            folder.mkdir(parents=True)
            rows = f"exported.{table}_rows"
            keys = con.execute(
                f"SELECT attempt, rank, coalesce(min(step), 0), coalesce(max(step), 0) FROM {rows} GROUP BY ALL"
            ).fetchall()
            listed = ", ".join(f'{name}::{kind} AS "{name}"' for name, kind in columns.items())
            for attempt, rank, first, last in keys:
                query = f"SELECT {listed} FROM {rows} WHERE attempt = {attempt} AND rank = {rank}"
                copy_segment(con, query, folder, (attempt, rank, first, last))
        texts = con.execute("SELECT name, content FROM exported.export_files").fetchall()
    for file, text in texts:
        if "/" not in file:
            replace_text(staged / ("data.g0/" + file if file == PRUNED else file), text)
    (staged / "data").symlink_to("data.g0")


def _copy(source: Path, staged: Path, name: str) -> None:
    """The folder of a run from another store: its newest generation, every segment checked. Raises StoreError."""
    understood(source, name)  # what is not understood would not be copied
    folder = run_dir(source, name)
    for table in TABLES:
        into = staged / "data.g0" / table / "g0"
        into.mkdir(parents=True)
        for segment, path in list_segments(source, name, table):
            shutil.copyfile(path, into / path.name)
            if crc32_of(into / path.name, sync=True) != segment.crc32:
                raise StoreError(f"{path} is damaged: run `rlvr store check` on the source.")
        fsync_folder(into)
    for file, text in _texts(source, name).items():
        replace_text(staged / ("data.g0/" + file if file == PRUNED else file), text)
    if not any(path.name.startswith(("run.json", "heartbeat")) for path in folder.iterdir()):
        raise StoreError("it has neither run.json nor a heartbeat.")
    (staged / "data").symlink_to("data.g0")
