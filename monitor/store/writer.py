"""One attempt of one rank of a run on disk: opening it, publishing batches, heartbeats."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import duckdb

from monitor.errors import StoreError
from monitor.records import RunInfo
from monitor.store import segments
from monitor.store.batch import Batch
from monitor.store.catalog import CATALOG, ensure_catalog
from monitor.store.locks import FileLock, share_data, take_rank
from monitor.store.reserve import Reserve
from monitor.store.runs import heartbeat_files, heartbeat_name, later_version, rank_status, read_heartbeats, read_info
from monitor.store.schema import (
    SCHEMA_VERSION,
    TABLES,
    WRITE_ORDER,
    SegmentName,
    generation_of,
    inner_name,
    run_dir,
    table_dir,
)

Fsync = Literal["every-step", "interval", "none"]
FSYNC_S = 5.0  # the longest time between two fsyncs of the policy "interval"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_OPENING_S = 2.0  # how long an opening waits for the swap of a compaction
_BEAT_BYTES = 2048  # a heartbeat is padded to as many: on a full disk it is renewed in the block that it has


class RunWriter:
    """The open attempt of one rank: holds the rank's lock, a private DuckDB, the reserve and the counts.

    Opening either succeeds or leaves everything as it was, so the name of a run that could not start stays free.
    fsync: when published files are fsynced: each of them before `publish` returns ("every-step"), by `sync`, which is
    due `FSYNC_S` after the first of them ("interval"), or never ("none").
    mantissa_bits: what the rows of `tokens` that it gets are rounded to; run.json says so.
    """

    def __init__(
        self,
        store: str | Path,
        info: RunInfo,
        *,
        rank: int = 0,
        resume: bool = False,
        attempt: int | None = None,
        fsync: Fsync = "every-step",
        mantissa_bits: int | None = None,
    ) -> None:
        _check_arguments(info, rank, fsync, mantissa_bits)
        self._fsync = fsync
        self.mantissa_bits = mantissa_bits
        self._unsynced: deque[tuple[str, str]] = deque()  # (table, name) of published files, with "interval"
        self._sync_at: float | None = None  # when `sync` is due, monotonic
        self.store = _open_folder(store)
        self.info, self.rank = info, rank
        self.folder = run_dir(self.store, info.name)
        self._beat_text = ""
        self.counts = dict.fromkeys(TABLES, (0, 0))  # durable segments and rows of this attempt
        with ExitStack() as undo:
            try:
                self._open(resume, attempt, undo)
            except (OSError, ValueError, duckdb.Error) as error:
                raise StoreError(
                    f"Cannot open run {info.name!r} in store {str(self.store)!r}: {error}. Free some space there, or "
                    "choose another --store."
                ) from error
            self._opening.release()  # from here on each batch takes its share
            self._undo = undo.pop_all()

    def _open(self, resume: bool, attempt: int | None, undo: ExitStack) -> None:
        """Opens all. The heartbeat claims the attempt's number and run.json the name, so both are written last."""
        self._lock = self._take_locks(resume, undo)
        previous = self._previous_attempt(resume, attempt)
        self.attempt = attempt or previous + 1
        self._prepare()
        sizes = {table: sum(path.stat().st_size for path in self._own(table)) for table in TABLES}
        self.bytes, self.token_bytes = sum(sizes.values()), sizes["tokens"]
        self._con = segments.memory_connection()
        undo.callback(self._con.close)
        try:
            ensure_catalog(self.store)
        except (OSError, duckdb.Error) as error:
            raise StoreError(f"Cannot write {str(self.store / CATALOG)!r}: {error}. Free some space there.") from error
        reserve = self.folder / f"rank-{self.rank:03d}.reserve"
        undo.callback(reserve.unlink, missing_ok=True)
        self.reserve = Reserve(reserve)
        self._claim_attempt(undo)
        if self.rank == 0:
            self._write_run_json(resume, undo)
        if self._fsync != "none":
            self._sync_folders()

    def last_step(self) -> int | None:
        """The last step that earlier attempts of this rank have committed, taken from the names of their segments."""
        names = [name for name, _ in segments.list_segments(self.store, self.info.name, "steps")]
        return max((name.last_step for name in names if name.rank == self.rank), default=None)

    def publish(self, batch: Batch) -> None:
        """Write what is left of a batch, `steps` last. Raises OSError or duckdb.Error; call again to continue.

        Meanwhile no compaction swaps the folders that it writes into.
        """
        batch.tried = True
        with share_data(self.folder):
            self._publish(batch)

    def _publish(self, batch: Batch) -> None:
        while batch.tables:
            table = self.next_table(batch)
            rows = batch.tables[table]
            key = (self.attempt, self.rank, *batch.span(table))
            sync = self._fsync == "every-step"
            path = segments.write_segment(self._con, self.store, self.info.name, table, rows, key, sync=sync)
            if self._fsync == "interval":
                self._unsynced.append((table, path.name))
                self._sync_at = self._sync_at or time.monotonic() + FSYNC_S
            del batch.tables[table]
            n_segments, n_rows = self.counts[table]
            self.counts[table] = n_segments + 1, n_rows + rows.num_rows
            size = path.stat().st_size
            self.bytes += size
            self.token_bytes += size if table == "tokens" else 0

    def sync_in_s(self) -> float | None:
        """Seconds until `sync` is due, 0 if it is; None if nothing waits for it."""
        return None if self._sync_at is None else max(0.0, self._sync_at - time.monotonic())

    def sync(self) -> None:
        """Make durable what was published without fsync. Raises OSError; call again to go on."""
        self._sync_at = time.monotonic() + FSYNC_S if self._unsynced else None
        folders = set()
        for table, name in self._unsynced:
            folder = table_dir(self.store, self.info.name, table)
            with contextlib.suppress(FileNotFoundError):  # merged meanwhile, which is durable
                segments.fsync_file(folder / name)
                folders.add(folder)
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):  # replaced meanwhile: the swap has fsynced the next one
                segments.fsync_folder(folder)
        self._unsynced.clear()
        self._sync_at = None

    def reconnect(self) -> None:
        """Replace the private DuckDB, which after some errors refuses every statement. Raises duckdb.Error."""
        with contextlib.suppress(duckdb.Error):
            self._con.close()
        self._con = segments.memory_connection()

    @staticmethod
    def next_table(batch: Batch) -> str:
        """The next table of a batch to write."""
        return next(table for table in WRITE_ORDER if table in batch.tables)

    def heartbeat(self, fields: Mapping[str, Any]) -> None:
        """Publish the heartbeat; on a full disk the old file is overwritten in place. Raises OSError."""
        before, text = self._beat_text, self._beat(fields)
        path = self.folder / heartbeat_name(self.rank, self.attempt)
        try:
            segments.replace_text(path, text)
        except OSError:
            fd = os.open(path, os.O_WRONLY)
            try:
                written = os.pwrite(fd, text.encode(), 0)
                if written < len(text):  # not even in place: better the old one than half of each
                    os.pwrite(fd, before.encode()[:written], 0)
                    raise
            finally:
                os.close(fd)

    def close(self) -> None:
        """End the attempt: release the reserve, the connection and, last, the locks."""
        with contextlib.suppress(OSError):
            self.reserve.remove()
        self._con.close()
        self._lock.release()

    def abandon(self) -> None:
        """Undo the opening of a run that has recorded nothing, so that its name is free again."""
        self._undo.close()

    def _beat(self, fields: Mapping[str, Any]) -> str:
        beat = {
            "run": self.info.name,
            "rank": self.rank,
            "attempt": self.attempt,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "lock": self._lock.works,
            "ts": time.time(),
            "segments": sum(n_segments for n_segments, _ in self.counts.values()),
            "bytes": self.bytes,
            "tables": {table: {"segments": n, "rows": rows} for table, (n, rows) in self.counts.items()},
            **fields,
        }
        size = max(_BEAT_BYTES, len(self._beat_text))  # never shorter than the one before: nothing of that is left
        self._beat_text = json.dumps(beat).ljust(size)
        return self._beat_text

    def _take_locks(self, resume: bool, undo: ExitStack) -> FileLock:
        """The rank's lock for as long as the process lives, and until all is open a share of the run's."""
        name, is_new = self.info.name, not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._opening = share_data(self.folder, wait_s=_OPENING_S)
        except BlockingIOError:
            raise StoreError(f"Run {name!r} is being compacted. Wait for it to end and try again.") from None
        undo.callback(self._opening.release)
        try:
            lock = take_rank(self.folder, self.rank)
        except BlockingIOError:
            raise StoreError(self._written_by_another(resume)) from None
        undo.callback(lock.release)
        if is_new:
            undo.callback(self._remove_folder)
        return lock

    def _written_by_another(self, resume: bool) -> str:
        name = self.info.name
        writer = next((f"process {beat.get('pid')} on {beat.get('host')}" for beat in self._beats()), "a process")
        if resume:
            return f"Cannot resume run {name!r}: {writer} is still writing it. Stop that process first."
        return (
            f"Run {name!r} (rank {self.rank}) already exists in store {str(self.store)!r}: {writer} is writing it. "
            "Choose another run name."
        )

    def _remove_folder(self) -> None:
        """Removes the folder of a new run that could not start, unless another rank uses it."""
        locks = {f"rank-{self.rank:03d}.lock", "run.lock"}
        left = {path.name for path in self.folder.iterdir()} - locks - {"data", "data.g0"}
        if left:
            return
        (self.folder / "data").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "data.g0", ignore_errors=True)
        for lock in locks:
            (self.folder / lock).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _beats(self) -> list[dict[str, Any]]:
        """The newest heartbeat of this rank, or none."""
        return [beat for beat in read_heartbeats(self.store, self.info.name) if beat["rank"] == self.rank]

    def _own(self, table: str) -> list[Path]:
        return [path for name, path in self._named(table) if name.rank == self.rank]

    def _previous_attempt(self, resume: bool, attempt: int | None) -> int:
        """The newest attempt of this rank; 0 of a rank that joins a run with an `attempt` that others have opened."""
        name = self.info.name
        files = [attempt for rank, attempt, _ in heartbeat_files(self.folder) if rank == self.rank]
        exists = bool(files) or (self.rank == 0 and (self.folder / "run.json").exists())
        if not resume:
            if exists:
                raise StoreError(
                    f"Run {name!r} (rank {self.rank}) already exists in store {str(self.store)!r}. "
                    "Choose another run name, or resume it with resume=True (--resume)."
                )
            return 0
        if not exists and not (attempt and (self.folder / "run.json").exists()):
            raise StoreError(
                f"Cannot resume run {name!r} (rank {self.rank}): store {str(self.store)!r} does not hold it. "
                "Check the name with `rlvr ls`, or start it without resume."
            )
        beats = self._beats()
        for beat in beats:  # the lock is ours: the writer is gone, unless it is out of the lock's sight
            elsewhere = beat.get("pulled") or beat.get("host", socket.gethostname()) != socket.gethostname()
            seen = beat | {"alive": None} if elsewhere else beat
            if (elsewhere or not self._lock.works) and rank_status(seen, time.time()) in ("running", "stalled"):
                raise StoreError(
                    f"Cannot resume run {name!r}: process {beat.get('pid')} on {beat.get('host')} is still writing it. "
                    "Stop that process first."
                )
        stored = read_info(self.folder / "run.json") or {}
        if later := later_version(stored):
            raise StoreError(f"Cannot resume run {name!r}. {later}")
        marks = stored.get("attempts") or [] if self.rank == 0 else []
        attempts = [*files, *(beat["attempt"] for beat in beats), len(marks)]
        attempts += [found.attempt for table in TABLES for found, _ in self._named(table) if found.rank == self.rank]
        if attempt is not None and attempt <= max(attempts):
            raise StoreError(
                f"Cannot resume run {name!r} (rank {self.rank}) as attempt {attempt}: it has had {max(attempts)}. "
                "Give a higher number, the same on all ranks."
            )
        return max(attempts)

    def _named(self, table: str) -> list[tuple[SegmentName, Path]]:
        return segments.list_segments(self.store, self.info.name, table)

    def _prepare(self) -> None:
        segments.write_seeds(self.store)
        link = self.folder / "data"
        if not link.is_symlink() and not link.exists():
            (self.folder / "data.g0").mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another rank was quicker
                link.symlink_to("data.g0")
        generation = generation_of(self.folder) or "data"
        for table in TABLES:
            outer = link / table
            outer.mkdir(exist_ok=True)
            if generation != "data" and not any(map(SegmentName.parse, os.listdir(outer))):  # else of an older version
                (outer / inner_name(generation)).mkdir(exist_ok=True)
            folder = table_dir(self.store, self.info.name, table)
            for left in folder.glob(f"*-{self.rank}-*-*.parquet.tmp"):  # of an attempt that was killed
                left.unlink(missing_ok=True)

    def _claim_attempt(self, undo: ExitStack) -> None:
        """Writes the first heartbeat. Its file must be new, so no two processes share an attempt even without locks."""
        path = self.folder / heartbeat_name(self.rank, self.attempt)
        tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            tmp.write_text(self._beat({"status": "running", "started": time.time(), "acknowledged": None}))
            os.link(tmp, path)  # unlike a rename this fails if the file exists, and no reader sees half of it
        except FileExistsError:
            raise StoreError(f"Attempt {self.attempt} of run {self.info.name!r} was opened just now.") from None
        finally:
            tmp.unlink(missing_ok=True)
        undo.callback(path.unlink, missing_ok=True)

    def _write_run_json(self, resume: bool, undo: ExitStack) -> None:
        path = self.folder / "run.json"
        if path.exists():
            undo.callback(segments.replace_text, path, path.read_text(encoding="utf-8", errors="replace"))
        else:
            undo.callback(path.unlink, missing_ok=True)
        now = time.time()
        resumed = self.last_step() if resume else None
        mark = {"attempt": self.attempt, "started": now, "resumed_after": resumed, "fsync": self._fsync}
        if self.mantissa_bits is not None:
            mark["mantissa_bits"] = self.mantissa_bits
        stored = (read_info(path) if resume else None) or {}
        attempts = [*(stored.get("attempts") or []), mark]
        known = {"schema_version": SCHEMA_VERSION, "created": stored.get("created") or now, "attempts": attempts}
        text = json.dumps(known | asdict(self.info), indent=1, default=str)
        segments.replace_text(path, text, sync=self._fsync != "none")

    def _sync_folders(self) -> None:
        """Make the folders durable into which segments will be written: a new run must not vanish with its steps."""
        folders: set[Path] = set()
        for table in TABLES:
            folder = table_dir(self.store, self.info.name, table)
            folders.update(part for part in (folder, *folder.parents) if part.is_relative_to(self.store))
        for folder in sorted(folders, reverse=True):  # the deepest first
            segments.fsync_folder(folder)
        with contextlib.suppress(PermissionError):  # of a store at the root, say
            segments.fsync_folder(self.store.parent)


def _check_arguments(info: RunInfo, rank: int, fsync: str, mantissa_bits: int | None) -> None:
    if fsync not in get_args(Fsync):
        raise StoreError(f"fsync is {fsync!r}, expected {', '.join(get_args(Fsync))}. Change it or leave it out.")
    if mantissa_bits is not None and not 1 <= mantissa_bits <= 22:
        raise StoreError(
            f"mantissa_bits is {mantissa_bits}, expected 1 to 22 of the 23 bits of a float32's mantissa. "
            "Change it, or leave it out to record raw tokens as they are."
        )
    if not _RUN_NAME.fullmatch(info.name):
        raise StoreError(
            f"Run name {info.name!r} cannot be used: expected 1 to 120 of letters, digits, '.', '_' and '-', "
            "the first a letter or digit. Choose another run name."
        )
    if not 0 <= rank <= 999:
        raise StoreError(f"rank is {rank}, expected 0 to 999.")


def _open_folder(store: str | Path) -> Path:
    root = Path(store).expanduser().absolute()
    for part in (root, *root.parents):
        if part.exists():
            if not part.is_dir():
                raise StoreError(
                    f"Store path {str(root)!r}: {str(part)!r} is a file, expected a folder. Choose another."
                )
            break
    try:
        (root / "runs").mkdir(parents=True, exist_ok=True)
        probe = root / "runs" / f".probe-{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StoreError(f"Cannot write to store {str(root)!r}: {error}. Choose another --store.") from error
    return root
