"""What a recorder leaves out, as counts and events. A gap has one event when it opens, and one with its size later."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

Event = tuple[float, int | None, str, str]  # ts, step, kind, message
PARTS = ("tokens", "samples", "histograms", "steps")  # in the order in which they are given up


@dataclass(slots=True)
class _Gap:
    first: int
    last: int
    rows: int


class Gaps:
    """The open gaps by part, and the counts of all that was left out. Not thread-safe by itself."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(PARTS, 0)  # raw tokens in rows, the others in steps
        self._open: dict[str, _Gap] = {}

    def widen(self, part: str, first: int, last: int, rows: int, reason: str) -> list[Event]:
        """Widens a part's gap by steps `first` to `last` with `rows` raw tokens; the event, if this opened the gap."""
        self.counts[part] += rows
        gap = self._open.get(part)
        if gap is not None:
            gap.first, gap.last, gap.rows = min(gap.first, first), max(gap.last, last), gap.rows + rows
            return []
        self._open[part] = _Gap(first, last, rows)
        message = f"{part.capitalize()} are not recorded from step {first} on: {reason}."
        return [(time.time(), first, f"{part}_dropped", message)]

    def take_back(self, part: str, rows: int) -> None:
        """Of what was left out, this was written after all, as evidence of an alert."""
        self.counts[part] -= rows
        if part in self._open:
            self._open[part].rows -= rows

    def end(self, parts: Iterable[str]) -> list[Event]:
        """The events of the gaps of `parts` that end now."""
        ended = [(part, gap) for part in parts if (gap := self._open.pop(part, None)) is not None]
        return [
            (
                time.time(),
                gap.last,
                f"{part}_gap",
                f"{part.capitalize()} of steps {gap.first} to {gap.last} were not recorded"
                + (f" ({gap.rows} rows)." if part == "tokens" else "."),
            )
            for part, gap in ended
        ]
