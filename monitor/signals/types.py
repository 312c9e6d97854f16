"""TokenSignals: what one call of `token_signals` returns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TokenSignals:
    """Per-token signals of a batch of rollouts; nats; 0 where the mask is False.

    logprob, entropy, renyi2, deviation: float32 [N, T].
    alive: int32 [N, T], rollouts of the group with a response token at this position, the row itself included.
    sum_p3 = sum_v p^3 and sum_p2_logp = sum_v p^2 ln p: the moments that `entropy_change` needs, float32 [N, T], or
    None if they were not asked for.
    """

    logprob: Tensor
    entropy: Tensor
    renyi2: Tensor
    deviation: Tensor
    alive: Tensor
    sum_p3: Tensor | None = None
    sum_p2_logp: Tensor | None = None

    @classmethod
    def concat(cls, parts: list[TokenSignals], dim: int) -> TokenSignals:
        """Joins position slabs (dim=1) or groups of rows (dim=0)."""
        columns = [[getattr(part, spec.name) for part in parts] for spec in fields(cls)]
        joined: list[Any] = [None if column[0] is None else torch.cat(column, dim=dim) for column in columns]
        return cls(*joined)

    def rows(self, start: int, stop: int) -> TokenSignals:
        columns = [getattr(self, spec.name) for spec in fields(self)]
        kept: list[Any] = [None if column is None else column[start:stop] for column in columns]
        return TokenSignals(*kept)
