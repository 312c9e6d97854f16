"""What a step's rollouts turned out to be: rewards, groups that teach nothing, variety and repetition."""

from __future__ import annotations

import torch
from torch import Tensor


def outcome_scalars(
    rewards: Tensor,
    correct: Tensor,
    truncated: Tensor,
    lengths: Tensor,
    repetition: Tensor,
    same_text: Tensor,
    group_ids: Tensor,
    group_size: int,
) -> dict[str, Tensor]:
    """Scalars of METRICS over a step's rollouts, 0-d. All arguments [N], numbers of any dtype; groups of equal size.

    lengths: response tokens. repetition and same_text: those of `monitor.signals.completions`.
    """
    all_correct, all_wrong = equal_group_shares(correct > 0, group_ids)
    return {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "correct_share": correct.float().mean(),
        "zero_variance_share": zero_variance_share(rewards, group_ids),
        "all_correct_share": all_correct,
        "all_wrong_share": all_wrong,
        "response_length": lengths.float().mean(),
        "truncated_share": truncated.float().mean(),
        "repetition_share": repetition.mean(),
        "duplicate_share": same_text.mean() / (group_size - 1),
    }


def zero_variance_share(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Share of groups whose rewards are all equal, 0-d float32. Such groups give no gradient."""
    return equal_rewards(rewards, *group_index(group_ids, rewards)).float().mean()


def equal_group_shares(correct: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(share of groups that are all correct, share that are all wrong), 0-d float32; correct bool [N].

    Neither kind teaches anything: the prompts of the first are too easy, those of the second too hard.
    """
    index, n_groups = group_index(group_ids, correct)
    right = correct.float().new_zeros(n_groups).index_add(0, index, correct.float())
    size = right.new_zeros(n_groups).index_add(0, index, torch.ones_like(correct, dtype=right.dtype))
    return (right == size).float().mean(), (right == 0).float().mean()


def group_index(group_ids: Tensor, like: Tensor) -> tuple[Tensor, int]:
    """(index int64 [N] in 0..groups - 1 on the device of `like`, number of groups). Ids on the host avoid a sync."""
    groups, index = torch.unique(group_ids, return_inverse=True)
    return index.to(like.device), len(groups)


def equal_rewards(rewards: Tensor, index: Tensor, n_groups: int) -> Tensor:
    """Which groups have equal rewards, bool [n_groups]; index int [N] in 0..n_groups - 1."""
    lowest = rewards.new_full((n_groups,), torch.inf).scatter_reduce_(0, index, rewards, "amin")
    highest = rewards.new_full((n_groups,), -torch.inf).scatter_reduce_(0, index, rewards, "amax")
    return lowest == highest
