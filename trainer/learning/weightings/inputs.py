"""What every weighting gets, and the ranks, shares and quantiles that several of them use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from monitor.signals import TokenSignals


def _of_one_rank(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True, eq=False)
class WeightInputs:
    """All that a weighting may look at: N rollouts, T response positions, groups whole and contiguous.

    signals: the old policy's, [N, T]. mask: bool [N, T], tokens that the loss may use. advantages: float [N].
    generator: for random choices, on the CPU. steps_active: steps since the warm-up, 1 in the first weighted step.
    current_logprobs: float [N, T], nats, of the policy about to be updated; given to `divergence` only, else None.
    attention: float [N, T], see `policy.attention.attention_received`; given to `attention` only, else None.
    sum_over_ranks: adds a tensor over the processes of the run, each of which holds N rollouts of its own.
    """

    signals: TokenSignals
    mask: Tensor
    advantages: Tensor
    generator: torch.Generator
    steps_active: int = 1
    current_logprobs: Tensor | None = None
    attention: Tensor | None = None
    sum_over_ranks: Callable[[Tensor], Tensor] = _of_one_rank

    @property
    def positive(self) -> Tensor:
        """bool [N, T]: response tokens of responses with a positive advantage."""
        return self.mask & (self.advantages > 0).unsqueeze(1)

    def undecided(self, min_entropy: float) -> Tensor:
        """bool [N, T]: response tokens of more entropy than `min_entropy`, nats."""
        return self.mask & (self.signals.entropy > min_entropy)

    def rows(self, start: int, stop: int) -> WeightInputs:
        """The inputs of some rows, in whole groups, without `attention` and `current_logprobs`."""
        signals, mask, advantages = self.signals.rows(start, stop), self.mask[start:stop], self.advantages[start:stop]
        return replace(self, signals=signals, mask=mask, advantages=advantages, current_logprobs=None, attention=None)


def kept_per_row(mask: Tensor, keep: float) -> Tensor:
    """ceil(keep * T_i), int64 [N]. The product is float64; taking off 1e-9 undoes 0.07 * 100 = 7.000000000000001."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}, expected a share in (0, 1], e.g. 0.1 for a tenth of the tokens.")
    return torch.ceil(mask.sum(1).double() * keep - 1e-9).long()


def top_per_row(score: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """float32 [N, T]: 1 on the `count[i]` highest scores of row i by rank, ties to the earlier position."""
    order = torch.where(mask, score.float(), -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(mask.shape[1], device=mask.device).expand_as(order))
    return ((rank < count.unsqueeze(1)) & mask).float()


def top_of_batch(score: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """float32 [N, T]: 1 on the `count` (int64 [1]) highest scores of the whole batch, ties to the earlier token."""
    return top_per_row(score.reshape(1, -1), mask.reshape(1, -1), count).reshape(mask.shape)


def random_scores(inputs: WeightInputs) -> Tensor:
    """Uniform random numbers in [0, 1), float32 [N, T], from the inputs' generator: the same on every device."""
    return torch.rand(inputs.mask.shape, generator=inputs.generator).to(inputs.mask.device)


def mean_of_batch(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the masked values, 0-d float32; 0 if there are none."""
    return (torch.where(mask, values, 0.0).double().sum() / mask.sum().clamp(min=1)).float()


def quantile_per_row(values: Tensor, mask: Tensor, q: float) -> Tensor:
    """The q-quantile of each row's masked values, linear between ranks as in numpy; [N, T] -> float32 [N, 1].

    A row without masked values gets +inf. torch.quantile takes no mask and at most 16 million values.
    """
    ordered = torch.where(mask, values.float(), torch.inf).sort(dim=1).values
    rank = q * (mask.sum(1, keepdim=True) - 1).clamp(min=0).double()
    low = rank.floor().long()
    below, above = ordered.gather(1, low), ordered.gather(1, rank.ceil().long())
    return torch.where(below == above, below, below + (rank - low).float() * (above - below))
