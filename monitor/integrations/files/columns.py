"""Columns: which value of a source's row goes under which name, while rows and columns still come."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from monitor.errors import MonitorError
from monitor.integrations.aliases import STEP_COLUMNS, match
from monitor.integrations.files.reading import TIME, Row
from monitor.integrations.files.series import number, step_of
from monitor.metrics import MOST_OTHERS, can_be_named, is_known


@dataclass(frozen=True, slots=True)
class Values:
    """What a row says of a step. known: by keys of METRICS, nan and inf included; others: finite ones, by column."""

    step: int
    known: dict[str, float]
    others: dict[str, float]
    ts: float | None = None


class Columns:
    """Maps rows of a source. `mapping` is {key: column} as `match` finds it; what was found once stays so.

    Columns that no key or alias names keep their own names. Left out are those without a finite number, the counts of
    steps, and names that would pass for a key: of a column `entropy` that --map has replaced by another, say.
    trainer: whose aliases are used; None: those of all. live: what cannot be used is left out and told to `say`; else
    it raises MonitorError.
    """

    def __init__(
        self,
        source: str,
        chosen: Mapping[str, str],
        say: Callable[[str], None],
        *,
        live: bool,
        trainer: str | None = None,
    ) -> None:
        self.source, self.mapping, self.own = source, dict(chosen), dict[str, None]()
        self._say, self._live, self._trainer = say, live, trainer
        self._names: dict[str, str] = {}
        self._others: dict[str, str] = {}  # column: its own name
        self._complete = False  # the step's column is known

    def see(self, names: Mapping[str, str]) -> bool:
        """Take in the columns there are by now; False while the step's column is not among them."""
        if len(names) == len(self._names):
            return self._complete
        self._names = dict(names)
        try:
            self.mapping = match(self.source, names, self.mapping, self._trainer)
            self._complete = True
        except MonitorError as error:  # a new column may be one of two for a key: neither is taken
            if not self._live:
                raise
            self._say(str(error))
        others = [column for column in self._rest() if can_be_named(names[column]) and not is_known(names[column])]
        self._others = {column: names[column] for column in others[:MOST_OTHERS]}
        return self._complete

    @property
    def left_out(self) -> list[str]:
        """Columns of which nothing was recorded."""
        return [column for column in self._rest() if column not in self.own]

    def _rest(self) -> list[str]:
        """Columns of no key, step or time."""
        used = set(self.mapping.values())
        return [
            column
            for column, name in self._names.items()
            if column not in used and name.lower() not in STEP_COLUMNS and name != TIME
        ]

    def values(self, row: Row) -> Values | None:
        """The values of a row; None for one without a step."""
        where, cells = row
        column = self.mapping["step"]
        try:
            step = step_of(self.source, where, column, cells.get(column))
        except MonitorError as error:
            self._refuse(error)
            return None
        if step is None:
            return None
        known: dict[str, float] = {}
        for key, column in self.mapping.items():
            try:
                value = number(self.source, where, column, cells.get(column)) if key != "step" else None
            except MonitorError as error:
                self._refuse(error)
                continue
            if value is not None:
                known[key] = value
        others: dict[str, float] = {}
        for column, name in self._others.items():
            found = _finite(cells.get(column))
            if found is not None:
                self.own[column] = None
                others[name] = found
        return Values(step, known, others, _finite(cells.get(TIME)))

    def _refuse(self, error: MonitorError) -> None:
        if not self._live:
            raise error
        self._say(f"{error} It is left out.")


def _finite(value: object) -> float | None:
    """A cell as a finite number; None for anything else."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
