"""Token signals from hidden states: the head runs on one slab of positions at a time, so logits never exist whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from monitor.signals.definition import Reference
from monitor.signals.dispatch import token_signals
from monitor.signals.types import TokenSignals

SLAB_ELEMENTS, CUDA_SLAB_ELEMENTS = 1 << 24, 1 << 28  # logits in one slab, as in trainer/policy/policy.py


@torch.no_grad()
def slab_signals(
    hidden: Tensor,
    project: Callable[[Tensor], Tensor],
    most: int,
    token_ids: Tensor,
    mask: Tensor,
    group_ids: Tensor,
    *,
    temperature: float = 1.0,
    reference: Reference = "group",
) -> TokenSignals:
    """`token_signals` with moments of logits that `project` makes from hidden states.

    hidden: float [N, T, D]; those at [:, t] predict response position t. project: [N, span, D] -> logits [N, span, V].
    most: logits exist for at most this many positions of all rows together, but for one position of each row at least.
    token_ids int [N, T], mask bool [N, T], group_ids int [N] on the host: as for `token_signals`.
    """
    span = max(1, most // len(hidden))
    parts = [
        token_signals(
            project(hidden[:, start : start + span]),
            token_ids[:, start : start + span],
            mask[:, start : start + span],
            group_ids,
            temperature=temperature,
            reference=reference,
            moments=True,
        )
        for start in range(0, hidden.shape[1], span)
    ]
    return TokenSignals.concat(parts, dim=1)
