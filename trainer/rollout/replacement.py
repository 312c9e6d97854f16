"""Dynamic sampling: groups that teach nothing give way to groups that do. Source: DAPO, arXiv 2503.14476."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from trainer.flow import Rollouts, Scored

T = TypeVar("T")


def flat_groups(scored: Scored, group_size: int) -> list[bool]:
    """For each group whether its rewards are all equal: its advantages are 0."""
    groups = [scored.rewards[start : start + group_size] for start in range(0, len(scored.rewards), group_size)]
    return [len(set(rewards)) == 1 for rewards in groups]


def with_groups_replaced(
    rollouts: Rollouts, scored: Scored, others: Rollouts, of_others: Scored, group_size: int, pad_id: int
) -> tuple[Rollouts, Scored]:
    """The rollouts with their flat groups replaced by the others' groups that are not flat, in order, while they last.

    Prompts are padded on the left with `pad_id` and responses on the right, to the wider of the two.
    """
    free = [at for at, flat in enumerate(flat_groups(scored, group_size)) if flat]
    fresh = [at for at, flat in enumerate(flat_groups(of_others, group_size)) if not flat]
    source = list(range(len(scored.rewards) // group_size))
    for place, other in zip(free, fresh, strict=False):
        source[place] = len(source) + other
    rows = [group * group_size + i for group in source for i in range(group_size)]

    def chosen(first: Sequence[T], second: Sequence[T]) -> list[T]:
        both = [*first, *second]
        return [both[row] for row in rows]

    joined = Scored(
        chosen(scored.prompts, of_others.prompts),
        chosen(scored.completions, of_others.completions),
        chosen(scored.completion_ids, of_others.completion_ids),
        chosen(scored.rewards, of_others.rewards),
        {name: chosen(scored.given[name], of_others.given[name]) for name in scored.given},
        [*scored.sampled, *of_others.sampled],
        scored.lost + of_others.lost,
    )
    return _rows(rollouts, others, rows, pad_id), joined


def _rows(first: Rollouts, second: Rollouts, rows: list[int], pad_id: int) -> Rollouts:
    """Some rows of two sets of rollouts, numbered through."""
    width = max(one.mask.shape[1] for one in (first, second))
    prompt = max(one.input_ids.shape[1] - one.mask.shape[1] for one in (first, second))
    index = torch.tensor(rows, device=first.mask.device)

    def padded(one: Rollouts, name: str) -> Tensor:
        value: Tensor = getattr(one, name)
        if value.ndim == 1:
            return value
        right = width - one.mask.shape[1]
        has_prompt = name in ("input_ids", "attention_mask")
        left = prompt - (one.input_ids.shape[1] - one.mask.shape[1]) if has_prompt else 0
        return torch.nn.functional.pad(value, (left, right), value=pad_id if name == "input_ids" else 0)

    names = [spec.name for spec in fields(Rollouts)]
    return Rollouts(*(torch.cat([padded(one, name) for one in (first, second)])[index] for name in names))
