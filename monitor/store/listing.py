"""Which segments a reader may open: the one listing behind `open_store` and the dashboard's tail.

A segment is listed if a recorder gives such names, if its bytes have the CRC-32 that its name holds, and if its columns
are those of its table. So no reader parses damaged bytes or touches a file that is not a segment. Nothing here writes,
renames or deletes.

A folder is listed again only after its mtime moved, and only new files are read: a refresh of an unchanged store costs
one stat for each run and table. The first read of a file costs its CRC (some 4 GB/s) and a look at its footer.
"""

from __future__ import annotations

import itertools
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import duckdb

from monitor.store.runs import run_names
from monitor.store.schema import (
    FORMER_TYPES,
    GENERATION,
    TABLES,
    WRITE_ORDER,
    SegmentName,
    generation_of,
    inner_name,
    run_dir,
    table_dir,
)
from monitor.store.segments import QUARANTINED, crc32_of, escape_glob

NO_LIMIT: Mapping[str, Collection[str]] = {}
_MTIME_GRAIN_S = 0.1  # a folder touched this recently may change again without a new mtime


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file or folder of a run that readers leave out, and why."""

    run: str
    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment that may be read. `columns`: the names in the file. `former`: whether it has the types of schema 1."""

    run: str
    path: str
    name: SegmentName
    columns: frozenset[str]
    former: bool


@dataclass(slots=True)
class _Folder:
    """One table's folder as it was last listed. Each segment in it is pending (not read yet), fine or bad."""

    table: str
    run: str
    path: str
    state: tuple[int, ...] = ()
    pending: dict[str, SegmentName] = field(default_factory=dict)
    fine: dict[str, Segment] = field(default_factory=dict)
    bad: dict[str, tuple[tuple[int, ...], Unreadable]] = field(default_factory=dict)
    closed: Unreadable | None = None  # the folder itself cannot be read
    stamp: int = 0

    def leave_out(self, name: str, state: tuple[int, ...], reason: str) -> None:
        self.pending.pop(name, None)
        self.fine.pop(name, None)
        self.bad[name] = (state, Unreadable(self.run, Path(self.path, name), reason))


class Listing:
    """The readable segments of a store by table and run. All methods may be called from any thread."""

    def __init__(self, store: Path, con: duckdb.DuckDBPyConnection) -> None:
        """`con` reads the footers. From now on it belongs to the listing."""
        self.store = store
        self._folders: dict[tuple[str, str], _Folder] = {}  # (table, run)
        self._changes = itertools.count(1)
        self._versions = dict.fromkeys(TABLES, 0)
        self._lock = threading.RLock()
        self._con = con

    def close(self) -> None:
        self._con.close()

    def refresh(
        self, tables: Collection[str] = tuple(TABLES), only: Mapping[str, Collection[str]] = NO_LIMIT
    ) -> list[str]:
        """Look for new and vanished segments of the tables, check the new ones, and return the names of all runs.

        only: {table: the runs whose segments of it are wanted}; of other tables those of all runs are. `steps` is
        listed first: the other rows of every step listed there are on disk already. Raises StoreError if the runs
        cannot be listed.
        """
        with self._lock:
            runs = run_names(self.store)
            generations = {run: generation_of(run_dir(self.store, run)) for run in runs}
            for table in reversed(WRITE_ORDER):
                if table not in tables:
                    continue
                for key in [key for key in self._folders if key[0] == table and key[1] not in generations]:
                    self._moved(self._folders.pop(key))
                folders = [
                    self._list(table, run, generation)
                    for run, generation in generations.items()
                    if run in only.get(table, generations)
                ]
                self._check([(folder, name) for folder in folders for name in folder.pending])
            return runs

    def version(self, table: str) -> int:
        """A number that changes whenever the readable or unreadable segments of a table change."""
        return self._versions[table]

    def stamp(self, table: str, run: str) -> int:
        """Like `version`, for one run."""
        folder = self._folders.get((table, run))
        return folder.stamp if folder else 0

    def segments(self, table: str, run: str | None = None) -> list[Segment]:
        """The readable segments of a table at the last refresh, of all runs or of one, sorted by run and name."""
        with self._lock:
            keys = sorted(key for key in self._folders if key[0] == table) if run is None else [(table, run)]
            folders = [self._folders[key] for key in keys if key in self._folders]
            return [folder.fine[name] for folder in folders for name in sorted(folder.fine)]

    def names(self, table: str, run: str) -> list[SegmentName]:
        """The names of one run's segments as they are now. Their bytes are not looked at."""
        with self._lock:
            folder = self._list(table, run, generation_of(run_dir(self.store, run)))
            return [*folder.pending.values(), *(segment.name for segment in folder.fine.values())]

    def chosen(self, table: str, run: str, wanted: Callable[[SegmentName], bool]) -> list[Segment]:
        """One run's readable segments, as they are now, for whose names `wanted` is true. Other files are not read."""
        with self._lock:
            folder = self._list(table, run, generation_of(run_dir(self.store, run)))
            self._check([(folder, name) for name, parsed in folder.pending.items() if wanted(parsed)])
            return [folder.fine[name] for name in sorted(folder.fine) if wanted(folder.fine[name].name)]

    def unreadable(self) -> list[Unreadable]:
        """What was left out so far of the tables that were asked for, sorted by run and path."""
        with self._lock:
            folders = list(self._folders.values())
            found = [one for folder in folders for _, one in folder.bad.values()]
            return sorted(found + [f.closed for f in folders if f.closed], key=lambda one: (one.run, str(one.path)))

    def recheck(self, tables: Collection[str]) -> bool:
        """After a failed read, check the bytes of every listed segment of the tables again. True if a list changed."""
        with self._lock:
            before = [self._versions[table] for table in tables]
            for folder in [folder for folder in self._folders.values() if folder.table in tables]:
                folder.state = ()
                for name, segment in list(folder.fine.items()):
                    state, reason = _damage(Path(segment.path), segment.name)
                    if reason:
                        folder.leave_out(name, state, reason)
                        self._moved(folder)
            self.refresh(tables)
            return before != [self._versions[table] for table in tables]

    def leave_out(self, segment: Segment, reason: str) -> None:
        """Do not list a segment again that proved unreadable, unless its file changes."""
        with self._lock:
            folder = next((one for one in self._folders.values() if one.path == os.path.dirname(segment.path)), None)
            if folder is not None:
                folder.leave_out(str(segment.name), _state_of(segment.path), reason)
                self._moved(folder)

    def _moved(self, folder: _Folder) -> None:
        folder.stamp = next(self._changes)
        self._versions[folder.table] = folder.stamp

    def _list(self, table: str, run: str, generation: str | None) -> _Folder:
        """A run's folder of a table as it is now: new files are pending, vanished ones forgotten.

        The generation is looked at once for all tables, so that all are of one.
        """
        path = _segments_folder(self.store, run, table, generation)
        folder = former = self._folders.get((table, run))
        if folder is None or folder.path != path:  # a new run, or a compaction's next generation
            self._folders[table, run] = folder = _Folder(table, run, path)
            if former is not None:
                self._moved(folder)
        closed = None
        try:
            state = _state(os.stat(path))
            if state == folder.state and all(_state_of(str(one.path)) == seen for seen, one in folder.bad.values()):
                return folder
            with os.scandir(path) as entries:
                names = {entry.name for entry in entries if _is_ours(entry.name)}
        except FileNotFoundError:  # not written yet
            state, names = (), set()
        except OSError as error:
            state, names = (), set()
            closed = Unreadable(run, Path(path), f"The folder cannot be read: {error.strerror}.")
        settled = state and time.time() - state[-1] / 1e9 > _MTIME_GRAIN_S
        folder.state = state if settled else ()
        gone = (folder.fine.keys() | folder.bad.keys()) - names
        changed = {name for name, (seen, one) in folder.bad.items() if _state_of(str(one.path)) != seen}
        for name in gone | changed:
            folder.fine.pop(name, None)
            folder.bad.pop(name, None)
        if gone or changed or closed != folder.closed:
            folder.closed = closed
            self._moved(folder)
        if former is not None and former is not folder:
            for name in names & former.fine.keys():
                if _is_same(f"{former.path}/{name}", f"{path}/{name}"):  # a hard link: its bytes have been checked
                    folder.fine[name] = replace(former.fine[name], path=f"{path}/{name}")
        folder.pending = {}
        for name in sorted(names - folder.fine.keys() - folder.bad.keys()):
            parsed = SegmentName.parse(name)
            if parsed is not None:
                folder.pending[name] = parsed
            else:
                folder.leave_out(name, _state_of(f"{path}/{name}"), "It was set aside as damaged.")
                self._moved(folder)
        return folder

    def _check(self, pending: list[tuple[_Folder, str]]) -> None:
        """List the pending files whose bytes and columns are right, and leave out the others."""
        whole: list[tuple[_Folder, str]] = []
        for folder, name in pending:
            state, reason = _damage(Path(folder.path, name), folder.pending[name])
            if reason is None:
                whole.append((folder, name))
            elif reason:
                folder.leave_out(name, state, reason)
                self._moved(folder)
        found = self._columns([f"{folder.path}/{name}" for folder, name in whole])
        for folder, name in whole:
            path = f"{folder.path}/{name}"
            columns = found[path]
            reason = columns if isinstance(columns, str) else _misfit(folder.table, columns)
            if isinstance(columns, str) or reason:
                if state := _state_of(path):  # without a state it has vanished
                    folder.leave_out(name, state, reason or "")
                    self._moved(folder)
                continue
            former = any(columns.get(column) == kind for column, kind in FORMER_TYPES.items())
            folder.fine[name] = Segment(folder.run, path, folder.pending.pop(name), frozenset(columns), former)
            self._moved(folder)

    def _columns(self, paths: list[str]) -> dict[str, dict[str, str] | str]:
        """{path: names and types of its columns, or what is wrong}. Reads all at once, or by halves if one fails."""
        if not paths:
            return {}
        query = "SELECT file_name, name, num_children, duckdb_type FROM parquet_schema(?)"
        try:
            rows = self._con.execute(query, [[escape_glob(path) for path in paths]]).fetchall()
        except (duckdb.Error, RuntimeError) as error:
            if len(paths) == 1:
                return {paths[0]: f"It is no Parquet file that can be read: {_first_line(error)}"}
            half = len(paths) // 2
            return self._columns(paths[:half]) | self._columns(paths[half:])
        found: dict[str, dict[str, str] | str] = dict.fromkeys(paths, "It is no Parquet file.")
        for path, columns in top_columns(rows):
            found[path] = columns
        return found


def segment_groups(segments: Iterable[Segment]) -> list[list[str]]:
    """Paths in lists, each for one read_parquet: files of equal columns, those with the newest types first."""
    groups: dict[frozenset[str], list[Segment]] = {}
    for segment in segments:
        groups.setdefault(segment.columns, []).append(segment)
    return [[one.path for one in sorted(group, key=lambda one: one.former)] for group in groups.values()]


def _segments_folder(store: Path, run: str, table: str, generation: str | None) -> str:
    """`monitor.store.schema.table_dir` of a generation that is known already."""
    match = GENERATION.fullmatch(generation or "")
    if match is None:
        return str(table_dir(store, run, table))
    outer = f"{run_dir(store, run)}/{match[0]}/{table}"
    inner = f"{outer}/{inner_name(match[0])}"
    return inner if os.path.isdir(inner) else outer


def _is_same(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def _is_ours(name: str) -> bool:
    return SegmentName.parse(name.removesuffix(QUARANTINED)) is not None


def _state(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns, found.st_mtime_ns)


def _state_of(path: str) -> tuple[int, ...]:
    try:
        return _state(os.stat(path))
    except OSError:
        return ()


def _damage(path: Path, name: SegmentName) -> tuple[tuple[int, ...], str | None]:
    """(stat, what is wrong with a segment's bytes); "" for a file that vanished meanwhile."""
    state = _state_of(str(path))
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            return state, "It is not a regular file."
        crc = crc32_of(path)
    except FileNotFoundError:
        return state, "It is a link to a file that is not there." if path.is_symlink() else ""
    except OSError as error:
        return state, f"It cannot be read: {error.strerror}."
    if crc != name.crc32:
        return state, f"Its bytes have CRC-32 {crc:08x}, its name says {name.crc32:08x}."
    return state, None


def top_columns(rows: list[tuple[str, str, int | None, str]]) -> Iterator[tuple[str, dict[str, str]]]:
    """(path, {column: type}) from the rows of parquet_schema, where each file's tree is written depth first."""
    at = 0
    while at < len(rows):
        path, _, n_columns, _ = rows[at]
        at += 1
        columns: dict[str, str] = {}
        for _ in range(n_columns or 0):
            columns[rows[at][1]] = rows[at][3]
            pending = 1
            while pending:  # over the column and what is nested in it
                pending += (rows[at][2] or 0) - 1
                at += 1
        yield path, columns


def _misfit(table: str, columns: dict[str, str]) -> str | None:
    """What keeps a file from being a segment of a table. Columns of a newer version do no harm."""
    for name, kind in TABLES[table].items():
        found = columns.get(name)
        if found != kind and (found is None or found != FORMER_TYPES.get(name)):
            has = "has none" if found is None else f"is {found}"
            return f"Its columns are not those of {table}: {name} {has}, expected {kind}."
    return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
