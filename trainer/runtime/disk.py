"""Writing to a disk that may refuse: every refusal is an OSError, and what was there before stays whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from monitor.store.segments import fsync_folder


def attempt(action: Callable[[], object]) -> OSError | None:
    """What the disk said, for the ranks to agree on before anyone raises. safetensors has an error of its own."""
    try:
        action()
    except OSError as error:
        return error
    except SafetensorError as error:
        return OSError(str(error))
    return None


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a new folder inside `folder`, and moves its files to their places once all are durable.

    Files of these names are replaced, each by a rename; others stay. Raises OSError and leaves `folder` as it was.
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
