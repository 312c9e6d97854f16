"""What a step's rollouts turned out to be, over all ranks, and whether correct ones gave the same answer."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from monitor.signals.completions import repetition, same_text
from monitor.signals.outcomes import outcome_scalars
from trainer.flow import Scored, TokenBatch
from trainer.runtime.ranks import Ranks
from trainer.tasks import Task


def rollout_scalars(batch: TokenBatch, ranks: Ranks) -> dict[str, Tensor]:
    """Scalars of METRICS over the rollouts of all ranks, as 0-d tensors on the device."""
    groups = batch.group_ids.to(batch.rewards) + len(batch) * ranks.rank
    own = {
        "rewards": batch.rewards,
        "correct": batch.correct,
        "truncated": batch.truncated,
        "lengths": batch.mask.sum(1),
        "group_ids": groups,
        "repetition": repetition(batch.token_ids, batch.mask),
        "same_text": same_text(batch.token_ids, batch.mask, batch.group_ids),
    }
    rows = ranks.gather(torch.stack([column.float() for column in own.values()], 1))
    of_all = dict(zip(own, rows.unbind(1), strict=True))
    return outcome_scalars(**of_all)


def function_means(scored: Scored, ranks: Ranks, device: torch.device) -> dict[str, Tensor]:
    """{"reward/<function>": its mean over the rollouts that it applies to, of all ranks}, of several functions."""
    if len(scored.given) < 2:
        return {}
    columns = torch.tensor(
        [[float("nan") if reward is None else reward for reward in column] for column in scored.given.values()]
    )
    everyone = ranks.gather(columns.T.contiguous().to(device))
    return {f"reward/{name}": mean for name, mean in zip(scored.given, everyone.nanmean(0).unbind(), strict=True)}


def sampling_scalars(scored: Scored, ranks: Ranks, device: torch.device) -> dict[str, float | Tensor]:
    """What replacing groups cost: the rounds of sampling, and the mean reward of everything that was sampled."""
    everyone = ranks.gather(torch.tensor(scored.sampled, device=device))
    return {"sampling_rounds": len(scored.sampled) / len(scored.rewards), "reward_sampled": everyone.mean()}


def lost_rewards(scored: Scored, ranks: Ranks, device: torch.device) -> dict[str, Tensor]:
    """The share of rewards that took too long in a worker, of all functions and all sampled rollouts of all ranks."""
    asked = len(scored.sampled) * len(scored.given)
    shares = ranks.gather(torch.tensor([scored.lost / asked], device=device))
    return {"reward_timeout_share": shares.mean()}


def answer_sums(batch: TokenBatch, scored: Scored, task: Task) -> dict[str, Tensor]:
    """How many ordered pairs of correct rollouts the groups have, and how many of these pairs gave the same answer.

    0-d float64 on the host. The result is empty for a task without canonical answers.
    """
    if not task.has_forms:
        return {}
    answers: dict[int, Counter[str]] = {}
    rollouts = zip(batch.group_ids.tolist(), scored.judged, scored.prompts, scored.completions, strict=True)
    for group, reward, prompt, completion in rollouts:  # all on the host: no wait for the device
        answer = task.canonical(prompt, completion) if reward >= task.correct_at else None
        if answer is not None:
            answers.setdefault(group, Counter())[answer] += 1
    of_group = [list(counter.values()) for counter in answers.values()]
    pairs = sum(sum(counts) * (sum(counts) - 1) for counts in of_group)
    same = sum(count * (count - 1) for counts in of_group for count in counts)
    return {"answer_pairs": torch.tensor(float(pairs)).double(), "same_answers": torch.tensor(float(same)).double()}
