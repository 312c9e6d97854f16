"""Locks that say who writes. Each rank of a run has one, which its recorder holds alone as long as its process lives.

The kernel frees a lock when its process ends, however it ends. So on the same machine a free lock means that the writer
is gone, and a held lock that it lives, whatever clocks and heartbeats say. They are `flock` locks. On NFS, Linux turns
them into locks of the server, where a client that lost its connection may keep its lock for a while. Some file systems
have no locks at all. There the heartbeat's age decides (monitor.store.runs).
"""

from __future__ import annotations

import fcntl
import os
import time
import weakref
from pathlib import Path

_LOOKS_S = 5.0  # how long to try again while only a reader's `is_held` is in the way
_SWAP_S = 30.0  # how long writers wait for a swap, which takes milliseconds, and a swap for writers
_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def rank_lock(folder: Path, rank: int) -> Path:
    """The lock file of a rank in a run's folder."""
    return folder / f"rank-{rank:03d}.lock"


def take_rank(folder: Path, rank: int) -> FileLock:
    """Become the writer of a rank. Waits for a reader's `is_held`. Raises BlockingIOError if the rank has a writer."""
    return FileLock(rank_lock(folder, rank), wait_s=_LOOKS_S)


def share_data(folder: Path, wait_s: float = _SWAP_S) -> FileLock:
    """Keep the run's generation as it is, while a segment is written into it. Waits for a swap to end.

    Raises BlockingIOError if that takes longer than any swap should.
    """
    return FileLock(folder / "run.lock", shared=True, wait_s=wait_s, patient=True)


def take_data(folder: Path) -> FileLock:
    """Keep every writer out of a run's data for the moment of a swap. Raises BlockingIOError after a long wait."""
    return FileLock(folder / "run.lock", wait_s=_SWAP_S, patient=True)


def take_compaction(folder: Path) -> FileLock:
    """Become the only compaction of a run. Raises BlockingIOError if there is another."""
    return FileLock(compaction_lock(folder), wait_s=_LOOKS_S)


def compaction_lock(folder: Path) -> Path:
    """The lock file of compaction in a run's folder."""
    return folder / "compact.lock"


class FileLock:
    """A lock on a file, which is made if missing. It is held until `release` or the end of the process.

    Forked children do not hold it. shared: other shared holders may hold it too. patient: wait up to
    wait_s for any holder, not only for a reader's look. `works` is False where the file system
    has no locks, so that nothing is held. Raises BlockingIOError if someone else holds the lock, and other OSErrors if
    the file cannot be opened.
    """

    def __init__(self, path: Path, *, shared: bool = False, wait_s: float = 0.0, patient: bool = False) -> None:
        self.works = True
        self._fd: int | None = None
        deadline = time.monotonic() + wait_s
        while self._fd is None:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self.works = _lock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, deadline, patient)
                if _is_at(fd, path):  # if not, a failed start removed its folder: lock the new file
                    self._fd, fd = fd, -1
            finally:
                if fd >= 0:
                    os.close(fd)
        _held.add(self)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let go of the lock. Safe to call twice."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def is_held(path: Path) -> bool | None:
    """Whether a process holds a lock alone; None where that cannot be told. The holder keeps its lock."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for ever
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


def _lock(fd: int, kind: int, deadline: float, patient: bool) -> bool:
    """Take the lock; False where the file system has no locks. Raises BlockingIOError if someone holds it."""
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline or not (patient or _only_looks(fd)):
                raise
            time.sleep(0.001)
        except OSError:
            return False


def _only_looks(fd: int) -> bool:
    """Whether the lock is refused only because of a reader's `is_held`, which takes very little time."""
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
    """Runs in a forked child, which shares the parent's open files: closes them, so that locks end with the parent."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_leave_to_parent)
