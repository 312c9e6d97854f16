"""Evidence: raw tokens and rollout texts of the steps around an alert, which are kept whatever thinning says.

What thinning leaves out of a step waits in memory until the step is judged, and then for `BEFORE` more steps. A step
that starts an alert, or makes one worse, brings back what still waits; it and the `AFTER` steps behind it are not
thinned. All that is brought back is written with the tokens of that step, before its commit mark: once the step of an
alert is acknowledged, so is the evidence up to it. In memory are never more than `MAX_ROWS` rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence

from monitor.records import SEVERITY_RANK, Alert
from monitor.store.batch import Item

BEFORE, AFTER = 3, 2  # steps around the one of a transition
MAX_ROWS = 1 << 22  # tokens in memory, rows of each of the two tables counted: four steps of a million tokens, 150 MB


class Evidence:
    """What was left out of steps that wait or were just judged. Not safe for threads by itself."""

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        self.rows = 0  # in memory
        self._max_rows = max_rows
        self._ring: deque[Item | None] = deque()  # the last BEFORE judged steps; None: nothing was left out
        self._after = 0  # steps that are still to come of an alert's evidence
        self._announced: dict[str, int] = {}  # the worst severity of each alert that is pending or firing

    def hold(self, item: Item) -> None:
        """Take what was left out of a step, if need be in place of the oldest judged ones; let it go if too large."""
        self.rows += item.held_rows
        for i, oldest in enumerate(self._ring):
            if oldest is not None and self.rows > self._max_rows >= item.held_rows:
                self._ring[i] = None
                self.let_go(oldest)
        if self.rows > self._max_rows:
            self.let_go(item)

    def let_go(self, item: Item) -> None:
        """Forget what was left out of a held step."""
        self.rows -= item.held_rows
        item.held_tokens = item.held_samples = None

    def judged(self, item: Item) -> list[Item]:
        """The steps, oldest first, of which something was left out that is to be written now that `item` is judged.

        The caller writes it: it is no longer counted here.
        """
        try:
            starts = [self._starts(alert) for alert in item.alerts]
        except Exception:  # an engine of others gave something else than alerts
            self.let_go(item)
            raise
        if any(starts):
            found = [*self._ring, item]
            self._ring.clear()
            self._after = AFTER
        elif self._after:
            found = [item]
            self._after -= 1
        else:
            found = []
            self._ring.append(item if item.held_rows else None)
            if len(self._ring) > BEFORE and (oldest := self._ring.popleft()) is not None:
                self.let_go(oldest)
        back = [one for one in found if one is not None and one.held_rows]
        self.rows -= sum(one.held_rows for one in back)
        return back

    def _starts(self, alert: Alert) -> bool:
        """True for the first transition of an episode and for each that is more severe than those before it."""
        if alert.state == "resolved":
            self._announced.pop(alert.rule, None)
            return False
        known, rank = self._announced.get(alert.rule, -1), SEVERITY_RANK.get(alert.severity, 0)
        self._announced[alert.rule] = max(known, rank)
        return rank > known


def steps_around(transitions: Iterable[int], steps: Sequence[int]) -> set[int]:
    """Of `steps` (ascending) those around each step of a transition: BEFORE, itself, and AFTER."""
    kept: set[int] = set()
    for step in transitions:
        first = bisect_left(steps, step)
        last = bisect_left(steps, step + 1)
        kept.update(steps[max(0, first - BEFORE) : last + AFTER])
    return kept
