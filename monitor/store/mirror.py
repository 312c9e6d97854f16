"""The mirror of a recorder: a thread that pushes what the recorder has made durable to an object store.

Training waits for the local disk only. While the object store does not answer, segments stay where they are, the folder
of the run, and go when it answers again; an event says when that began and when it ended.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from monitor.store.push import Pusher, pause_s

_log = logging.getLogger("rlvr.monitor")
_LOOK_S = 1.0  # between two looks, so that steps of a second or less share a manifest
_LAST_S = 60.0  # how long a closing recorder goes on trying
Note = Callable[[str, str], None]


class Mirror:
    """Pushes one rank of a run to `url` from `start` to `close`. note(kind, message): takes events.

    Raises StoreError for a faulty URL and MissingPackageError without obstore. Later errors only become events.
    """

    def __init__(self, store: Path, url: str, run: str, rank: int, note: Note) -> None:
        self._pusher = Pusher(store, url, runs=[run], ranks=[rank], lanes=1)
        self._again = f"rlvr store push {store} {url} --run {run}"
        self._note = note
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._failed = 0
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="rlvr-mirror", daemon=True)

    def start(self) -> None:
        """Start the thread. Raises RuntimeError."""
        self._thread.start()

    def close(self, timeout_s: float = _LAST_S) -> bool:
        """Push what is left, after the recorder wrote its last heartbeat. True if all is there."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s)
        whole = not self._thread.is_alive() and not self._failed and not self._told
        if not whole:
            _log.error("Not all of the run is mirrored. Nothing is lost: %s", self._again)
        return whole

    def _run(self) -> None:
        while True:
            last = self._closing.is_set()
            self._look()
            if last and (not self._failed or time.monotonic() >= self._deadline):
                return
            if last:
                time.sleep(_LOOK_S)
            else:
                self._closing.wait(pause_s(_LOOK_S, self._failed))

    def _look(self) -> None:
        try:
            done = self._pusher.look()
        except Exception as error:  # mirroring must not take training down
            if not self._failed:
                _log.warning("The mirror fails: %s It is tried again.", error)
                self._note("mirror_error", f"{error} It is tried again.")
            self._failed += 1
            return
        if self._failed:
            self._failed = 0
            self._note("mirror_recovered", "The mirror goes on, and all that waited is there.")
        for text in done.refused:
            if text not in self._told:
                _log.warning("The mirror leaves something out: %s", text)
                self._note("mirror_error", text)
        self._told |= set(done.refused)
