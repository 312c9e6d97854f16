"""The reserve: disk space that a recorder keeps for itself; and how it judges whether a disk has room.

When the disk fills during a run, the recorder gives blocks of its reserve back whenever a write of step scalars and
alerts finds no space. It gives them back a little at a time, because whoever filled the disk takes all that is free.
"""

from __future__ import annotations

import errno
import os
import re
import time
from pathlib import Path

SIZE = 4 << 20  # bytes of a full reserve
_SHARE = 8  # on a small disk the reserve takes at most free space / _SHARE
_GIVE = 8 << 10  # bytes given back at a time: room for two small segments
_NO_SPACE = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))
_BATCH = 128 << 10  # bytes; smaller batches are assumed to need this much
_RETURN = 8  # batches of the largest size that must fit before raw tokens come back
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 600.0


class Reserve:
    """The reserve of one rank: a file of real blocks. Raises OSError where it cannot be made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left = path.stat().st_size if path.exists() else 0  # a killed attempt may have left one
        self.fill()

    def fill(self) -> None:
        """Take up to SIZE bytes, or an eighth of a smaller disk's free space. Raises OSError; what was there stays."""
        wanted = min(SIZE, self.left + free_bytes(self.path.parent) // _SHARE)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if wanted > self.left:
                os.posix_fallocate(fd, 0, wanted)
                self.left = wanted
        except OSError:
            os.ftruncate(fd, self.left)
            raise
        finally:
            os.close(fd)

    def give(self, keep: int = 0) -> bool:
        """Give some blocks back to the disk, or with `keep` all but that many bytes. False if there are none left."""
        if self.left <= keep:
            return False
        self.left = keep or max(0, self.left - _GIVE)
        os.truncate(self.path, self.left)
        return True

    def remove(self) -> None:
        self.left = 0
        self.path.unlink(missing_ok=True)


class Room:
    """Whether raw tokens may be written: not after a refused write, until there is clearly room again.

    There is clearly room if several batches of the largest size so far would fit and some time has passed since the
    last refusal. That time grows with each refusal that soon follows, because file systems do not always report free
    space truly.
    """

    def __init__(self, folder: Path) -> None:
        self.full = False
        self.reason = ""  # why the disk last refused
        self._folder = folder
        self._largest = 0  # bytes of the largest batch
        self._good = 0  # batches since the disk last had room again
        self._pause_s = _PAUSE_S
        self._refused = float("-inf")

    def wrote(self, n_bytes: int) -> None:
        """A batch of so many bytes was written."""
        self._largest = max(self._largest, n_bytes)
        self._good += not self.full

    def refuse(self, error: BaseException) -> None:
        """A write was refused."""
        if not self.full:
            soon = self.reason and self._good < _RETURN
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S) if soon else _PAUSE_S
        self.full, self.reason, self._refused = True, told(error), time.monotonic()

    def fits(self, batches: int) -> bool:
        """Whether there is room for this many batches of the largest size so far, or of 128 KiB if that is more."""
        try:
            return free_bytes(self._folder) >= batches * max(self._largest, _BATCH)
        except OSError:
            return False

    def clear(self, *, closing: bool = False) -> bool:
        """Whether a disk that was full may have room again: the writer then tries everything that waits."""
        rested = closing or time.monotonic() - self._refused >= self._pause_s
        return rested and self.fits(_RETURN)

    def back(self) -> None:
        """Everything that waited has been written."""
        self.full, self._good = False, 0


def told(error: BaseException) -> str:
    """The system's message in one line, without the JSON that DuckDB wraps it in."""
    number = re.search(r'"errno":"(\d+)"', str(error))
    return os.strerror(int(number[1])) if number else str(error).partition("\n")[0]


def no_space(reason: str) -> bool:
    """Whether the text of an error of the system or of DuckDB says that the disk, or a quota on it, is full."""
    return any(text in reason for text in _NO_SPACE)


def free_bytes(folder: Path) -> int:
    """Bytes that are free for this user on a folder's disk."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
