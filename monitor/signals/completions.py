"""Variety and repetition of a step's completions, computed from their tokens on the device, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

NGRAM = 4
_FACTOR = 6364136223846793005  # odd, of a 64-bit linear congruential generator: int64 products wrap around


def repetition(token_ids: Tensor, mask: Tensor, n: int = NGRAM) -> Tensor:
    """Share of each response's n-grams that occurred earlier in it; 0 for responses of fewer than n + 1 tokens.

    token_ids int [N, T], mask bool [N, T] (a prefix of each row) -> float32 [N] in [0, 1). n-grams are compared by a
    64-bit hash. Example, n = 2: tokens 1 2 1 2 1 have the n-grams 12 21 12 21, two of which occurred before: 0.5.
    """
    runs = token_ids.shape[1] - n + 1
    if runs < 1:
        return torch.zeros(len(token_ids), device=token_ids.device)
    ids = token_ids.long() + 1
    hashed = torch.zeros_like(ids[:, :runs])
    for offset in range(n):
        hashed = hashed * _FACTOR + ids[:, offset : offset + runs]
    whole = mask[:, n - 1 :]
    places = torch.arange(runs, device=ids.device).expand_as(hashed)
    # sorted by hash; runs that reach beyond the response get keys of their own and are not counted
    order = torch.where(whole, hashed, -places - 1).sort(dim=1)
    repeated = (order.values[:, 1:] == order.values[:, :-1]) & whole.gather(1, order.indices)[:, 1:]
    return repeated.sum(1).float() / whole.sum(1).clamp(min=1)


def same_text(token_ids: Tensor, mask: Tensor, group_ids: Tensor) -> Tensor:
    """For each response, how many others of its group equal it token by token: float32 [N].

    token_ids int [N, T], mask bool [N, T], group_ids int [N] (on the host or the device). Texts are compared by a
    64-bit hash. Example: three responses of a group, two of them equal: 1, 1, 0.
    """
    ids = torch.where(mask, token_ids.long() + 1, 0)
    factors = torch.arange(1, ids.shape[1] + 1, device=ids.device) * _FACTOR
    factors = (factors ^ (factors >> 29)) * _FACTOR | 1
    key = (ids * factors).sum(1) + group_ids.to(ids.device).long() * _FACTOR
    ordered = key.sort().values
    last, first = (torch.searchsorted(ordered, key, right=side) for side in (True, False))
    return (last - first - 1).float()
