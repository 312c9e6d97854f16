"""One attempt of one rank of a run on disk: opening it, publishing batches, heartbeats."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb

from monitor.errors import StoreError
from monitor.records import RunInfo
from monitor.store import segments
from monitor.store.batch import Batch
from monitor.store.catalog import CATALOG, ensure_catalog
from monitor.store.runs import rank_status, read_json
from monitor.store.schema import SCHEMA_VERSION, TABLES, WRITE_ORDER, SegmentName, run_dir

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


class RunWriter:
    """The open attempt of one rank: holds the run's lock, a private DuckDB and the byte counts."""

    def __init__(self, store: str | Path, info: RunInfo, *, rank: int = 0, resume: bool = False) -> None:
        _check_arguments(info, rank)
        self.store = _open_folder(store)
        self.info, self.rank = info, rank
        self.folder = run_dir(self.store, info.name)
        self.segments = 0
        previous = self._previous_attempt(resume)
        self.attempt = previous + 1
        self._prepare()
        self._lock = self._take_lock()
        if rank == 0:
            self._write_run_json(resume)
        self.bytes = sum(path.stat().st_size for table in TABLES for path in self._own(table))
        self._con = segments.memory_connection()
        try:
            ensure_catalog(self.store)
        except (OSError, duckdb.Error) as error:
            self.close()
            raise StoreError(f"Cannot write {str(self.store / CATALOG)!r}: {error}. Free some space there.") from error

    def last_step(self) -> int | None:
        """The last step that earlier attempts of this rank have committed, by the names of their segments."""
        names = [name for name, _ in segments.list_segments(self.store, self.info.name, "steps")]
        return max((name.last_step for name in names if name.rank == self.rank), default=None)

    def publish(self, batch: Batch) -> None:
        """Write what is left of a batch, `steps` last. Raises OSError or duckdb.Error; call again to go on."""
        key = (self.attempt, self.rank, batch.first_step, batch.last_step)
        while batch.tables:
            table = self.next_table(batch)
            path = segments.write_segment(self._con, self.store, self.info.name, table, batch.tables[table], key)
            del batch.tables[table]
            self.segments += 1
            self.bytes += path.stat().st_size

    @staticmethod
    def next_table(batch: Batch) -> str:
        """The table of a batch that is to be written next."""
        return next(table for table in WRITE_ORDER if table in batch.tables)

    def heartbeat(self, fields: Mapping[str, Any]) -> None:
        """Publish the heartbeat; on a full disk the old file is overwritten in place. Raises OSError."""
        beat = {
            "run": self.info.name,
            "rank": self.rank,
            "attempt": self.attempt,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "ts": time.time(),
            "segments": self.segments,
            "bytes": self.bytes,
            **fields,
        }
        path, text = self.folder / f"heartbeat-r{self.rank:03d}.json", json.dumps(beat)
        try:
            segments.replace_text(path, text)
        except OSError:
            with open(path, "r+", encoding="utf-8") as file:  # its block is already ours
                file.write(text)
                file.truncate()

    def close(self) -> None:
        """Release the lock and the connection."""
        self._con.close()
        os.close(self._lock)

    def _own(self, table: str) -> list[Path]:
        found = segments.list_segments(self.store, self.info.name, table)
        return [path for name, path in found if name.rank == self.rank]

    def _previous_attempt(self, resume: bool) -> int:
        name = self.info.name
        beat = read_json(self.folder / f"heartbeat-r{self.rank:03d}.json")
        stored = read_json(self.folder / "run.json") if self.rank == 0 else None
        if not resume:
            if beat is not None or stored is not None:
                raise StoreError(
                    f"Run {name!r} (rank {self.rank}) already exists in store {str(self.store)!r}. "
                    "Choose another run name, or resume it with resume=True (--resume)."
                )
            return 0
        if beat is None and stored is None:
            raise StoreError(
                f"Cannot resume run {name!r} (rank {self.rank}): store {str(self.store)!r} does not hold it. "
                "Check the name with `rlvr ls`, or start it without resume."
            )
        if beat is not None and rank_status(beat, time.time()) in ("running", "stalled"):
            raise StoreError(
                f"Cannot resume run {name!r}: process {beat.get('pid')} on {beat.get('host')} is still writing it. "
                "Stop that process first."
            )
        attempts = [int(beat["attempt"])] if beat else []
        attempts += [len(stored.get("attempts", []))] if stored else []
        attempts += [found.attempt for table in TABLES for found, _ in self._named(table) if found.rank == self.rank]
        return max(attempts)

    def _named(self, table: str) -> list[tuple[SegmentName, Path]]:
        return segments.list_segments(self.store, self.info.name, table)

    def _prepare(self) -> None:
        try:
            segments.write_seeds(self.store)
            self.folder.mkdir(parents=True, exist_ok=True)
            link = self.folder / "data"
            if not link.is_symlink() and not link.exists():
                (self.folder / "data.g0").mkdir(exist_ok=True)
                with contextlib.suppress(FileExistsError):  # another rank was quicker
                    link.symlink_to("data.g0")
            for table in TABLES:
                (link / table).mkdir(exist_ok=True)
                for left in (link / table).glob(f"*-{self.rank}-*-*.parquet.tmp"):  # of an attempt that was killed
                    left.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"Cannot write to store {str(self.store)!r}: {error}. Choose another --store.") from error

    def _take_lock(self) -> int:
        """A shared lock for as long as the process lives: compaction needs it alone and leaves live runs be."""
        fd = os.open(self.folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise StoreError(f"Run {self.info.name!r} is being compacted. Wait for it to end and try again.") from None
        except OSError:
            pass  # no locks on this file system; the status still keeps compaction away
        return fd

    def _write_run_json(self, resume: bool) -> None:
        path = self.folder / "run.json"
        now = time.time()
        mark = {"attempt": self.attempt, "started": now, "resumed_after": self.last_step() if resume else None}
        stored = read_json(path) if resume else None
        created = stored["created"] if stored and "created" in stored else now
        attempts = [*(stored or {}).get("attempts", []), mark]
        content = {"schema_version": SCHEMA_VERSION, "created": created, "attempts": attempts, **asdict(self.info)}
        text = json.dumps(content, indent=1, default=str)
        if resume:
            segments.replace_text(path, text)
            return
        tmp = path.with_name(f"run.json.{os.getpid()}.tmp")
        tmp.write_text(text, encoding="utf-8")
        try:
            os.link(tmp, path)  # unlike a rename this fails if another process took the name just now
        except FileExistsError:
            raise StoreError(f"Run {self.info.name!r} was started by another process just now.") from None
        finally:
            tmp.unlink(missing_ok=True)


def _check_arguments(info: RunInfo, rank: int) -> None:
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
