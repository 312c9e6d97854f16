"""Rewards to group-relative advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from monitor.signals.outcomes import equal_rewards, group_index

EPSILON = 1e-4  # added to the standard deviation, as in TRL


def group_advantages(rewards: Tensor, group_ids: Tensor, *, scale_by_std: bool = True) -> Tensor:
    """A_i = (r_i - mean_group(r)) / (std_group(r) + 1e-4); without the division if scale_by_std is False.

    rewards float [N], group_ids int [N] -> float32 [N], without unit. The standard deviation divides by n - 1, as in
    TRL. A group of equal rewards gets exactly 0. Source: GRPO, arXiv 2402.03300.
    """
    index, n_groups = group_index(group_ids, rewards)
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
    index, n_groups = group_index(group_ids, rewards)
    return equal_rewards(rewards, index, n_groups)[index]
