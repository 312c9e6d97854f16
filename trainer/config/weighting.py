"""The weightings' settings: one model for each kind, with its own parameters. Imports no torch.

`weighting.kind` chooses the model, so a parameter that the kind does not have cannot be set. The functions that compute
the weights are in trainer/learning/weightings, one for each kind; they take the parameters under the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from monitor.errors import nearest
from trainer.config.base import ConfigError, SettingsGroup

DEFAULT_KIND = "ict"


class WeightingConfig(SettingsGroup):
    """What every kind has."""

    kind: str
    warmup_steps: int = Field(20, ge=0, description="steps before the weighting acts: until then every weight is 1")
    normalise: Literal["selected", "all"] = Field(
        "selected", description="what the loss's denominators sum. selected: the weights (as ICT does); all: all tokens"
    )

    @property
    def parameters(self) -> dict[str, Any]:
        """The kind's own parameters by name: the keywords of its weight function."""
        return self.model_dump(exclude=set(WeightingConfig.model_fields))


class _KeptShare(WeightingConfig):
    keep: float = Field(0.1, description="share of the tokens kept, in (0, 1]")

    @model_validator(mode="after")
    def _keeps_some(self) -> _KeptShare:
        if not 0 < self.keep <= 1:
            raise ValueError(
                f"weighting.keep is {self.keep}, expected a share in (0, 1], e.g. 0.1 for a tenth of the tokens."
            )
        return self


class _Interval(WeightingConfig):
    low: float
    high: float

    @model_validator(mode="after")
    def _is_not_empty(self) -> _Interval:
        if not self.low < self.high:
            raise ValueError(f"weighting.low is {self.low}, expected less than weighting.high, {self.high}.")
        return self


class _OverAllTokens(WeightingConfig):
    normalise: Literal["selected", "all"] = Field(
        "all", description="what the loss's denominators sum. selected: the weights; all: all tokens"
    )


class Budget(_OverAllTokens):
    """What kinds have that allow a step a share of the entropy loss; loss.entropy_actuator budget moves it."""

    share: float = Field(
        0.3, ge=-1, le=1, description="share of the entropy loss of uniform weights that a step may have; below 0 it "
        "gains entropy"
    )  # fmt: skip


class Uniform(WeightingConfig):
    kind: Literal["uniform"] = "uniform"


class Ict(_KeptShare):
    kind: Literal["ict"] = "ict"


class IctFrequent(_KeptShare):
    kind: Literal["ict_frequent"] = "ict_frequent"
    keep: float = Field(0.9, description="share of the tokens kept, in (0, 1]")


class Random(_KeptShare):
    kind: Literal["random"] = "random"


class _KeptUndecided(_KeptShare):
    keep: float = Field(0.1, description="share of the undecided tokens kept, in (0, 1]")
    min_entropy: float = Field(0.05, ge=0, description="tokens of more entropy than this are undecided, nats")


class IctUndecided(_KeptUndecided):
    kind: Literal["ict_undecided"] = "ict_undecided"


class RandomUndecided(_KeptUndecided):
    kind: Literal["random_undecided"] = "random_undecided"


class TopEntropy(_KeptShare):
    kind: Literal["top_entropy"] = "top_entropy"
    keep: float = Field(0.2, description="share of the batch's tokens kept, in (0, 1]")


class Stapo(WeightingConfig):
    kind: Literal["stapo"] = "stapo"
    max_probability: float = Field(0.002, gt=0, le=1, description="only tokens of lower probability are silenced")
    entropy_quantile: float = Field(0.8, gt=0, le=1, description="only tokens below this entropy quantile are silenced")


class IctSoft(WeightingConfig):
    kind: Literal["ict_soft"] = "ict_soft"


class Divergence(WeightingConfig):
    kind: Literal["divergence"] = "divergence"
    strength: float = Field(0.3, gt=0, lt=2, description="range of the weights")
    sharpness: float = Field(50.0, description="alpha after the ramp; a negative one favours tokens that did not move")
    ramp_steps: float = Field(100.0, gt=0, description="steps from the end of the warm-up to full sharpness")


class Rsi(_Interval):
    kind: Literal["rsi"] = "rsi"
    low: float = Field(description="lower bound of 1 + logprob / entropy; try -2")
    high: float = Field(description="upper bound of 1 + logprob / entropy; try 0.9")


class Stare(WeightingConfig):
    kind: Literal["stare"] = "stare"
    share: float = Field(0.1, gt=0, le=1, description="share of the tokens with a positive advantage that are boosted")
    boost: float = Field(1.1, gt=0, description="weight of the most surprising tokens")
    target_entropy: float = Field(0.3, gt=0, description="tokens are boosted while mean entropy is below this, nats")


class AdvantageReweight(WeightingConfig):
    kind: Literal["advantage_reweight"] = "advantage_reweight"
    alpha: float = Field(0.3, ge=0, le=1, description="share of the probability in the weight: alpha p + 1 - alpha")


class EntropyBudget(Budget):
    kind: Literal["entropy_budget"] = "entropy_budget"


class IctBudget(Budget):
    kind: Literal["ict_budget"] = "ict_budget"


class IctSoftBudget(Budget):
    kind: Literal["ict_soft_budget"] = "ict_soft_budget"


class RandomBudget(Budget):
    kind: Literal["random_budget"] = "random_budget"


class Opefo(_OverAllTokens):
    kind: Literal["opefo"] = "opefo"


class ClipCov(_Interval):
    kind: Literal["clip_cov"] = "clip_cov"
    share: float = Field(0.0002, gt=0, le=1, description="share of the batch's tokens that are held back")
    low: float = Field(1.0, description="lower bound of the covariance")
    high: float = Field(5.0, description="upper bound of the covariance")


class KlCov(WeightingConfig):
    kind: Literal["kl_cov"] = "kl_cov"
    share: float = Field(0.0002, gt=0, le=1, description="share of the batch's tokens that are held back")
    penalty: float = Field(1.0, ge=0, description="coefficient of |log-ratio|")


class Attention(WeightingConfig):
    kind: Literal["attention"] = "attention"


Weighting = Annotated[
    Uniform | Ict | IctFrequent | Random | IctUndecided | RandomUndecided | TopEntropy | Stapo | IctSoft | Divergence
    | Rsi | Stare | AdvantageReweight | EntropyBudget | IctBudget | IctSoftBudget | RandomBudget | Opefo | ClipCov
    | KlCov | Attention,
    Field(discriminator="kind"),
]  # fmt: skip
WEIGHTINGS: dict[str, type[WeightingConfig]] = {
    get_args(model.model_fields["kind"].annotation)[0]: model for model in get_args(get_args(Weighting)[0])
}
OFF_POLICY = {"divergence", "kl_cov"}  # weightings that do nothing while the policy is still the one that sampled


def make_weighting(settings: Mapping[str, Any]) -> WeightingConfig:
    """The settings of one weighting, `kind` among them (ict if it is left out).

    Raises ConfigError, which names the nearest kind, the kinds that have a parameter, or what a kind requires.
    """
    kind = settings.get("kind", DEFAULT_KIND)
    if not isinstance(kind, str) or kind not in WEIGHTINGS:
        raise ConfigError(
            f"Unknown weighting {kind!r}.{nearest(str(kind), WEIGHTINGS)} Known: {', '.join(WEIGHTINGS)}."
        )
    fields = WEIGHTINGS[kind].model_fields
    for name, value in settings.items():
        kinds = [other for other, model in WEIGHTINGS.items() if name in model.model_fields]
        if name not in fields and kinds:
            raise ConfigError(
                f"weighting.{name} is {value}, but weighting.kind is {kind!r}, which does not use it. Leave it out, or "
                f"choose {' or '.join(kinds)}."
            )
    missing = [name for name, field in fields.items() if field.is_required() and name not in settings]
    if missing:
        raise ConfigError(
            f"weighting.kind {kind!r} needs {' and '.join(f'weighting.{name}' for name in missing)}: there is no "
            "default that fits every model. For rsi try -2 and 0.9, and look at selected_share."
        )
    return WEIGHTINGS[kind](**settings)


def changed_weighting(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Settings `old` (say, of a file) overridden by those of `new` (say, options of the command line).

    Where `new` chooses another kind, only the old parameters that the new kind has too are kept: a file's `keep`
    serves ict and random alike, and is dropped for uniform.
    """
    kind = new.get("kind", old.get("kind", DEFAULT_KIND))
    if kind != old.get("kind", DEFAULT_KIND) and kind in WEIGHTINGS:
        old = {name: value for name, value in old.items() if name in WEIGHTINGS[kind].model_fields}
    return {**old, **new, "kind": kind}


def weightings_help() -> str:
    """A line for each kind: its parameters with their defaults, for --help."""
    lines = []
    for kind, model in WEIGHTINGS.items():
        own = {name: field for name, field in model.model_fields.items() if name not in WeightingConfig.model_fields}
        named = [name if field.is_required() else f"{name}={field.default}" for name, field in own.items()]
        lines.append(f"- {kind}: {', '.join(named) or 'none'}")
    return "\n".join(lines)
