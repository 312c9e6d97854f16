"""Keeps the policy's entropy near a target by changing, after each step, the entropy bonus or the sampling temperature.

The sampler, the signals and the loss of a step all read `temperature` and `coefficient` from one object, and `observe`
changes them only between steps. So the parts of a step cannot disagree.
"""

from __future__ import annotations

import math
from typing import Any

from trainer.config import TrainConfig


class EntropyControl:
    """Integral control of the mean token entropy H (nats) towards loss.entropy_target; constant without a target.

    After each step, with H the step's entropy as recorded:
        coefficient: c <- clip(c + entropy_step * (+1 if H <= target else -1), 0, entropy_coef_max); the bonus of the
            next step is c if H <= target else 0. Source: Skywork-OR1, arXiv 2505.22312; TRL's use_adaptive_entropy.
        temperature: ln tau <- ln tau + temperature_step * clip((target - H) / target, -1, 1), tau kept between
            temperature_min and temperature_max. Source: none, this law is ours. H is the entropy at tau, so a falling
            entropy of the model itself shows as a rising tau: read the two together.
    The control is deterministic, and a non-finite H changes nothing. With several ranks, every rank must `observe` the
    mean over all ranks.
    Example, target 0.3, entropy_step 5e-3, first H 0.25: `coefficient` is 5e-3 in the second step.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._loss, self._given = config.loss, config.rollout.temperature
        self._coefficient = config.loss.entropy_coef
        self._entropy: float | None = None  # the last step's
        self.temperature = config.rollout.temperature

    @property
    def coefficient(self) -> float:
        """The entropy_coef of the coming step."""
        target = self._loss.entropy_target
        if target is None or self._loss.entropy_actuator == "temperature":
            return self._coefficient
        return self._coefficient if self._entropy is not None and self._entropy <= target else 0.0

    def change(self, config: TrainConfig) -> None:
        """Takes other settings. A temperature or coefficient that the settings leave as it was stays as it is now."""
        loss, before, given = config.loss, self._loss, config.rollout.temperature
        if (loss.entropy_target, loss.entropy_coef) != (before.entropy_target, before.entropy_coef):
            self._coefficient = loss.entropy_coef
        if given != self._given:
            self.temperature = given
        self._loss, self._given = loss, given

    def observe(self, entropy: float) -> None:
        """Takes a finished step's mean token entropy and sets the next step's values."""
        loss, target = self._loss, self._loss.entropy_target
        if target is None or not math.isfinite(entropy):
            return
        self._entropy = entropy
        if loss.entropy_actuator == "coefficient":
            change = loss.entropy_step if entropy <= target else -loss.entropy_step
            self._coefficient = min(max(self._coefficient + change, 0.0), loss.entropy_coef_max)
        else:
            error = min(max((target - entropy) / target, -1.0), 1.0)
            tau = self.temperature * math.exp(loss.temperature_step * error)
            self.temperature = min(max(tau, loss.temperature_min), loss.temperature_max)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes between steps, as JSON values."""
        return {"coefficient": self._coefficient, "entropy": self._entropy, "temperature": self.temperature}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`. Raises KeyError if a value is missing."""
        self._coefficient, self._entropy, self.temperature = (
            state["coefficient"], state["entropy"], state["temperature"]
        )  # fmt: skip
