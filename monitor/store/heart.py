"""The heartbeat of a recorder, from a thread of its own, so that slow writes of segments do not delay it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_BEAT_S = 1.0


class Heart:
    """Calls `beat(status)` each second from `start` to `stop`. `beat` must not raise and may wait for the disk."""

    def __init__(self, beat: Callable[[str], None]) -> None:
        self._beat = beat
        self._alone = threading.Lock()  # nothing follows the last heartbeat, and no two share a temporary file
        self._stopped = threading.Event()
        self._now = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rlvr-heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def now(self, wait_s: float = 0.0) -> None:
        """Beat at once, and wait up to wait_s seconds for it."""
        self._done.clear()
        self._now.set()
        if wait_s:
            self._done.wait(wait_s)

    def stop(self, status: str) -> None:
        """The last heartbeat; returns when it is written."""
        self.cancel()
        with self._alone:
            self._beat(status)

    def cancel(self) -> None:
        """End without a last heartbeat."""
        self._stopped.set()
        self._now.set()
        with self._alone:
            pass

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped.is_set():
            with self._alone:
                if not self._stopped.is_set():
                    self._beat("running")
                    self._done.set()
            due = max(due + _BEAT_S, time.monotonic())
            self._now.wait(due - time.monotonic())
            self._now.clear()
