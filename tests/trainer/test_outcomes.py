"""What a step's rollouts turned out to be: groups that teach nothing, and how alike right answers are."""

from __future__ import annotations

import pytest
import torch

from monitor.signals.outcomes import equal_group_shares
from trainer.config import TrainConfig
from trainer.flow import Rollouts, Scored
from trainer.learning.batch import token_batch
from trainer.rollout.outcomes import answer_sums, rollout_scalars
from trainer.runtime.ranks import Ranks
from trainer.tasks import Prompt, make_task


def test_groups_that_are_all_right_or_all_wrong() -> None:
    correct = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0]).bool()  # groups of two: right, wrong, mixed, wrong
    right, wrong = equal_group_shares(correct, torch.arange(8) // 2)
    assert (right.item(), wrong.item()) == (0.25, 0.5)


CHAINS = [  # to 12, in three steps each; the first two are one way, because 5*2 and 2*5 are
    "5*2=10,10+1=11,11+1=12;", "2*5=10,10+1=11,11+1=12;", "3*3=9,9+2=11,11+1=12;", "3*3=9,9+2=11,11+1=13;",
    "6+6=12,12+1=13,13-1=12;", "6+6=12,12+1=13,13-1=12;", "6+6=12,12+1=13,13-1=12;", "nonsense",
]  # fmt: skip


def step() -> tuple[object, Scored]:
    ids = torch.zeros(8, 6, dtype=torch.long)
    ids[4:7] = torch.tensor([1, 2, 3, 4, 5, 6])
    ids[:4] = torch.arange(24).view(4, 6) + 10
    ones = torch.ones(8, 6).bool()
    rollouts = Rollouts(ids, ones, ones, torch.zeros(8, 6), torch.tensor([0, 0, 0, 0, 0, 0, 0, 1]).bool())
    prompt = Prompt("12", "12:", "train", {"target": 12})
    task = make_task("chain")
    rewards = task.reward([prompt.text] * 8, CHAINS, [[]] * 8, target=[12] * 8)
    scored = Scored([prompt] * 8, CHAINS, [[]] * 8, [float(reward or 0) for reward in rewards])
    config = TrainConfig(rollout={"prompts": 2, "group_size": 4, "max_new_tokens": 6})
    return token_batch(rollouts, scored, task.correct_at, config), scored


def test_right_answers_that_are_the_same() -> None:
    batch, scored = step()
    sums = answer_sums(batch, scored, make_task("chain"))  # type: ignore[arg-type]
    # first group: three right, 3 * 2 ordered pairs, of which 2 agree; second: three right and alike, 6 of 6
    assert {key: value.item() for key, value in sums.items()} == {"answer_pairs": 12.0, "same_answers": 8.0}


def test_scalars_of_the_rollouts() -> None:
    batch, _ = step()
    found = {key: float(value) for key, value in rollout_scalars(batch, Ranks()).items()}  # type: ignore[arg-type]
    assert found["reward"] == found["correct_share"] == 0.75
    assert (found["all_correct_share"], found["all_wrong_share"], found["zero_variance_share"]) == (0.0, 0.0, 0.0)
    assert found["truncated_share"] == 0.125 and found["response_length"] == 6.0
    # three of the second group are one text: each has 2 equals of 3 others, so 3 * 2/3 over 8 rollouts
    assert found["duplicate_share"] == pytest.approx(0.25)
    # the last response is six equal tokens: runs of four 0000 0000 0000, two of which stood there before
    assert found["repetition_share"] == pytest.approx((2 / 3) / 8)


def test_other_targets_for_the_chains() -> None:
    task = make_task("chain:60-99")
    targets = {split: [int(p.id) for p in task.prompts(split)] for split in ("train", "heldout", "multipath", "ood")}
    assert min(targets["train"]) == 61 and max(targets["train"]) == 99  # 60 has many ways
    assert targets["heldout"] == [65, 71, 77, 83, 89, 95] and targets["ood"] == list(range(100, 150))
    assert targets["multipath"] == [60, 64, 72, 84, 96]
    for wrong in ("chain:60", "chain:99-60", "chain:60-65", "chain:10-2000"):
        with pytest.raises(ValueError, match=r"names no targets: expected chain:LOW-HIGH with 12 targets or more"):
            make_task(wrong)
