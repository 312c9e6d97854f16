"""Weightings: from the old policy's signals to one weight per response token, detached, once per rollout batch.

To add one: a function here, its row in `WEIGHT_FUNCTIONS`, its name and default share in `config.WEIGHTINGS`, and a
known-answer test.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from monitor.signals import TokenSignals
from trainer.config import WeightingConfig

WeightFunction = Callable[[TokenSignals, Tensor, float, torch.Generator], Tensor]


def _kept_per_row(mask: Tensor, keep: float) -> Tensor:
    """ceil(keep * T_i), int64 [N]; the product is taken in float64 and 1e-9 forgives 0.1 * 30 = 3.0000000000000004."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}, expected a share in (0, 1], e.g. 0.1 for a tenth of the tokens.")
    return torch.ceil(mask.sum(1).double() * keep - 1e-9).long()


def _top_per_row(score: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """float32 [N, T]: 1 on the `count[i]` highest scores of row i by rank, ties to the earlier position."""
    order = torch.where(mask, score.float(), -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(mask.shape[1], device=mask.device).expand_as(order))
    return ((rank < count.unsqueeze(1)) & mask).float()


def ict_weights(deviation: Tensor, mask: Tensor, *, keep: float = 0.10) -> Tensor:
    """ICT: the `keep` share of each response's tokens that deviate most from their group.

    w_it = 1 if token t is among the ceil(keep * T_i) largest deviations of response i, else 0; chosen by rank, ties
    to the earlier position. A response whose deviations are all 0 keeps weight 1 everywhere.
    deviation float [N, T], mask bool [N, T] -> float32 [N, T], 0 where mask is False.
    Source: arXiv 2606.19771v1, eqs. 10 and 27; ranking in place of their percentile, which keeps all ties at 0.
    """
    chosen = _top_per_row(deviation, mask, _kept_per_row(mask, keep))
    silent = (torch.where(mask, deviation, 0.0) == 0).all(dim=1, keepdim=True)
    return torch.where(silent, mask.float(), chosen)


def uniform(signals: TokenSignals, mask: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """GRPO: every response token counts alike."""
    return mask.float()


def ict(signals: TokenSignals, mask: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """The most deviating `keep` share of each response; see `ict_weights`."""
    return ict_weights(signals.deviation, mask, keep=keep)


def ict_frequent(signals: TokenSignals, mask: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """The complement of ICT: all but the most deviating 1 - `keep` (arXiv 2606.19771v1, Table 2)."""
    if keep >= 1:
        return mask.float()
    dropped = _top_per_row(signals.deviation, mask, _kept_per_row(mask, 1 - keep))
    silent = (torch.where(mask, signals.deviation, 0.0) == 0).all(dim=1, keepdim=True)
    return torch.where(silent, mask.float(), mask.float() - dropped)


def random(signals: TokenSignals, mask: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """A random `keep` share of each response: the control that ICT has to beat."""
    score = torch.rand(mask.shape, generator=generator).to(mask.device)
    return _top_per_row(score, mask, _kept_per_row(mask, keep))


def top_entropy(signals: TokenSignals, mask: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """The `keep` share of highest-entropy tokens of the whole batch (arXiv 2506.01939); ties to the earlier token."""
    flat = mask.reshape(1, -1)
    count = torch.ceil(flat.sum(1).double() * keep - 1e-9).long()
    return _top_per_row(signals.entropy.reshape(1, -1), flat, count).reshape(mask.shape)


WEIGHT_FUNCTIONS: dict[str, WeightFunction] = {
    "uniform": uniform,
    "ict": ict,
    "ict_frequent": ict_frequent,
    "random": random,
    "top_entropy": top_entropy,
}


def token_weights(
    signals: TokenSignals, mask: Tensor, config: WeightingConfig, step: int, generator: torch.Generator
) -> Tensor:
    """The configured weighting, or weight 1 everywhere during the first `warmup_steps`. float32 [N, T].

    `step` counts from 1.
    """
    if step <= config.warmup_steps or math.isclose(config.kept_share, 1.0):
        return mask.float()
    return WEIGHT_FUNCTIONS[config.kind](signals, mask, config.kept_share, generator)
