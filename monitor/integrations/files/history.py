"""History: the rows of a source as the steps of a run, and how far a run holds them already.

Rows of one step are put together. Where a known series goes back, the trainer was started again: from there on a new
attempt of the run begins, as the store keeps them. A value that only comes late, of an evaluation say, joins its step.
Where several processes write one log, as prime-rl's do, some series lag behind others: a step waits for them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from monitor.alerts.engine import EVALUATED
from monitor.integrations.files.columns import Values

MOST_RESTARTS = 20  # a source that goes back more often is a table without order: it is sorted by step
MOST_BEHIND = 8  # steps that a series may lag behind the newest one before nothing waits for it any more
_REGULAR = 0.75  # share of the steps in which a series has values for which a step waits


@dataclass(slots=True)
class Step:
    """One step as the source tells it.

    known, others: see Values. attempt counts from 0 in the source. late: it has come behind a later step. Where further
    values of a step come after it was handed over, it comes once more, with all of them.
    """

    step: int
    attempt: int
    known: dict[str, float] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    ts: float | None = None
    late: bool = False

    @property
    def scalars(self) -> dict[str, float]:
        return self.others | self.known

    def add(self, values: Values) -> None:
        self.known |= values.known
        self.others |= values.others
        self.ts = values.ts if self.ts is None else self.ts


class History:
    """The steps of a source, oldest first. `take()` hands over those that wait, and forgets them."""

    def __init__(self) -> None:
        self.waiting: list[Step] = []
        self.too_late = 0  # values that came when their step had been handed over and was not the last one
        self._attempt = 0
        self._start = 0  # of this attempt's steps among those that wait; they ascend
        self._handed_over: Step | None = None  # the last one
        self._newest: dict[str, tuple[int, float]] = {}  # the newest step and value of each known series
        self._last: int | None = None  # the newest step of this attempt
        self._regular = _Regular()

    def add_all(self, rows: Iterable[Values]) -> None:
        """Add what a first look at a source has found."""
        rows = list(rows)
        for row in rows:
            self.add(row)
        if self._attempt >= MOST_RESTARTS:
            steps: dict[int, Step] = {}
            for row in rows:
                steps.setdefault(row.step, Step(row.step, self._attempt)).add(row)
            self.waiting, self._start, self._last = [steps[step] for step in sorted(steps)], 0, max(steps)

    def add(self, row: Values) -> None:
        """Add a row."""
        if self._last is None or row.step > self._last:
            self._append(row)
        elif self._goes_back(row) and self._attempt < MOST_RESTARTS:
            self._attempt, self._start = self._attempt + 1, len(self.waiting)
            self._newest, self._regular = {}, _Regular()
            self._append(row)
        else:
            self._join(row)
        self._newest |= {key: (row.step, value) for key, value in row.known.items()}
        self._regular.add(row)

    def take(self) -> list[Step]:
        """All the waiting steps."""
        return self.take_first(len(self.waiting))

    def take_ready(self, *, idle: bool) -> list[Step]:
        """The waiting steps, as far as each regular series has come. idle: the newest one too, as no row comes."""
        reached = self._regular.reached()
        most = len(self.waiting) - (0 if idle else 1)
        count = 0
        while count < most:
            step = self.waiting[count]
            behind = len(self.waiting) - 1 - count
            if step.attempt == self._attempt and step.step > reached and behind < MOST_BEHIND:
                break
            count += 1
        return self.take_first(count)

    def take_first(self, count: int) -> list[Step]:
        """As many of the waiting steps."""
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        self._handed_over = taken[-1] if taken else self._handed_over
        self._start = max(0, self._start - count)
        return taken

    def _goes_back(self, row: Values) -> bool:
        """Whether a known series has a value at or behind the row's step, but for the same value of the last step.

        Evaluations do not count: they may end in another order than they began.
        """
        newest = [(key, *self._newest[key]) for key in row.known.keys() & self._newest if not key.startswith(EVALUATED)]
        return any(
            step > row.step or (step == row.step and value != row.known[key] and not math.isnan(value))
            for key, step, value in newest
        )

    def _append(self, row: Values) -> None:
        self._last = row.step
        self.waiting.append(self._step(row))

    def _join(self, row: Values) -> None:
        place = bisect_left(self.waiting, row.step, lo=self._start, key=lambda step: step.step)
        if place < len(self.waiting) and self.waiting[place].step == row.step:
            self.waiting[place].add(row)
        elif row.step == self._last:
            self.waiting.append(self._step(row, again=True))
        elif place > self._start or self._handed_over is None or self._handed_over.attempt != self._attempt:
            self.waiting.insert(place, self._step(row, late=True))
        else:
            self.too_late += len(row.known) + len(row.others)

    def _step(self, row: Values, *, late: bool = False, again: bool = False) -> Step:
        step = Step(row.step, self._attempt, late=late)
        if again and self._handed_over is not None:
            step.known, step.others = dict(self._handed_over.known), dict(self._handed_over.others)
        step.add(row)
        return step


class _Regular:
    """The known series with a value in nearly every step, and the step that all of them have reached."""

    def __init__(self) -> None:
        self._order: dict[int, int] = {}  # of the steps, as they came
        self._series: dict[str, tuple[int, int, int]] = {}  # step of its first value and of its newest, their number

    def add(self, row: Values) -> None:
        self._order.setdefault(row.step, len(self._order))
        for key in row.known:
            first, newest, count = self._series.get(key, (row.step, -1, 0))
            if row.step > newest and not key.startswith(EVALUATED):
                self._series[key] = first, row.step, count + 1

    def reached(self) -> float:
        """The newest step up to which every regular series has come; infinite while none is known to be regular."""
        return min((newest for first, newest, count in self._series.values() if self._is_regular(first, newest, count)),
                   default=math.inf)  # fmt: skip

    def _is_regular(self, first: int, newest: int, count: int) -> bool:
        steps = self._order[newest] - self._order[first] + 1
        lag = len(self._order) - 1 - self._order[newest]
        return count >= 2 and count >= _REGULAR * steps and lag <= MOST_BEHIND


@dataclass(frozen=True, slots=True)
class Stored:
    """A step as the store holds it: of one attempt, with the values of rank 0."""

    attempt: int
    step: int
    scalars: Mapping[str, float]


def already_held(steps: Sequence[Step], stored: Sequence[Stored]) -> int | None:
    """How many of a source's `steps` a run holds already; None if the run is not the beginning of this source.

    stored: every step of every attempt, in the order they were recorded. A source that was begun anew is told by the
    newest attempts alone, so those from any attempt on may be its beginning. If further values of the last held step
    have come meanwhile, that step does not count, and is recorded again as a whole.
    """
    firsts = [at for at, one in enumerate(stored) if not at or one.attempt != stored[at - 1].attempt]
    found = (_matched(steps, stored[first:]) for first in firsts)
    return next((count for count in found if count is not None), None)


def _matched(steps: Sequence[Step], stored: Sequence[Stored]) -> int | None:
    at = 0
    held: Step | None = None
    missing: set[str] = set()
    for one in stored:
        while at < len(steps) and steps[at].late and steps[at].step != one.step:
            at += 1
        if at < len(steps) and _agree(steps[at], one):
            held, at = steps[at], at + 1
        elif held is None or not _agree(held, one):  # an attempt may begin with the step at which the last one ended
            return len(steps) if at == len(steps) else None
        missing = held.scalars.keys() - one.scalars.keys()
    return at - 1 if missing and not steps[at - 1].late else at


def _agree(step: Step, stored: Stored) -> bool:
    """Whether the values that both have are equal: those of known keys, if there are any."""
    if step.step != stored.step:
        return False
    values = step.known or step.others
    pairs = [(value, stored.scalars[key]) for key, value in values.items() if key in stored.scalars]
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in pairs)
