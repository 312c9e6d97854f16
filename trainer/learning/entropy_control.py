"""Keeps the policy's entropy near a target by changing, after each step, the bonus, the temperature or the budget.

The sampler, the signals, the weights and the loss of a step all read from one object, and `observe` changes its values
only between steps. So the parts of a step cannot disagree.
"""

from __future__ import annotations

import math
from typing import Any

from trainer.config import Budget, TrainConfig, WeightingConfig

DAMPING = 5.0  # change of the budget's share for each 100 % by which the distance from the target changes


class EntropyControl:
    """Control of the mean token entropy H (nats) towards loss.entropy_target; constant without a target.

    After each step, with H the step's entropy as recorded:
        coefficient: c <- clip(c + entropy_step * (+1 if H <= target else -1), 0, entropy_coef_max); the bonus of the
            next step is c if H <= target else 0. Source: Skywork-OR1, arXiv 2505.22312; TRL's use_adaptive_entropy.
        temperature: ln tau <- ln tau + temperature_step * clip((target - H) / target, -1, 1), tau kept between
            temperature_min and temperature_max. Source: none, this law is ours. H is the entropy at tau, so a falling
            entropy of the model itself shows as a rising tau: read the two together.
        budget: s <- clip(s + budget_step e + 5 (e - previous e), budget_min, budget_max), s the weighting's share and
            e = clip((H - target) / target, -1, 1). Source: none, this law is ours: a proportional-integral one, since H
            itself sums up the shares and an integral alone would make it swing. s moves in the weighting's warm-up too.
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
        self.share = config.weighting.share if isinstance(config.weighting, Budget) else None

    @property
    def coefficient(self) -> float:
        """The entropy_coef of the coming step."""
        target = self._loss.entropy_target
        if target is None or self._loss.entropy_actuator != "coefficient":
            return self._coefficient
        return self._coefficient if self._entropy is not None and self._entropy <= target else 0.0

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
            self.share = config.weighting.share if isinstance(config.weighting, Budget) else None
        self._loss, self._given, self._weighting = loss, given, config.weighting

    def observe(self, entropy: float) -> None:
        """Takes a finished step's mean token entropy and sets the next step's values."""
        loss, target = self._loss, self._loss.entropy_target
        if target is None or not math.isfinite(entropy):
            return
        previous, self._entropy = self._entropy, entropy
        if loss.entropy_actuator == "coefficient":
            change = loss.entropy_step if entropy <= target else -loss.entropy_step
            self._coefficient = min(max(self._coefficient + change, 0.0), loss.entropy_coef_max)
        elif loss.entropy_actuator == "temperature":
            tau = self.temperature * math.exp(-loss.temperature_step * _distance(entropy, target))
            self.temperature = min(max(tau, loss.temperature_min), loss.temperature_max)
        elif self.share is not None:
            error = _distance(entropy, target)
            change = 0.0 if previous is None else error - _distance(previous, target)
            share = self.share + loss.budget_step * error + DAMPING * change
            self.share = min(max(share, loss.budget_min), loss.budget_max)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes between steps, as JSON values."""
        return {
            "coefficient": self._coefficient,
            "entropy": self._entropy,
            "temperature": self.temperature,
            "share": self.share,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`. Raises KeyError if a value is missing; older states may lack the share."""
        self._coefficient, self._entropy, self.temperature, self.share = (
            state["coefficient"], state["entropy"], state["temperature"], state.get("share", self.share)
        )  # fmt: skip


def _distance(entropy: float, target: float) -> float:
    """(H - target) / target in [-1, 1]."""
    return min(max((entropy - target) / target, -1.0), 1.0)
