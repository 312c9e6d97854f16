"""What a step's rollouts turned out to be: rewards, groups that teach nothing, variety and repetition."""

from __future__ import annotations

import torch
from torch import Tensor


def outcome_scalars(
    *,
    rewards: Tensor | None = None,
    correct: Tensor | None = None,
    truncated: Tensor | None = None,
    lengths: Tensor | None = None,
    repetition: Tensor | None = None,
    same_text: Tensor | None = None,
    group_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """Scalars of METRICS over a step's rollouts, 0-d: those that the given columns tell.

    All arguments [N], numbers of any dtype. lengths: response tokens. repetition and same_text: those of
    `monitor.signals.completions`. Figures of groups need group_ids; groups may have different sizes.
    """
    found: dict[str, Tensor] = {}
    if rewards is not None:
        found["reward"] = rewards.mean()
        if len(rewards) > 1:
            found["reward_std"] = rewards.std()
    if rewards is not None and group_ids is not None:
        found["zero_variance_share"] = zero_variance_share(rewards, group_ids)
    if correct is not None:
        found["correct_share"] = correct.float().mean()
    if correct is not None and group_ids is not None:
        found["all_correct_share"], found["all_wrong_share"] = equal_group_shares(correct > 0, group_ids)
    for key, column in (
        ("response_length", lengths), ("truncated_share", truncated), ("repetition_share", repetition),
    ):  # fmt: skip
        if column is not None:
            found[key] = column.float().mean()
    if same_text is not None and group_ids is not None:
        found["duplicate_share"] = duplicate_share(same_text, group_ids)
    return found


def duplicate_share(same_text: Tensor, group_ids: Tensor) -> Tensor:
    """Chance that two rollouts of a group are equal, 0-d: equal pairs / pairs; 0 where no group has two.

    same_text [N]: of each rollout how many others of its group equal it. Example: groups of 3 and 2 with counts
    1 1 0 and 0 0: 2 of 3 x 2 + 2 x 1 ordered pairs, 0.25.
    """
    index, n_groups = group_index(group_ids, same_text)
    ones = torch.ones_like(same_text, dtype=torch.float32)
    sizes = ones.new_zeros(n_groups).index_add(0, index, ones)
    return same_text.float().sum() / (sizes * (sizes - 1)).sum().clamp(min=1)


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
