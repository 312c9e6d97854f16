"""Writing to a disk that may be full or broken: each failure is an OSError, and older files stay whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from monitor.store.segments import fsync_folder


def attempt(action: Callable[[], object]) -> OSError | None:
    """Runs the action and returns its OSError or None, so that the ranks can agree before any of them raises.

    An error of safetensors comes back as an OSError too.
    """
    try:
        action()
    except OSError as error:
        return error
    except SafetensorError as error:
        return OSError(str(error))
    return None


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a new folder inside `folder`, and moves its files to their places once all are durable.

    Files of the same names are replaced, each by a rename, and other files stay. Raises OSError if the disk refuses,
    and then leaves `folder` as it was.
    """
    existed, half = folder.is_dir(), folder / ".unfinished"

    def fill() -> None:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        write(half)
        for path in half.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    error = attempt(fill)
    if error is None:
        for path in sorted(half.iterdir()):
            os.replace(path, folder / path.name)
    shutil.rmtree(half, ignore_errors=True)
    if error is not None:
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise error
    fsync_folder(folder)
