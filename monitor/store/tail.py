"""Tail: one in-memory DuckDB that follows a store and ingests only what is new.

Small tables (steps, histograms, alerts, events) are held in memory. Tokens and samples are read, when asked for, from
the files that hold the step. monitor/store/listing.py decides which files may be read. A poll of an unchanged run costs
a few stat calls.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from monitor.errors import StoreError
from monitor.store.catalog import RUN_OF_FILE, commits_query
from monitor.store.listing import NO_LIMIT, Listing, Segment, segment_groups
from monitor.store.runs import STATUS_ORDER, heartbeat_files, later_version, rank_status, read_heartbeats, read_info
from monitor.store.schema import INNER, TABLES, SegmentName
from monitor.store.segments import QUARANTINED, escape_glob

SMALL_TABLES = ("histograms", "alerts", "events", "steps")
ENDED = ("finished", "stopped", "failed")  # a run that crashed may have a writer on a machine that was out of sight
_MANY = 8  # new runs from which on they are taken in together
_MTIME_GRAIN_S = 0.1  # a folder touched this recently may change again without a new mtime


@dataclass(slots=True)
class RunEntry:
    """What the tail knows of one run. `version` changes only when its data or status did."""

    name: str
    info: dict[str, Any] = field(default_factory=dict)
    status: str = "crashed"
    version: int = 0
    basis: int = 0  # changes when rows in memory were taken back, because a segment vanished
    heartbeats: list[dict[str, Any]] = field(default_factory=list)
    info_state: tuple[int, ...] = ()  # mtime and size of the run.json that was read last
    info_is_bad: bool = False
    beat_files: tuple[Path, ...] = ()
    beat_state: tuple[int, ...] = ()  # mtimes of the run's folder and of these files before they were read last
    stamps: tuple[int, ...] = ()  # of the listing that the tables in memory show
    seen: dict[str, set[str]] = field(default_factory=lambda: {table: set() for table in SMALL_TABLES})


class Tail:
    """Follows the store at `store`. `poll()` ingests what is new and returns `version`.

    histograms: whether to take in all of them, which are most of the bytes; False: only what `want_histograms` names.

    Safe to share: polls are serialised, and each thread queries through its own `cursor()`.
    """

    def __init__(self, store: Path | str, min_interval_s: float = 0.2, *, histograms: bool = True) -> None:
        self.store = Path(store)
        self.runs: dict[str, RunEntry] = {}
        self.version = 0
        self._min_interval_s = min_interval_s
        self._wanted: dict[str, frozenset[str]] | None = None if histograms else {}  # run -> metrics; None: all of all
        self._polled = float("-inf")
        self._lock = threading.Lock()
        self._local = threading.local()
        self._con = duckdb.connect(":memory:")
        self._listing = Listing(self.store.absolute(), self._con.cursor())
        self._steps_of: dict[str, frozenset[int]] = {}  # of compacted segments, which never change
        for table in SMALL_TABLES:
            columns = ", ".join(f'"{name}" {kind}' for name, kind in TABLES[table].items())
            self._con.execute(f"CREATE TABLE {table}_all ({columns})")
            self._con.execute(f"CREATE TABLE staged_{table} ({columns})")
        self._con.execute("CREATE TABLE committed (run VARCHAR, step BIGINT, rank SMALLINT, attempt SMALLINT)")
        for table in SMALL_TABLES:
            condition = "" if table == "events" else "SEMI JOIN committed c USING (run, step, rank, attempt)"
            self._con.execute(f"CREATE VIEW {table} AS SELECT a.* FROM {table}_all a {condition}")

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """This thread's connection to the in-memory tables."""
        if not hasattr(self._local, "cursor"):
            self._local.cursor = self._con.cursor()
        return self._local.cursor

    def close(self) -> None:
        self._listing.close()
        self._con.close()

    def poll(self, now: float | None = None) -> int:
        """Ingest new segments and judge every run's status; returns `version`. Cheap when nothing changed."""
        with self._lock:
            if time.monotonic() - self._polled < self._min_interval_s:
                return self.version
            now = time.time() if now is None else now
            names: list[str] = []
            with contextlib.suppress(StoreError):  # there may be no store yet
                names = self._listing.refresh(SMALL_TABLES, self._limits())
            self._ingest_all_new(names)
            for gone in set(self.runs) - set(names):
                self._forget_rows(gone)
                del self.runs[gone]
                if self._wanted:
                    self._wanted.pop(gone, None)
                self.version += 1
            for name in names:
                entry = self.runs.setdefault(name, RunEntry(name))
                if self._refresh(entry, now):
                    self.version += 1
                    entry.version = self.version
            self._polled = time.monotonic()
            return self.version

    def want_histograms(self, run: str, metric: str) -> None:
        """Take in the histograms that a known run has of a metric, now and at every poll."""
        if self._wanted is None or metric in self._wanted.get(run, ()) or run not in self.runs:
            return
        with self._lock:
            entry, had = self.runs.get(run), self._wanted.get(run, frozenset())
            if entry is None or metric in had:
                return
            left_out = len(self._listing.unreadable())
            if had:
                seen, listed = entry.seen["histograms"], self._listing.segments("histograms", run)
                known = [segment for segment in listed if str(segment.name) in seen]
                self._stage(entry, "histograms", known, frozenset({metric}))
                self._take_staged("histograms")
                self._wanted[run] = had | {metric}
            else:
                self._wanted[run] = frozenset({metric})
                with contextlib.suppress(StoreError):  # the store has gone: the next poll tells
                    self._listing.refresh(("histograms",), {"histograms": (run,)})
                self._ingest(entry)
            self.version += len(self._listing.unreadable()) != left_out  # so that pages tell of them

    def _limits(self) -> Mapping[str, Collection[str]]:
        """The runs whose histograms are wanted, for the listing."""
        return NO_LIMIT if self._wanted is None else {"histograms": set(self._wanted)}

    def run_version(self, *runs: str) -> tuple[int, ...]:
        """The versions of the named runs: a cache key that stays the same while their data does."""
        return tuple(self.runs[run].version if run in self.runs else -1 for run in runs)

    def quarantined(self) -> dict[str, list[str]]:
        """Files that cannot be read, as "table/name", by run; runs without any are left out."""
        found: dict[str, list[str]] = {name: ["run.json"] for name, entry in self.runs.items() if entry.info_is_bad}
        for one in self._listing.unreadable():
            parts = [part for part in one.path.parts if not INNER.fullmatch(part)]
            path = "/".join(parts[-1 if one.path.name in TABLES else -2 :])
            found.setdefault(one.run, []).append(path.removesuffix(QUARANTINED))
        return found

    def files(self, run: str, table: str, step: int) -> list[str]:
        """Segments of `table` that may hold `step`, of the newest attempt that committed it."""
        attempts = (
            self.cursor()
            .execute("SELECT max(attempt) FROM committed WHERE run = ? AND step = ?", [run, step])
            .fetchone()
        )

        def wanted(name: SegmentName) -> bool:
            return name.first_step <= step <= name.last_step and attempts == (name.attempt,)

        return [escape_glob(segment.path) for segment in self._listing.chosen(table, run, wanted)]

    def steps_with(self, run: str, table: str) -> set[int]:
        """The steps of which some segment of `table` has rows: by the file's name, of compacted ones by their rows."""
        found = set[int]()
        for segment in self._listing.chosen(table, run, lambda name: name.first_step != name.last_step):
            key = f"{run}/{table}/{segment.name}"  # its path moves with each generation
            if key not in self._steps_of:
                sql = "SELECT DISTINCT step FROM read_parquet(?, hive_partitioning = false)"
                rows = self.cursor().execute(sql, [escape_glob(segment.path)]).fetchall()
                self._steps_of[key] = frozenset(step for (step,) in rows)
            found |= self._steps_of[key]
        names = self._listing.names(table, run)
        return found | {name.first_step for name in names if name.first_step == name.last_step}

    def _refresh(self, entry: RunEntry, now: float) -> bool:
        folder = self.store / "runs" / entry.name
        changed = self._read_info(entry, folder / "run.json")
        changed = self._ingest(entry) or changed
        status = self._read_status(entry, folder, now)
        changed = changed or status != entry.status
        entry.status = status
        return changed

    def _read_status(self, entry: RunEntry, folder: Path, now: float) -> str:
        """The status by the heartbeats. Those of a run that has ended are read again only when their files moved."""
        state = _mtimes(folder, *entry.beat_files)
        if entry.status not in ENDED or state != entry.beat_state or time.time() - state[0] / 1e9 < _MTIME_GRAIN_S:
            entry.beat_files = tuple(path for _, _, path in heartbeat_files(folder))
            entry.beat_state = _mtimes(folder, *entry.beat_files)
            entry.heartbeats = read_heartbeats(self.store, entry.name)
        return _status(entry.heartbeats, now)

    def _read_info(self, entry: RunEntry, path: Path) -> bool:
        try:
            found = path.stat()
        except OSError:
            return False
        state = (found.st_mtime_ns, found.st_size, found.st_ctime_ns)
        if state == entry.info_state:
            return False
        info = read_info(path)
        entry.info, entry.info_state = info or entry.info, state
        entry.info_is_bad = info is None or bool(later_version(info))
        return True

    def _ingest_all_new(self, names: list[str]) -> None:
        """Take in the runs that are not known yet, if they are many: all their files in one query for each table.

        Where a file cannot be read nothing is taken in, and `_ingest` sorts the files out run by run.
        """
        fresh = [name for name in names if name not in self.runs]
        if len(fresh) < _MANY:
            return
        entries = {name: RunEntry(name) for name in fresh}
        segments: dict[str, list[Segment]] = {table: [] for table in SMALL_TABLES}
        for entry in entries.values():
            entry.stamps = tuple(self._listing.stamp(table, entry.name) for table in SMALL_TABLES)
            for table in SMALL_TABLES:
                mine = self._listing.segments(table, entry.name)
                segments[table] += mine
                entry.seen[table] = {str(segment.name) for segment in mine}
        self._con.execute("BEGIN")
        try:
            for table in SMALL_TABLES:
                columns = ", ".join(f'"{name}"' for name in TABLES[table] if name != "run")
                for paths in segment_groups(segments[table]):
                    self._con.execute(
                        f"INSERT INTO {table}_all SELECT {RUN_OF_FILE}, {columns} "
                        "FROM read_parquet(?, hive_partitioning = false, filename = true)",
                        [[escape_glob(path) for path in paths]],
                    )
            commits = commits_query("(SELECT * FROM steps_all WHERE run IN (SELECT unnest($runs)))")
            self._con.execute(f"INSERT INTO committed {commits}", {"runs": fresh})
        except duckdb.Error:
            self._con.execute("ROLLBACK")
            return
        self._con.execute("COMMIT")
        self.runs |= entries
        self.version += 1

    def _ingest(self, entry: RunEntry) -> bool:
        """Make the tables in memory match what the listing says of a run; True if that changed anything."""
        stamps = tuple(self._listing.stamp(table, entry.name) for table in SMALL_TABLES)
        if stamps == entry.stamps:
            return False
        listed = {table: self._listing.segments(table, entry.name) for table in SMALL_TABLES}
        if not all(self._absorb(entry, table, listed[table]) for table in SMALL_TABLES):  # deleted or damaged
            for table in SMALL_TABLES:
                self._con.execute(f"DELETE FROM staged_{table}")
            self._forget_rows(entry.name)
            entry.basis += 1
            entry.seen = {table: set() for table in SMALL_TABLES}
        fresh = {
            table: [segment for segment in listed[table] if str(segment.name) not in entry.seen[table]]
            for table in SMALL_TABLES
        }
        staged = [self._stage(entry, table, fresh[table]) for table in SMALL_TABLES]
        self._con.execute("BEGIN")
        commits_more = self._con.execute("SELECT count(*) > 0 FROM staged_steps").fetchall() == [(True,)]
        simple = commits_more and self._continues(entry.name)
        if simple:
            self._con.execute("INSERT INTO committed SELECT DISTINCT run, step, rank, attempt FROM staged_steps")
        for table in SMALL_TABLES:
            self._take_staged(table)
        if commits_more and not simple:
            self._con.execute("DELETE FROM committed WHERE run = ?", [entry.name])
            commits = commits_query("(SELECT * FROM steps_all WHERE run = $run)")
            self._con.execute(f"INSERT INTO committed {commits}", {"run": entry.name})
        self._con.execute("COMMIT")
        if all(staged):
            entry.stamps = stamps
        return True

    def _absorb(self, entry: RunEntry, table: str, listed: list[Segment]) -> bool:
        """Stage what is new in files that a compaction merged; False if rows in memory may be gone from the disk.

        Vanished files lie within the steps of merged ones of their attempt and rank. So all rows in memory of these
        steps must be in the merged files, which is counted, and only rows of other steps are new.
        """
        gone = [
            name for text in entry.seen[table] - {str(one.name) for one in listed} if (name := SegmentName.parse(text))
        ]
        if not gone:
            return True
        fresh = [one for one in listed if str(one.name) not in entry.seen[table]]
        merged = [one for one in fresh if any(_covers(one.name, name) for name in gone)]
        covered = all(any(_covers(one.name, name) for one in merged) for name in gone)
        if not covered or not self._stage(entry, table, merged):
            return False
        entry.seen[table] -= {str(name) for name in gone}
        if table in ("alerts", "events"):  # few, and their step may be NULL
            self._con.execute(f"CREATE OR REPLACE TEMP TABLE more AS FROM staged_{table} EXCEPT ALL FROM {table}_all")
            self._con.execute(f"DELETE FROM staged_{table}")
            self._con.execute(f"INSERT INTO staged_{table} FROM more")
            return True
        spans = [(one.name.attempt, one.name.rank, one.name.first_step, one.name.last_step) for one in merged]
        known = self._con.execute(
            f"SELECT count(*) FROM {table}_all a JOIN (SELECT unnest(?) AS attempt, unnest(?) AS rank, "
            "unnest(?) AS first, unnest(?) AS last) m USING (attempt, rank) "
            "WHERE run = ? AND step BETWEEN first AND last",
            [*map(list, zip(*spans, strict=True)), entry.name],
        ).fetchall()
        kept = self._con.execute(
            f"DELETE FROM staged_{table} s WHERE EXISTS (FROM {table}_all a WHERE a.run = s.run AND a.step = s.step "
            "AND a.attempt = s.attempt AND a.rank = s.rank)"
        ).fetchall()
        return known == kept

    def _take_staged(self, table: str) -> None:
        self._con.execute(f"INSERT INTO {table}_all SELECT * FROM staged_{table}")
        self._con.execute(f"DELETE FROM staged_{table}")

    def _continues(self, run: str) -> bool:
        """Whether the staged steps are of the run's newest attempt and not before its first step: the common case.

        Then all of them are committed and none of the others is replaced, so the run's history need not be looked at.
        """
        row = self._con.execute(
            "SELECT min(attempt) = max(attempt) AND min(attempt) = (SELECT max(attempt) FROM committed WHERE run = ?) "
            "AND min(step) >= (SELECT min(step) FROM committed WHERE run = ? AND attempt = (SELECT max(attempt) "
            "FROM committed WHERE run = ?)) FROM staged_steps",
            [run, run, run],
        ).fetchone()
        return bool(row and row[0])

    def _stage(
        self, entry: RunEntry, table: str, segments: list[Segment], metrics: frozenset[str] | None = None
    ) -> bool:
        """Read segments into a staging table. False if some could not be read; the listing then leaves these out.

        metrics: of histograms those to read; None: the wanted ones.

        Staging happens outside of the transaction, because a failed statement aborts a whole transaction.
        """
        columns = ", ".join(f'"{name}"' for name in TABLES[table] if name != "run")
        insert = f"INSERT INTO staged_{table} SELECT ?, {columns} FROM read_parquet(?, hive_partitioning = false)"
        more = list[list[str]]()
        if table == "histograms" and self._wanted is not None:
            insert += " WHERE list_contains(?, metric)"
            more = [sorted(self._wanted.get(entry.name, ()) if metrics is None else metrics)]
        complete = True
        batches = [segments] if segments else []
        while batches:
            batch = batches.pop()
            try:
                for paths in segment_groups(batch) if len(batch) > 1 else [[batch[0].path]]:
                    self._con.execute(insert, [entry.name, [escape_glob(path) for path in paths], *more])
                entry.seen[table] |= {str(segment.name) for segment in batch}
            except duckdb.Error as error:
                complete = False
                if len(batch) > 1:
                    self._con.execute(f"DELETE FROM staged_{table}")  # also what other groups had staged
                    batches += [[segment] for segment in batch]
                elif Path(batch[0].path).exists():
                    self._listing.leave_out(batch[0], f"DuckDB cannot read it: {str(error).splitlines()[0]}")
                # otherwise the file vanished, and the next poll sees what replaced it
        return complete

    def _forget_rows(self, run: str) -> None:
        for table in (*(f"{table}_all" for table in SMALL_TABLES), "committed"):
            self._con.execute(f"DELETE FROM {table} WHERE run = ?", [run])


def _covers(wide: SegmentName, name: SegmentName) -> bool:
    same = (wide.attempt, wide.rank) == (name.attempt, name.rank)
    return same and wide.first_step <= name.first_step and name.last_step <= wide.last_step


def _mtimes(*paths: Path) -> tuple[int, ...]:
    """mtime of each path in ns; 0 for one that is not there."""
    found = []
    for path in paths:
        try:
            found.append(os.stat(path).st_mtime_ns)
        except OSError:
            found.append(0)
    return tuple(found)


def _status(heartbeats: list[dict[str, Any]], now: float) -> str:
    """The worst status among the ranks of the newest attempt; "crashed" if there never was a heartbeat."""
    newest = max((int(beat.get("attempt", 0)) for beat in heartbeats), default=0)
    found = {rank_status(beat, now) for beat in heartbeats if int(beat.get("attempt", 0)) == newest}
    return next((status for status in STATUS_ORDER if status in found), "crashed")
