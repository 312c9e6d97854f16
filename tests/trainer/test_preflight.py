"""Whether a run can learn: shares of groups by hand and by enumeration, findings and cures, the command for real."""

from __future__ import annotations

import itertools
import json
import math
import sys

import numpy as np
import pytest

from monitor.records import StepRecord
from monitor.store.reader import open_store
from trainer.commands.preflight import main
from trainer.commands.train import main as train
from trainer.config import TrainConfig
from trainer.preflight import (
    Draws,
    FirstRollouts,
    figures_of,
    figures_of_steps,
    findings,
    group_shares,
    signal_floor,
)
from trainer.tasks import make_task


def draws(rewards: np.ndarray, **changed) -> Draws:
    rewards = np.asarray(rewards, float)
    zeros = np.zeros(rewards.shape)
    sums = {"tokens": 100.0, "entropy": 46.0, "decided": 60.0, "mismatch_n": 100.0, "sampler_mismatch": 1e-5}
    sums |= {"sampler_mismatch_k3": 0.0, "sampler_mismatch_beyond2": 0.0, "sampler_mismatch_nonfinite": 0.0}
    fields = {
        "rewards": rewards,
        "correct": rewards >= 1,
        "lengths": zeros + 10,
        "truncated": zeros > 0,
        "repetition": zeros,
        "same_text": zeros,
        "answered": zeros == 0,
        "rewarded": zeros == 0,
        "sums": sums,
    }
    return Draws(**fields | changed)


def told(rewards: np.ndarray, *, config: TrainConfig | None = None, **changed) -> dict[str, tuple[str, str]]:
    config = config or TrainConfig()
    found = findings(figures_of(draws(rewards, **changed), config.rollout.group_size), config)
    return {finding.name: (finding.severity, finding.message) for finding in found}


def mixed(wrong: int, right: int, live: int, samples: int = 16) -> np.ndarray:
    """Prompts that are always wrong, always right, and right in every other rollout."""
    alternating = np.arange(samples) % 2
    rows = [np.zeros(samples)] * wrong + [np.ones(samples)] * right + [alternating] * live
    return np.array(rows)


def test_the_signal_floor():
    # (1 - p)^8 = 1/2 at p = 1 - 2^(-1/8) = 1 - 0.91700 = 0.08300; G = 1: p = 1/2
    assert signal_floor(8) == pytest.approx(0.0830, abs=1e-4) and signal_floor(1) == 0.5
    assert (1 - signal_floor(8)) ** 8 == pytest.approx(0.5)


def test_group_shares_by_hand():
    rewards = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]], float)
    wrong, right = group_shares(rewards, rewards >= 1, 2)
    # pairs of 4: six. One right: C(3,2) = 3 wrong pairs; all right: 6 of 6; two and two: one pair each
    assert wrong == pytest.approx([3 / 6, 0, 1 / 6]) and right == pytest.approx([0, 1, 1 / 6])


def test_a_shaped_reward_makes_wrong_groups_live():
    rewards = np.array([[0.0, 0.1, 0.2, 0.3], [0.5, 0.5, 0.5, 0.0]])
    wrong, right = group_shares(rewards, rewards >= 1, 2)
    # all differ: no equal pair; three of 0.5: C(3,2) = 3 of 6 pairs
    assert wrong == pytest.approx([0, 0.5]) and right.tolist() == [0, 0]
    assert "all_wrong_groups" not in told(np.tile(np.arange(16) / 32, (4, 1)))  # nothing right, and all live


@pytest.mark.parametrize(("p", "n", "group_size"), [(0.5, 4, 2), (0.1, 6, 3), (0.9, 5, 5)])
def test_the_live_share_is_unbiased_over_every_sample_that_there_is(p, n, group_size):
    mean, plug_in = 0.0, 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=n):
        rewards = np.array([outcome])
        wrong, right = group_shares(rewards, rewards >= 1, group_size)
        share = sum(outcome) / n
        chance = math.prod(p if each else 1 - p for each in outcome)
        mean += chance * float(1 - wrong[0] - right[0])
        plug_in += chance * (1 - share**group_size - (1 - share) ** group_size)
    truth = 1 - p**group_size - (1 - p) ** group_size
    assert mean == pytest.approx(truth, abs=1e-12)
    assert plug_in < truth - 0.01  # which is why p is not just put in


def test_the_live_share_at_one_half_and_eight():
    # c of 16 right has chance C(16, c) / 2^16; the mean over c is 1 - 2 (1/2)^8 = 1 - 2/256
    rewards = (np.arange(16) < np.arange(17)[:, None]).astype(float)
    wrong, right = group_shares(rewards, rewards >= 1, 8)
    chance = np.array([math.comb(16, c) for c in range(17)]) / 2**16
    assert float(chance @ (1 - wrong - right)) == pytest.approx(1 - 2 / 256, abs=1e-12)


def test_figures_of_draws():
    rewards = mixed(wrong=1, right=1, live=2)
    truncated = np.zeros(rewards.shape, bool)
    truncated[0] = True
    answered = np.ones(rewards.shape, bool)
    answered[:2] = False  # the first prompt's rollouts did not end; of the 48 that did, 16 have no answer
    found = figures_of(draws(rewards, truncated=truncated, answered=answered, same_text=truncated * 15.0), 8)
    value = {key: estimate.mean for key, estimate in found.items()}
    live = 1 - 2 * 1 / math.comb(16, 8)  # 8 of 16 right: one way to draw all eight, of C(16, 8) = 12,870, on each side
    assert value["pass@1"] == 0.5 and value["pass@G"] == pytest.approx((0 + 1 + 2 * (1 - 1 / 12870)) / 4)
    assert value["live_share"] == pytest.approx(2 * live / 4)
    assert value["equal_wrong_share"] == pytest.approx((1 + 2 / 12870) / 4) == value["equal_correct_share"]
    assert value["live_share_measured"] == 0.5 and value["truncated_share"] == 0.25
    assert value["no_answer_share"] == pytest.approx(16 / 48) and value["duplicate_share"] == 0.25
    assert value["entropy"] == 0.46 and value["decided_share"] == 0.6 and value["response_length"] == 10
    assert value["sampler_mismatch"] == pytest.approx(1e-7)


def test_nothing_right_has_an_interval_all_the_same():
    found = figures_of(draws(mixed(wrong=32, right=0, live=0)), 8)
    # Wilson, 0 of 32: z^2 / (n + z^2) = 3.8415 / 35.8415
    assert (found["pass@1"].low, found["pass@1"].high) == (0.0, pytest.approx(0.10718, abs=1e-5))
    assert figures_of(draws(mixed(1, 0, 1)), 8)["pass@1"].low is None  # two prompts say nothing of others
    # half of the prompts at 0 and half at 1/2: the mean of 8 resampled ones lies between
    half = figures_of(draws(mixed(4, 0, 4)), 8)["pass@1"]
    assert half.low < 0.25 < half.high and half.low >= 0 and half.high <= 0.5


def test_all_wrong_and_all_correct_groups_have_opposite_cures():
    severity, message = told(mixed(wrong=32, right=0, live=0))["all_wrong_groups"]
    assert severity == "critical" and "take easier prompts, a larger rollout.group_size (now 8)" in message
    severity, message = told(mixed(wrong=0, right=32, live=0))["all_correct_groups"]
    assert severity == "critical" and "take harder prompts" in message and "easier" not in message
    severity, message = told(mixed(wrong=9, right=9, live=2))["mixed_groups"]
    assert severity == "warning" and "take prompts between the two" in message
    assert told(mixed(wrong=5, right=4, live=10)) == {}


def test_few_live_groups_are_critical_where_most_steps_have_none():
    # 1 of 20 groups live: of steps of 16, .95^16 = 44 % have none; of steps of 8, .95^8 = 66 %
    rewards = mixed(wrong=19, right=0, live=1)
    severity, message = told(rewards)["all_wrong_groups"]
    assert severity == "warning" and "44% of steps of 16 groups have no gradient at all" in message
    few = TrainConfig(rollout={"prompts": 8})
    assert told(rewards, config=few)["all_wrong_groups"][0] == "critical"


def test_each_other_finding_is_a_sentence_with_its_cure():
    healthy = mixed(0, 0, 4)
    ones = np.ones(healthy.shape)
    sums = draws(healthy).sums
    low = {**sums, "entropy": 17.0}
    assert told(healthy, sums={**sums, "entropy": 18.0}) == {}
    assert told(healthy, sums=low)["low_entropy"][1].startswith("The entropy is 0.170 nat before training")
    assert (
        "100% of rollouts are cut off at rollout.max_new_tokens (now 56)"
        in told(healthy, truncated=ones > 0)["truncated"][1]
    )
    assert "100% of rollouts that ended give no answer" in told(healthy, answered=ones < 0)["no_answer"][1]
    assert "gives None for 100% of rollouts" in told(healthy, rewarded=ones < 0)["no_reward"][1]
    assert "raise rollout.temperature" in told(healthy, same_text=ones * 15)["duplicates"][1]
    assert "60% of runs of four tokens" in told(healthy, repetition=ones * 0.6)["repetition"][1]
    broken = told(healthy, sums={**sums, "sampler_mismatch_beyond2": 5.0})["sampler_mismatch"]
    assert broken[0] == "critical" and "5.0% of tokens" in broken[1]


SCALARS = {
    "tokens": 100.0, "entropy": 0.4, "decided_share": 0.6, "correct_share": 0.3, "zero_variance_share": 0.25,
    "all_correct_share": 0.05, "all_wrong_share": 0.2, "truncated_share": 0.0, "response_length": 20.0,
    "repetition_share": 0.0, "duplicate_share": 0.0,
}  # fmt: skip


def test_figures_of_training_steps():
    second = SCALARS | {"tokens": 300.0, "entropy": 0.2, "correct_share": 0.5, "zero_variance_share": 0.0}
    value = {key: each.mean for key, each in figures_of_steps([SCALARS, second]).items()}
    assert value["entropy"] == pytest.approx(0.25)  # (100 x 0.4 + 300 x 0.2) / 400
    assert value["pass@1"] == pytest.approx(0.4) and value["pass@G"] == pytest.approx(0.8)
    assert value["live_share"] == pytest.approx(0.875)
    # a reward that tells all-wrong and all-correct rollouts apart: no group of the second step is equal
    assert value["equal_correct_share"] == pytest.approx(0.025) and value["equal_wrong_share"] == pytest.approx(0.1)
    assert "sampler_mismatch" not in value


def test_a_run_is_judged_once_after_its_first_200_rollouts():
    wrong = SCALARS | {"zero_variance_share": 1.0, "all_wrong_share": 1.0, "all_correct_share": 0.0}
    judge = FirstRollouts(TrainConfig())  # 16 x 8: the second step is the 256th rollout
    said = [judge(StepRecord(step, wrong)) for step in (1, 2, 3)]
    assert said[0] is None and said[2] is None
    assert said[1].startswith("The first 256 rollouts: Only 0.0% of groups have rewards that differ")
    fine = FirstRollouts(TrainConfig())
    assert [fine(StepRecord(step, SCALARS)) for step in (1, 2)] == [None, None]
    resumed = FirstRollouts(TrainConfig())
    assert [resumed(StepRecord(step, wrong)) for step in (2, 3)] == [None, None]


@pytest.mark.parametrize(
    ("task", "answers", "no_answers"),
    [
        ("chain", ["9*5=45,45+8=53,53+4=57;", "9*5=44,44+8=1,1+4=57"], ["9*5=45;", "57", "9*5=45,45+8,53+4=57"]),
        ("paths", ["22224;", "8" * 16], [";", "2" * 17, "5;", "22 24;", "13,52:22224;"]),
        ("reasoning_gym:gcd", ["so <answer>4</answer>"], ["4", "<answer> </answer>", "\\boxed{4}"]),
        ("jsonl", ["<answer>4</answer>", "it is \\boxed{4}"], ["it is 4", "\\boxed{}"]),
    ],
)
def test_tasks_say_whether_an_answer_can_be_read(tmp_path, task, answers, no_answers):
    if task == "jsonl":
        (tmp_path / "p.jsonl").write_text('{"prompt": "2 + 2", "answer": 4}\n')
        task = f"jsonl:{tmp_path / 'p.jsonl'}"
    reads = make_task(task).gives_answer
    assert [reads(text) for text in answers + no_answers] == [True] * len(answers) + [False] * len(no_answers)


QUICK = ["--preflight-prompts", "5", "--samples", "8", "--rollout.group-size", "4", "--rollout.prompts", "4"]


def test_the_builtin_policy_can_learn_and_is_told_so(capsys):
    assert main([*QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompts"], found["samples"], found["can_learn"], found["findings"]) == (5, 8, True, [])
    figures = {name: figure["mean"] for name, figure in found["figures"].items()}
    assert 0.3 < figures["entropy"] < 0.7 and 0.05 < figures["pass@1"] < figures["pass@4"] < 1  # README: .466, .25
    assert figures["live_share"] + figures["equal_wrong_share"] + figures["equal_correct_share"] == pytest.approx(1)
    assert figures["sampler_mismatch"] < 1e-5 and figures["no_answer_share"] < 0.25
    assert "p*(4) = 0.159" in found["figures"]["pass@1"]["reference"]  # 1 - 2^(-1/4)


def test_targets_that_are_too_large_end_with_code_1(capsys):
    assert main([*QUICK, "--task", "chain:200-299"]) == 1
    out = capsys.readouterr().out
    assert "critical: Only 0.0% of groups" in out and "As it stands, learning is unlikely." in out
    assert "arXiv 2606.18487" in out and "0 to 0.434" in out  # Wilson, 0 of 5: 3.8415 / 8.8415


def test_a_file_is_read_as_train_reads_it_and_rewards_of_none_are_counted(tmp_path, monkeypatch, capsys):
    (tmp_path / "preflight_reward.py").write_text(
        "def every_other(completions, **columns):\n"
        "    return [None if i % 2 else float(i % 4 == 0) for i in range(len(completions))]\n"
        "def broken(**columns):\n    raise ValueError('no verifier')\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    file = tmp_path / "run.toml"
    file.write_text('reward = "preflight_reward:every_other"\n[rollout]\nmax_new_tokens = 4\n')
    assert main([str(file), *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    figures = {name: figure["mean"] for name, figure in found["figures"].items()}
    assert figures["no_reward_share"] == 0.5 and figures["pass@1"] == 0.25 and "no_answer_share" not in figures
    assert {finding["name"] for finding in found["findings"]} == {"truncated", "no_reward"}
    assert main([*QUICK, "--reward", "preflight_reward:broken"]) == 1
    assert "raised ValueError: no verifier" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "12"], "--samples is 12, expected a multiple of rollout.group_size, 8"),
        (["--preflight-prompts", "0"], "--preflight-prompts is 0, expected at least 1"),
        (["--task", "chian"], "Did you mean 'chain'?"),
        (["demoo"], "No preset 'demoo'. Did you mean 'demo'?"),
        (["--rollout.prompts", "100"], "rollout.prompts is 100 but the task's train split has"),
    ],
)
def test_wrong_use_ends_with_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_train_says_it_after_its_first_rollouts(tmp_path, capsys):
    """208 rollouts of two tokens each: none can be right, all are cut off."""
    options = "--steps 2 --rollout.prompts 13 --rollout.max-new-tokens 2 --eval.every 0 --run r --checkpoint.every 0"
    assert train([*options.split(), "--store", str(tmp_path)]) == 0
    told = "The first 208 rollouts: Only 0.0% of groups have rewards that differ"
    assert told in capsys.readouterr().err
    with open_store(tmp_path) as store:
        rows = store.sql("SELECT step, message FROM events WHERE kind = 'preflight'").rows
    assert [(step, message[: len(told)]) for step, message in rows] == [(2, told)]
    assert "(now 2), maybe before their answer: raise it" in rows[0][1]
