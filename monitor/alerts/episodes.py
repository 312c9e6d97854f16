"""Alert episodes: the transitions of one alert from its first firing to its end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from monitor.records import SEVERITY_RANK


class Transition(Protocol):
    """What an episode is made of: monitor.records.Alert, or a row of the table `alerts`."""

    @property
    def rule(self) -> str: ...
    @property
    def severity(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def first_step(self) -> int: ...


T = TypeVar("T", bound=Transition)


@dataclass(slots=True)
class Episode(Generic[T]):
    """One alert that fired. worst: its first transition of the highest severity; resolved_step: None while it fires.

    transitions: from the first firing on, oldest first, each with its own numbers.
    """

    first: T
    worst: T
    resolved_step: int | None = None
    transitions: list[T] = field(default_factory=list)


def episodes(transitions: Iterable[T]) -> list[Episode[T]]:
    """The episodes in transitions of one run, oldest first; an alert that stayed pending is none."""
    found: dict[tuple[str, int], Episode[T]] = {}
    for transition in transitions:
        key = (transition.rule, transition.first_step)
        known = found.get(key)
        if transition.state == "firing":
            if known is None:
                found[key] = Episode(transition, transition, transitions=[transition])
                continue
            known.transitions.append(transition)
            known.resolved_step = None
            if SEVERITY_RANK.get(transition.severity, 0) > SEVERITY_RANK.get(known.worst.severity, 0):
                known.worst = transition
        elif transition.state == "resolved" and known is not None:
            known.transitions.append(transition)
            known.resolved_step = transition.step
    return sorted(found.values(), key=lambda episode: episode.first.first_step)
