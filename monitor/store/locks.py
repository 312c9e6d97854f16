"""Locks that say who writes: one for each rank of a run, held alone by its recorder for as long as its process lives.

The kernel lets go of them when the process ends, however it ends: on the same machine a free lock means that the
writer is gone, and a held one that it lives, whatever clocks and heartbeats say. They are `flock` locks. On NFS Linux
turns them into locks of the server, where a client that was cut off may keep its lock for a while, and some file
systems have none at all: there the heartbeat's age decides (monitor.store.runs).
"""

from __future__ import annotations

import fcntl
import os
import time
import weakref
from pathlib import Path

_LOOKS_S = 5.0  # how long to try again while readers are just looking
_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def rank_lock(folder: Path, rank: int) -> Path:
    """The lock file of a rank in a run's folder."""
    return folder / f"rank-{rank:03d}.lock"


def take_rank(folder: Path, rank: int) -> FileLock:
    """Become the writer of a rank. Raises BlockingIOError if there is one; a reader's `is_held` is waited for."""
    return FileLock(rank_lock(folder, rank), wait_s=_LOOKS_S)


def share_run(folder: Path) -> FileLock:
    """Keep compaction away from a run. Raises BlockingIOError while one is at work."""
    return FileLock(folder / "run.lock", shared=True)


def take_run(folder: Path) -> FileLock:
    """Keep every recorder and compaction away from a run. Raises BlockingIOError if there is one."""
    return FileLock(folder / "run.lock")


class FileLock:
    """A lock on a file, made if missing, held until `release` or the end of the process; forked children have no part.

    shared: together with other shared holders. Raises BlockingIOError if someone else holds it, other OSErrors if the
    file cannot be opened. `works` is False where the file system has no locks: nothing is held there.
    """

    def __init__(self, path: Path, *, shared: bool = False, wait_s: float = 0.0) -> None:
        self.works = True
        self._fd: int | None = None
        deadline = time.monotonic() + wait_s
        while self._fd is None:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self.works = _lock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, deadline)
                if _is_at(fd, path):  # else it was removed with the folder of a failed start: lock the new one
                    self._fd, fd = fd, -1
            finally:
                if fd >= 0:
                    os.close(fd)
        _held.add(self)

    def release(self) -> None:
        """Let go of the lock. Safe to call twice."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def is_held(path: Path) -> bool | None:
    """Whether a process holds a lock alone; None where that cannot be told. Takes nothing away from it."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)
    return False


def _lock(fd: int, kind: int, deadline: float) -> bool:
    """Take the lock; False where there are none. Raises BlockingIOError if someone holds it."""
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline or not _only_looks(fd):
                raise
            time.sleep(0.001)
        except OSError:
            return False


def _only_looks(fd: int) -> bool:
    """Whether the lock is refused only because of a reader's look (`is_held`), which is over in no time."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _leave_to_parent() -> None:
    """A forked child shares the parent's open files, and with them its locks: they must end with the parent."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_leave_to_parent)
