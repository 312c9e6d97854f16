"""TokenSignals: what one call of `token_signals` returns."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TokenSignals:
    """Per-token signals of a batch of rollouts; nats; 0 where the mask is False.

    logprob, entropy, renyi2, deviation: float32 [N, T]; alive: int32 [N, T], rollouts of the group that have a
    response token at this position (the row itself included).
    """

    logprob: Tensor
    entropy: Tensor
    renyi2: Tensor
    deviation: Tensor
    alive: Tensor

    @classmethod
    def concat(cls, parts: list[TokenSignals], dim: int) -> TokenSignals:
        """Joins position slabs (dim=1) or groups of rows (dim=0)."""
        return cls(*(torch.cat([getattr(part, spec.name) for part in parts], dim=dim) for spec in fields(cls)))
