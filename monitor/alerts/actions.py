"""Actions: what a trainer does when an alert fires. This module says what is wanted; a trainer carries it out.

An action acts on the alerts that it wants, in the moment when they fire or get worse, once for an alert. An
intervention changes settings of the run; trainer/runtime/actions.py applies it, records it and takes it back.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from monitor.alerts.rules import RULES
from monitor.errors import nearest
from monitor.records import Alert, Severity


class AlertFilter(BaseModel):
    """Which alerts are wanted, by severity and rule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    severities: tuple[Severity, ...] = Field(("warning", "critical"), min_length=1, description="wanted severities")
    rules: tuple[str, ...] = Field(("*",), min_length=1, description="names or patterns of wanted rules")

    @classmethod
    def known_rules(cls) -> list[str]:
        """The rules that a pattern may name."""
        return list(RULES)

    @field_validator("rules")
    @classmethod
    def _known(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        known = cls.known_rules()
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ValueError(f"no rule is called {pattern!r}.{nearest(pattern, known)} Rules: {', '.join(known)}")
        return patterns

    def wants_alert(self, alert: Alert) -> bool:
        return alert.severity in self.severities and any(fnmatchcase(alert.rule, pattern) for pattern in self.rules)


class Action(AlertFilter):
    """What every action has. `do` chooses it."""

    do: str
    times: int = Field(1, ge=1, description="how often it acts in a run")


class Intervention(Action):
    """An action that changes settings of the run from the next step on."""

    until: Literal["end", "resolved"] = Field(
        "end", description="end: the change stays; resolved: it is taken back when the alert ends"
    )


class Checkpoint(Action):
    """Saves a checkpoint, beside the regular ones."""

    do: Literal["checkpoint"] = "checkpoint"
    times: int = Field(5, ge=1, description="how often it acts in a run")


class Stop(Action):
    """Ends the run after the step. Its policy is saved; `rlvr train --resume` goes on."""

    do: Literal["stop"] = "stop"


class GoBack(Action):
    """Takes weights, optimizer and entropy control back to the last checkpoint before anything was amiss.

    The policy of the start is saved for it. Steps, prompts and random numbers go on, so that the run does not repeat
    what led here and its record stays whole.
    """

    do: Literal["go_back"] = "go_back"


class LowerLr(Intervention):
    """Divides optim.lr."""

    do: Literal["lower_lr"] = "lower_lr"
    factor: float = Field(3.0, gt=1, description="what the learning rate is divided by")


class RaiseTemperature(Intervention):
    """Multiplies rollout.temperature, for sampling and loss alike; evaluations keep the temperature of the start."""

    do: Literal["raise_temperature"] = "raise_temperature"
    factor: float = Field(1.2, gt=1, description="what the temperature is multiplied by")
    most: float = Field(1.5, gt=0, description="the highest temperature")


class ClipHigher(Intervention):
    """Widens the upper clip bound, so that rare tokens may rise further. Acts off-policy alone (arXiv 2503.14476)."""

    do: Literal["clip_higher"] = "clip_higher"
    clip_high: float = Field(0.28, gt=0, description="the new loss.clip_high")


class HoldEntropy(Intervention):
    """Switches the entropy control on: loss.entropy_target becomes a share of the run's baseline entropy."""

    do: Literal["hold_entropy"] = "hold_entropy"
    share: float = Field(0.7, gt=0, description="target, as a share of the baseline entropy")


class SwitchWeighting(Intervention):
    """Changes the weighting. Its warm-up is over."""

    do: Literal["switch_weighting"] = "switch_weighting"
    weighting: str = Field(description="the new one, e.g. uniform or ict:keep=0.3")


AnyAction = Annotated[
    Checkpoint | Stop | GoBack | LowerLr | RaiseTemperature | ClipHigher | HoldEntropy | SwitchWeighting,
    Field(discriminator="do"),
]
ACTIONS: dict[str, type[Action]] = {
    get_args(model.model_fields["do"].annotation)[0]: model for model in get_args(get_args(AnyAction)[0])
}
DEFAULT_ACTIONS: tuple[Action, ...] = (Checkpoint(),)
RECOMMENDED_ACTIONS: tuple[Action, ...] = (Checkpoint(), GoBack(), LowerLr())  # `rlvr train --guard`
