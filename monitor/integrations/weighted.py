"""What every trainer's loss needs to count weights where it counts tokens."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from monitor.signals import TokenSignals

TINY = 1e-8  # keeps a response without selected tokens (0 / 0) at 0


class Weighting(Protocol):
    """What trainer.learning.attached gives."""

    text: str
    kind: str
    warmup_steps: int
    normalise: str

    def weights(self, signals: TokenSignals, mask: Tensor, advantages: Tensor, step: int, ranks: Any) -> Tensor: ...

    def settings(self) -> dict[str, Any]: ...


def tokens_by_weight(tokens: Tensor, weight: Tensor) -> Tensor:
    """A count of tokens / the sum of their weights: times it, a mean over tokens becomes one over weights."""
    return tokens / weight.clamp(min=TINY)
