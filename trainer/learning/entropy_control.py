"""Keeps the policy's entropy near a target by changing, after each step, the bonus, the temperature or the budget.

The sampler, the signals, the weights and the loss of a step all read from one object, and `observe` changes its values
only between steps. So the parts of a step cannot disagree.
"""

from __future__ import annotations

import math
from typing import Any

from trainer.config import Budget, TrainConfig, WeightingConfig

GAIN = 5.0  # of a budget: what 100 % of distance from the target adds to the share


class EntropyControl:
    """Control of the mean token entropy H (nats) towards loss.entropy_target; constant without a target.

    After each step, with H the step's entropy as recorded:
        coefficient: c <- clip(c + entropy_step * (+1 if H <= target else -1), 0, entropy_coef_max); the bonus of the
            next step is c if H <= target else 0. Source: Skywork-OR1, arXiv 2505.22312; TRL's use_adaptive_entropy.
        temperature: ln tau <- ln tau + temperature_step * clip((target - H) / target, -1, 1), tau kept between
            temperature_min and temperature_max. Source: none, this law is ours. H is the entropy at tau, so a falling
            entropy of the model itself shows as a rising tau: read the two together.
        budget: with e = clip((H - target) / target, -1, 1), i <- i + budget_step e where i + 5 e is within the bounds,
            then the share is clip(i + 5 e, budget_min, budget_max). i starts at weighting.share, the first step's.
            Source: none, this law is ours. It is a proportional-integral one, since H itself sums up the shares, and an
            integral alone would make it swing. The share moves in the weighting's warm-up too.
    The control is deterministic, and a non-finite H changes nothing. With several ranks, every rank must `observe` the
    mean over all ranks.
    Example, target 0.3, entropy_step 5e-3, first H 0.25: `coefficient` is 5e-3 in the second step.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._loss, self._given = config.loss, config.rollout.temperature
        self._coefficient = config.loss.entropy_coef
        self._entropy: float | None = None  # the last step's
        self.temperature = config.rollout.temperature
        self._weighting = config.weighting
        self._integral = config.weighting.share if isinstance(config.weighting, Budget) else None

    @property
    def coefficient(self) -> float:
        """The entropy_coef of the coming step."""
        target = self._loss.entropy_target
        if target is None or self._loss.entropy_actuator != "coefficient":
            return self._coefficient
        return self._coefficient if self._entropy is not None and self._entropy <= target else 0.0

    @property
    def share(self) -> float | None:
        """The share of the coming step's budget; None for a weighting without one."""
        loss, target = self._loss, self._loss.entropy_target
        if target is None or loss.entropy_actuator != "budget" or self._integral is None or self._entropy is None:
            return self._integral
        share = self._integral + GAIN * _distance(self._entropy, target)
        return min(max(share, loss.budget_min), loss.budget_max)

    @property
    def weighting(self) -> WeightingConfig:
        """The weighting of the coming step: the configured one, a budget with its share as it is now."""
        return self._weighting if self.share is None else self._weighting.model_copy(update={"share": self.share})

    def change(self, config: TrainConfig) -> None:
        """Takes other settings. What the control has moved stays where it is, unless the settings change that value."""
        loss, before, given = config.loss, self._loss, config.rollout.temperature
        if (loss.entropy_target, loss.entropy_coef) != (before.entropy_target, before.entropy_coef):
            self._coefficient = loss.entropy_coef
        if given != self._given:
            self.temperature = given
        if config.weighting != self._weighting:
            self._integral = config.weighting.share if isinstance(config.weighting, Budget) else None
        self._loss, self._given, self._weighting = loss, given, config.weighting

    def observe(self, entropy: float) -> None:
        """Takes a finished step's mean token entropy and sets the next step's values."""
        loss, target = self._loss, self._loss.entropy_target
        if target is None or not math.isfinite(entropy):
            return
        self._entropy = entropy
        if loss.entropy_actuator == "coefficient":
            change = loss.entropy_step if entropy <= target else -loss.entropy_step
            self._coefficient = min(max(self._coefficient + change, 0.0), loss.entropy_coef_max)
        elif loss.entropy_actuator == "temperature":
            tau = self.temperature * math.exp(-loss.temperature_step * _distance(entropy, target))
            self.temperature = min(max(tau, loss.temperature_min), loss.temperature_max)
        elif self.share is not None and self._integral is not None and loss.budget_min < self.share < loss.budget_max:
            self._integral += loss.budget_step * _distance(entropy, target)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes between steps, as JSON values."""
        return {
            "coefficient": self._coefficient,
            "entropy": self._entropy,
            "temperature": self.temperature,
            "budget": self._integral,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`. Raises KeyError if a value is missing; older states may lack the budget."""
        self._coefficient, self._entropy, self.temperature, self._integral = (
            state["coefficient"], state["entropy"], state["temperature"], state.get("budget", self._integral)
        )  # fmt: skip
        if not isinstance(self._weighting, Budget):  # an action goes back to before it changed the weighting
            self._integral = None


def _distance(entropy: float, target: float) -> float:
    """(H - target) / target in [-1, 1]."""
    return min(max((entropy - target) / target, -1.0), 1.0)
