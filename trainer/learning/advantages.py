"""Rewards to group-relative advantages."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4  # added to the standard deviation, as in TRL


def group_advantages(rewards: Tensor, group_ids: Tensor, *, scale_by_std: bool = True) -> Tensor:
    """A_i = (r_i - mean_group(r)) / (std_group(r) + 1e-4); without the division if scale_by_std is False.

    rewards float [N], group_ids int [N] -> float32 [N], without unit. The standard deviation divides by n - 1, as in
    TRL. A group of equal rewards gets exactly 0. Source: GRPO, arXiv 2402.03300.
    """
    index, n_groups = _index(group_ids, rewards)
    rewards = rewards.double()
    zeros = rewards.new_zeros(n_groups)
    count = zeros.index_add(0, index, torch.ones_like(rewards))
    mean = zeros.index_add(0, index, rewards) / count
    centred = rewards - mean[index]
    if not scale_by_std:
        return centred.float()
    variance = zeros.index_add(0, index, centred**2) / (count - 1).clamp(min=1)
    return (centred / (variance.sqrt()[index] + EPSILON)).float()


def zero_variance(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Which rollouts belong to a group of equal rewards: rewards float [N], group_ids int [N] -> bool [N].

    Their advantages are 0. Source: dynamic sampling of DAPO, arXiv 2503.14476; DAPO draws new groups in their place.
    """
    index, n_groups = _index(group_ids, rewards)
    return _equal_rewards(rewards, index, n_groups)[index]


def zero_variance_share(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Share of groups whose rewards are all equal, 0-d float32. Such groups give no gradient."""
    return _equal_rewards(rewards, *_index(group_ids, rewards)).float().mean()


def equal_group_shares(correct: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(share of groups that are all correct, share that are all wrong), 0-d float32; correct bool [N].

    Neither kind teaches anything: the prompts of the first are too easy, those of the second too hard.
    """
    index, n_groups = _index(group_ids, correct)
    right = correct.float().new_zeros(n_groups).index_add(0, index, correct.float())
    size = right.new_zeros(n_groups).index_add(0, index, torch.ones_like(correct, dtype=right.dtype))
    return (right == size).float().mean(), (right == 0).float().mean()


def _index(group_ids: Tensor, rewards: Tensor) -> tuple[Tensor, int]:
    """(index int64 [N] in 0..groups - 1 on the rewards' device, number of groups). Ids on the host avoid a sync."""
    groups, index = torch.unique(group_ids, return_inverse=True)
    return index.to(rewards.device), len(groups)


def _equal_rewards(rewards: Tensor, index: Tensor, n_groups: int) -> Tensor:
    """Which groups have equal rewards, bool [n_groups]; index int [N] in 0..n_groups - 1."""
    lowest = rewards.new_full((n_groups,), torch.inf).scatter_reduce_(0, index, rewards, "amin")
    highest = rewards.new_full((n_groups,), -torch.inf).scatter_reduce_(0, index, rewards, "amax")
    return lowest == highest
