"""The weightings' names, parameters and defaults; the functions are in trainer/learning/weightings. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from monitor.errors import nearest
from trainer.config.base import SettingsGroup

# name -> its parameters with their defaults (None: required)
WEIGHTINGS: dict[str, dict[str, float | None]] = {
    "uniform": {},
    "ict": {"keep": 0.1},
    "ict_frequent": {"keep": 0.9},
    "random": {"keep": 0.1},
    "top_entropy": {"keep": 0.2},
    "stapo": {"max_probability": 0.002, "entropy_quantile": 0.8},
    "ict_soft": {},
    "divergence": {"strength": 0.3, "sharpness": 50.0, "ramp_steps": 100.0},
    "rsi": {"low": None, "high": None},
    "stare": {"share": 0.1, "boost": 1.1, "target_entropy": 0.3},
    "advantage_reweight": {"alpha": 0.3},
    "clip_cov": {"share": 0.0002, "low": 1.0, "high": 5.0},
    "kl_cov": {"share": 0.0002, "penalty": 1.0},
    "attention": {},
}
OFF_POLICY = {"divergence", "kl_cov"}  # weightings that do nothing while the policy is still the one that sampled


class WeightingConfig(SettingsGroup):
    kind: str = Field("ict", description=f"which tokens the update uses: {', '.join(WEIGHTINGS)}")
    keep: float | None = Field(
        None, description="share of a response's tokens kept, in (0, 1]; none: the kind's default; kinds that keep no "
        "share pass it over, so that one file serves all arms"
    )  # fmt: skip
    share: float | None = Field(
        None, gt=0, le=1, description="share of the batch's tokens that are boosted (stare: 0.1) or held back "
        "(clip_cov, kl_cov: 2e-4)"
    )  # fmt: skip
    low: float | None = Field(None, description="lower bound of RSI (rsi: required) or covariance (clip_cov: 1)")
    high: float | None = Field(None, description="upper bound of RSI (rsi: required) or covariance (clip_cov: 5)")
    max_probability: float | None = Field(None, gt=0, le=1, description="stapo: only rarer tokens are silenced (0.002)")
    entropy_quantile: float | None = Field(
        None, gt=0, le=1, description="stapo: only tokens of lower entropy are silenced (0.8)"
    )
    boost: float | None = Field(None, gt=0, description="stare: weight of the most surprising tokens (1.1)")
    target_entropy: float | None = Field(None, gt=0, description="stare: it acts below this mean entropy, nats (0.3)")
    alpha: float | None = Field(None, ge=0, le=1, description="advantage_reweight: how much probability counts (0.3)")
    strength: float | None = Field(None, gt=0, lt=2, description="divergence: range of the weights (0.3)")
    sharpness: float | None = Field(
        None, description="divergence: alpha after the ramp; below 0 it favours tokens that did not move (50)"
    )
    ramp_steps: float | None = Field(None, gt=0, description="divergence: steps from warm-up to full sharpness (100)")
    penalty: float | None = Field(None, ge=0, description="kl_cov: coefficient of |log-ratio| (1)")
    warmup_steps: int = Field(20, ge=0, description="steps before the weighting acts: until then every weight is 1")
    normalise: Literal["selected", "all"] = Field(
        "selected", description="denominators count the weights (as ICT does) or all tokens"
    )

    @model_validator(mode="after")
    def _known(self) -> WeightingConfig:
        if self.kind not in WEIGHTINGS:
            raise ValueError(
                f"Unknown weighting {self.kind!r}.{nearest(self.kind, WEIGHTINGS)} Known: {', '.join(WEIGHTINGS)}."
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(
                f"weighting.keep is {self.keep}, expected a share in (0, 1], e.g. 0.1 for a tenth of the tokens."
            )
        self._check_parameters()
        return self

    def _check_parameters(self) -> None:
        used = WEIGHTINGS[self.kind]
        for name in sorted({name for names in WEIGHTINGS.values() for name in names} - used.keys() - {"keep"}):
            if (value := getattr(self, name)) is not None:
                kinds = [kind for kind, names in WEIGHTINGS.items() if name in names]
                raise ValueError(
                    f"weighting.{name} is {value}, but weighting.kind is {self.kind!r}, which does not use it. Leave "
                    f"it out, or choose {' or '.join(kinds)}."
                )
        if missing := [name for name in used if used[name] is None and getattr(self, name) is None]:
            raise ValueError(
                f"weighting.kind {self.kind!r} needs {' and '.join(f'weighting.{name}' for name in missing)}: there is "
                "no default that fits every model. For rsi try -2 and 0.9, and look at selected_share."
            )
        if "low" in used and not (bounds := self.parameters)["low"] < bounds["high"]:
            raise ValueError(f"weighting.low is {bounds['low']}, expected less than weighting.high, {bounds['high']}.")

    @property
    def parameters(self) -> dict[str, float]:
        """The chosen kind's parameters: what was set, else its defaults."""
        chosen = WEIGHTINGS[self.kind] | {
            name: value for name in WEIGHTINGS[self.kind] if (value := getattr(self, name)) is not None
        }
        return {name: value for name, value in chosen.items() if value is not None}
