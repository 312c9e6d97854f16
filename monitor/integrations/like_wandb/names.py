"""Names of a log whose columns come bit by bit: which key of METRICS each means, or that it keeps its own name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from monitor.errors import MonitorError
from monitor.integrations.aliases import STEP_COLUMNS, match
from monitor.metrics import is_known

COUNT = "_step"  # what W&B counts rows by
# columns that count steps, of which the first in a row numbers it; they are no series
STEPS = (*(name for name in STEP_COLUMNS if name != COUNT), "eval/global_step")


class Names:
    """Keys by `monitor.integrations.aliases.match`, as `rlvr check` takes them, never guessed from a tail.

    What was found once stays so: of two names for one key that come one after the other the first has it, and the
    other one keeps its own name, or is left out where that would pass for the key; then `say` gets a sentence.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._seen: dict[str, str] = {COUNT: COUNT}
        self._keys = {"step": COUNT}  # key: name
        self._named: dict[str, str | None] = {}

    def see(self, names: Iterable[str]) -> None:
        """Takes in the names of a row."""
        new = [name for name in names if name not in self._named and name not in STEPS]
        if not new:
            return
        try:
            self._take(new)
        except MonitorError:  # two of them mean the same to different trainers: the first has it
            for name in new:
                self._take([name])
        keys = {name: key for key, name in self._keys.items() if key != "step"}
        for name in new:
            self._named[name] = keys.get(name) or (None if is_known(name) else name)
            if self._named[name] is None:
                self._say(f"{name!r} is left out: the key {name!r} is taken by {self._keys.get(name)!r}.")

    def __getitem__(self, name: str) -> str | None:
        """What a seen name is recorded as; None: not at all."""
        return self._named.get(name)

    def _take(self, new: list[str]) -> None:
        seen = self._seen | {name: name for name in new}
        self._keys = match("the log", seen, self._keys)
        self._seen = seen
