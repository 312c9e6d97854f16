"""pass@k by hand and by brute force; the built-in task's rules."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from trainer.config import TrainConfig
from trainer.evaluate import pass_at_k
from trainer.rollout.prompts import evaluation_prompts
from trainer.tasks import SPLITS, make_task
from trainer.tasks.chain import parse_chain


def test_pass_at_k_equals_the_share_of_all_subsets():
    n, k = 6, 3
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        subsets = list(combinations(samples, k))
        assert pass_at_k(np.array([c]), n, k)[0] == pytest.approx(np.mean([any(s) for s in subsets])), c


def test_pass_at_one_is_the_mean_and_k_above_n_is_refused():
    assert pass_at_k(np.array([0, 1, 4]), 4, 1).tolist() == pytest.approx([0, 0.25, 1])
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples of each prompt, got 4"):
        pass_at_k(np.array([1]), 4, 5)


@pytest.mark.parametrize(
    ("completion", "valid"),
    [
        ("9*5=45,45+8=53,53+4=57;", True),
        ("9*5=45,45+8=53,53+4=57", True),
        ("9*5=45,45+8=53;", False),  # two steps
        ("9*5=45,45+8=54,54+3=57;", False),  # wrong sum
        ("9*5=45,44+9=53,53+4=57;", False),  # does not use the result before
        ("10+5=15,15+2=17,17+1=18;", False),  # starts from two digits
        ("9-9=0,0-1=-1,1+1=2;", False),  # below 0
        ("1+1=2,2+1=3,3+1=4,4+1=5,5+1=6,6+1=7,7+1=8;", False),  # seven steps
        ("9*5=45,45+0=45,45+1=46;", False),  # operand 0
        ("", False),
        ("9*5=45,,53+4=57", False),
    ],
)
def test_chain_rules(completion, valid):
    assert (parse_chain(completion) is not None) == valid


def test_chain_reward_needs_the_target_and_forms_ignore_commuted_first_operands():
    task = make_task("chain")
    chain = "9*5=45,45+8=53,53+4=57;"
    assert task.reward(["57:", "58:"], [chain, chain], [[], []], target=[57, 58]) == [1.0, 0.0]
    prompt = task.prompts("train")[0]
    swapped = "5*9=45,45+8=53,53+4=57;"
    assert task.canonical(prompt, chain) == task.canonical(prompt, swapped) == "5*9,+8,+4"
    assert task.canonical(prompt, "9-5=4,4+8=12,12-3=9;") == "9-5,+8,-3"  # minus does not commute
    assert task.canonical(prompt, "nonsense") is None


def test_evaluated_prompts_are_the_same_random_ones_in_every_run():
    task = make_task("chain")
    prompts = task.prompts("train")

    def ids(n: int, choice: str = "random", seed: int = 0) -> list[str]:
        config = TrainConfig(seed=seed, eval={"prompts": n, "choice": choice, "splits": ("train",), "every": 5})
        return [prompt.id for prompt in evaluation_prompts(config, task)["train"]]

    everything = [prompt.id for prompt in prompts]
    assert ids(8, "first") == everything[:8]
    assert ids(8) == ids(8, seed=7) != everything[:8]
    assert ids(8) == sorted(ids(8), key=everything.index)  # in the split's order
    assert set(ids(8)) < set(ids(20)) and len(set(ids(20))) == 20
    assert ids(10_000) == everything
    # no part of the split is preferred: the mean place of half of n prompts is n / 2, within 4 of its errors
    n, half = len(everything), ids(len(everything) // 2)
    error = n / np.sqrt(12 * len(half)) / np.sqrt(2)
    assert abs(np.mean([everything.index(one) for one in half]) - (n - 1) / 2) < 4 * error


def test_older_runs_go_on_with_the_prompts_that_they_had():
    stored = TrainConfig().model_dump()
    del stored["eval"]["choice"]
    assert TrainConfig.of_run(stored).eval.choice == "first"
    assert TrainConfig.of_run(TrainConfig().model_dump()).eval.choice == "random"


def test_chain_splits_do_not_overlap():
    task = make_task("chain")
    ids = {split: {p.id for p in task.prompts(split)} for split in SPLITS}
    assert {split: len(found) for split, found in ids.items()} == {
        "train": 65, "heldout": 15, "multipath": 10, "ood": 50
    }  # fmt: skip
    assert len(set.union(*ids.values())) == sum(map(len, ids.values()))


def test_unknown_tasks_name_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown task 'chian'\. Did you mean 'chain'\?"):
        make_task("chian")
    with pytest.raises(ValueError, match=r"Unknown task 'reasoning_gym:'"):
        make_task("reasoning_gym:")
    with pytest.raises(
        ValueError, match=r"'path'\. Did you mean 'paths'\? Known tasks: chain, chain:<\.\.\.>, paths, rea"
    ):
        make_task("path")
    with pytest.raises(ValueError, match=r"Unknown task 'paths:8'"):  # it takes no argument
        make_task("paths:8")
