"""SIGINT and SIGTERM end a run only where no step is half done, so that the saved policy is one between two updates."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import TypeVar

from trainer.runtime.ranks import Ranks

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. Not an Exception, like KeyboardInterrupt, so `except Exception` does not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stops:
    """When a signal may end the run: at once while tokens are sampled, else at the end of the step.

    With one process, the first signal raises Interrupted at once, because sampling and rewards change no parameter;
    inside `held` it raises at the end of the block. With several processes, a rank that left alone would leave the
    others waiting. So Interrupted is raised on all of them, where they agree: at both ends of `held` and in `check`.
    A second signal kills as usual. Signals are handled inside `with stops.installed():` only.
    """

    def __init__(self, ranks: Ranks = Ranks()) -> None:  # noqa: B008, frozen
        self._ranks = ranks
        self._met: int | None = None
        self._holds = ranks.world > 1

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The block runs to its end before a signal takes effect."""
        before, self._holds = self._holds, True
        try:
            self.check()
            yield
        finally:
            self._holds = before
        self.check()

    def check(self) -> None:
        """Raises Interrupted on all ranks if a signal has reached one of them."""
        if self._ranks.any(self._met is not None):
            raise Interrupted(self._met or signal.SIGTERM)

    def cut_short(self, action: Callable[[], T]) -> T | None:
        """Inside `held`: what the action returns, or None if a signal ends it early. The action must change nothing."""
        before, self._holds = self._holds, self._ranks.world > 1
        try:
            self.check()
            return action()
        except Interrupted:
            return None
        finally:
            self._holds = before

    def _handle(self, number: int, frame: object) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self._met = number
        if not self._holds:
            raise Interrupted(number)
        told = f"\n{signal.Signals(number).name}: stops at the end of this step; a second signal ends it at once.\n"
        with contextlib.suppress(OSError):
            os.write(2, told.encode())  # print is not reentrant
