"""What a rule is: a model whose fields are its thresholds, and a pure `check` from a Window to a Finding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from monitor.alerts.window import Window
from monitor.records import Severity


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule says of one step. `breached`: its condition holds; `held`: a firing alert stays (hysteresis).

    value, baseline, threshold in the unit of their series: `series`, or the one that the rule watches. message: what is
    the case, in a sentence or two with the numbers; action: what to do.
    """

    breached: bool
    held: bool
    severity: Severity
    value: float
    baseline: float
    threshold: float
    message: str
    action: str
    series: str | None = None


class Rule(BaseModel, ABC):
    """One detector. Its own fields are thresholds that a rules file may change; the docstring says formula and reason.

    name: what alerts are called after it. says: what is happening, as the start of a sentence; cure: what to do, in a
    few words; both stand in the verdict. watches: the series whose value the finding reports, where it names no other.
    floor: the share of the baseline that damage is projected to, where that series falls. needs: the rule is asked
    about the rows that have a value of all of these. uses: series that it looks at where they are known; without them
    it judges with less power.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    says: ClassVar[str]
    cure: ClassVar[str]
    floor: ClassVar[float | None] = None
    watches: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    uses: ClassVar[tuple[str, ...]] = ()
    judges_broken: ClassVar[bool] = False  # asked about rows whose value is nan or inf too

    enabled: bool = Field(True, description="false switches the rule off")
    for_rows: int = Field(3, ge=1, description="rows in a row before it fires, gets worse or resolves")
    cooldown_steps: int = Field(0, ge=0, description="steps after it resolved in which it fires again only if worse")
    worst: Severity = Field("critical", description="the highest severity that it announces")

    def is_clear(self, window: Window) -> bool:
        """Whether the newest row is surely no breach, told at less cost than `check`: a quiet alert then stays quiet.

        False where that is not known. Nothing else depends on it.
        """
        return False

    @abstractmethod
    def check(self, window: Window) -> Finding | None:
        """What the rule says of the newest row; None where it cannot judge."""
