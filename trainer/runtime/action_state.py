"""What the actions of a run have done so far. It is saved with each checkpoint, so that a resumed run goes on alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Change:
    """Settings that an intervention changed, and the alert that it did so for (rule and first step).

    settings: {dotted option: value}, e.g. {"optim.lr": 1e-4}; a whole group where the option is one, as "weighting".
    temporary: it is taken back when the alert ends.
    """

    rule: str
    first_step: int
    do: str
    settings: dict[str, Any]
    temporary: bool = False


@dataclass(slots=True)
class ActionState:
    """changes: those in force, oldest first. taken: how often each action acted, by its place in the list of actions.

    amiss: alerts (rule, first step) of severity warning or critical that are pending or fire. good: step of the newest
    checkpoint at which there was none; it is kept for an action that goes back to it.
    """

    changes: list[Change] = field(default_factory=list)
    taken: dict[str, int] = field(default_factory=dict)
    amiss: list[tuple[str, int]] = field(default_factory=list)
    good: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`; an empty one, of an older checkpoint, leaves this as it is."""
        if state:
            self.changes = [Change(**change) for change in state["changes"]]
            self.taken, self.good = dict(state["taken"]), state["good"]
            self.amiss = [(rule, first) for rule, first in state["amiss"]]
