"""The log functions for slime and miles, called as their source calls them. Neither can be installed here."""

from __future__ import annotations

import enum
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_import import rows

from monitor.integrations import slime
from monitor.store.runs import get_run

torch = pytest.importorskip("torch")
from rlvr_monitor.slime import log_eval_rollout_data, log_rollout_data  # noqa: E402


class Status(enum.Enum):
    COMPLETED = "completed"
    TRUNCATED = "truncated"


def sample(group: int | None, response: list[int], reward: Any, **other: Any) -> SimpleNamespace:
    """What the log functions read of a Sample."""
    values = {
        "group_index": group, "prompt": f"p{group}", "tokens": [5, 6, *response],
        "response": "".join(str(token) for token in response),
        "response_length": len(response), "reward": reward, "loss_mask": None, "status": Status.COMPLETED,
        "rollout_log_probs": [-0.5 * (at + 1) for at in range(len(response))],
    }  # fmt: skip
    return SimpleNamespace(**values | other)


def arguments(tmp_path: Path, **other: Any) -> Namespace:
    values = {
        "rlvr_store": str(tmp_path / "s"), "rlvr_run": "r", "hf_checkpoint": None, "prompt_data": "maths.jsonl",
        "seed": 7, "num_rollout": 3, "start_rollout_id": 0, "eval_interval": None, "reward_key": None, "lr": 1e-6,
        "wandb_group": "mine", "wandb_key": "secret", "wandb_always_use_train_step": False, "rollout_temperature": 0.5,
        "rollout_batch_size": 2, "n_samples_per_prompt": 2, "global_batch_size": 2,
    }  # fmt: skip
    return Namespace(**values | other)


SAMPLES = [
    sample(3, [7, 8, 9], 1.0),
    sample(3, [7, 8], 0.0, status=Status.TRUNCATED, loss_mask=[1, 0]),
    sample(4, [3], 1.0),
    sample(4, [], 1.0),
]


@pytest.fixture(autouse=True)
def process() -> Iterator[Any]:
    """A process that has recorded nothing yet."""
    slime._Process.hook, slime._Process.has_failed = None, False
    yield slime._Process
    if slime._Process.hook is not None:
        slime._Process.hook.close("stopped")
    slime._Process.hook, slime._Process.has_failed = None, False


def scalars(store: Path, step: int, run: str = "r") -> dict[str, float]:
    return dict(rows(store, "SELECT name, value FROM steps WHERE step = ? AND run = ?", step, run))


def test_a_rollout_step_is_recorded(tmp_path: Path, process: Any) -> None:
    args, store = arguments(tmp_path), tmp_path / "s"
    extra = {"rollout/over_sampling": 2, "nested": {"a": 0.5}, "name": "x"}
    assert log_rollout_data(0, args, SAMPLES, extra, 12.5) is False
    assert process.hook.recorder.flush()
    found = scalars(store, 0)
    # 3, 1, 1 and 0 tokens of the loss mask; group 3 has rewards 1 and 0, group 4 only 1
    wanted = {
        "reward": 0.75, "correct_share": 0.75, "zero_variance_share": 0.5, "all_correct_share": 0.5,
        "response_length": 1.25, "truncated_share": 0.25, "perf/rollout_s": 12.5, "temperature": 0.5,
        "rollout/over_sampling": 2.0, "nested.a": 0.5,
    }  # fmt: skip
    assert {name: found.get(name) for name in wanted} == wanted and "perf/memory_gib" not in found
    columns = "sample, group_id, split, reward, correct, advantage, n_tokens, truncated, prompt, completion"
    assert rows(store, f"SELECT {columns} FROM samples ORDER BY sample") == [
        (0, 0, "train", 1.0, True, None, 3, False, "p3", "789"),
        (1, 0, "train", 0.0, False, None, 1, True, "p3", "78"),
        (2, 1, "train", 1.0, True, None, 1, False, "p4", "3"),
        (3, 1, "train", 1.0, True, None, 0, False, "p4", ""),
    ]
    columns = "sample, position, token_id, logprob, entropy, deviation, alive"
    assert rows(store, f"SELECT {columns} FROM tokens ORDER BY sample, position") == [
        (0, 0, 7, -0.5, None, None, 2), (0, 1, 8, -1.0, None, None, 1), (0, 2, 9, -1.5, None, None, 1),
        (1, 0, 7, -0.5, None, None, 2), (2, 0, 3, -0.5, None, None, 1),
    ]  # fmt: skip
    # surprisals 0.5, 1, 1.5, 0.5, 0.5
    assert rows(store, "SELECT n, sum FROM histograms WHERE metric = 'surprisal' AND split = 'all'") == [(5, 4.0)]
    state = get_run(store, "r")
    assert state.info["seed"] == 7 and state.info["task"] == "maths.jsonl"
    assert state.info["config"]["slime"]["lr"] == 1e-6 and "wandb_key" not in state.info["config"]["slime"]


def test_log_probabilities_and_rewards_that_some_samples_lack(tmp_path: Path, process: Any) -> None:
    some = [sample(None, [7], {"answer": 1.0}, prompt=[{"role": "user", "content": "ä"}], rollout_log_probs=None),
            sample(None, [8], {"answer": 0.0}, prompt="b")]  # fmt: skip
    log_rollout_data(0, arguments(tmp_path), some, None, 1.0)
    log_rollout_data(1, arguments(tmp_path), some, None, 1.0)
    process.hook._args.reward_key = "answer"
    log_rollout_data(2, arguments(tmp_path), some, None, 1.0)
    store = tmp_path / "s"
    assert rows(store, "SELECT DISTINCT step, reward, prompt FROM samples ORDER BY ALL") == [
        (0, None, '[{"role": "user", "content": "ä"}]'), (0, None, "b"),
        (1, None, '[{"role": "user", "content": "ä"}]'), (1, None, "b"),
        (2, 0.0, "b"), (2, 1.0, '[{"role": "user", "content": "ä"}]'),
    ]  # fmt: skip
    assert rows(store, "SELECT count(*) FROM tokens") == [(0,)]
    assert "reward" not in scalars(store, 1) and scalars(store, 2)["reward"] == 0.5
    assert get_run(store, "r").status == "finished"  # num_rollout is 3


def test_evaluations(tmp_path: Path, process: Any) -> None:
    args, store = arguments(tmp_path, eval_interval=1, num_rollout=1), tmp_path / "s"
    of_prompts = [sample(None, [1, 2], 0.0, prompt=prompt) for prompt in ("a", "a", "b", "b")]
    before = {
        "maths/easy": {
            "rewards": [1.0, 0.0, 0.0, None],
            "truncated": [True, False, False, False],
            "samples": of_prompts,
        },
        "texts": {"rewards": [{"a": 1}]},
    }
    assert log_eval_rollout_data(0, args, before, {"eval/own": 2.0}) is False  # before the first rollouts
    log_rollout_data(0, args, SAMPLES, {}, 1.0)
    assert process.hook.recorder.flush()
    found = {name: value for name, value in scalars(store, 0).items() if name.startswith("eval/")}
    assert found == {
        "eval/maths_easy/pass@1": 0.25, "eval/maths_easy/pass@2": 0.5, "eval/maths_easy/response_length": 2.0,
        "eval/maths_easy/truncated_share": 0.25, "eval/own": 2.0,
    }  # fmt: skip
    assert rows(store, "SELECT count(*) FROM tokens") == [(5,)] and get_run(store, "r").status == "running"
    log_eval_rollout_data(0, args, {"after": {"rewards": [1.0]}})  # slime of before extra metrics
    assert scalars(store, 0)["eval/after/pass@1"] == 1.0 and get_run(store, "r").status == "finished"
    assert (
        rows(store, "SELECT kind, message FROM events WHERE kind NOT IN ('attempt', 'no_distributions', 'verdict')")
        == []
    )


def test_steps_are_those_of_the_trainers_own_log(tmp_path: Path, process: Any) -> None:
    args = arguments(tmp_path, wandb_always_use_train_step=True)
    for rollout_id in range(2):  # of 2 x 2 rollouts, two updates each
        log_rollout_data(rollout_id, args, SAMPLES, {}, 1.0)
    process.hook.recorder.flush()
    assert rows(tmp_path / "s", "SELECT DISTINCT step FROM steps ORDER BY step") == [(0,), (2,)]


def test_a_step_that_cannot_be_measured_costs_its_tokens_alone(tmp_path: Path, process: Any) -> None:
    wrong = sample(0, [7, 8], 1.0, loss_mask=[1, 1, 1])
    for rollout_id in range(2):
        assert log_rollout_data(rollout_id, arguments(tmp_path), [wrong], {"a": 1.0}, 2.0) is False
    assert log_rollout_data("x", arguments(tmp_path), SAMPLES, {}, 1.0) is False  # type: ignore[arg-type]
    assert log_eval_rollout_data(1, arguments(tmp_path), {"d": {"rewards": 3}}) is False
    process.hook.recorder.flush()
    assert scalars(tmp_path / "s", 1).items() >= {"a": 1.0, "perf/rollout_s": 2.0}.items()
    found = rows(tmp_path / "s", "SELECT message FROM events WHERE kind = 'slime_error' ORDER BY message")
    assert len(found) == 3 and found[2][0].startswith("ValueError: ")  # each fault once


def test_a_run_that_cannot_be_opened_leaves_training_alone(
    tmp_path: Path, process: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for wrong in ({"rlvr_store": str(tmp_path / "file")}, {"rlvr_stroe": "x"}):
        process.has_failed = False
        for rollout_id in range(2):
            assert log_rollout_data(rollout_id, arguments(tmp_path, **wrong), SAMPLES, {}, 1.0) is False
    told = [record.message for record in caplog.records if "records nothing" in record.message]
    assert len(told) == 2 and "rlvr_stroe, expected some of rlvr_store, rlvr_run" in told[1]
    assert not (tmp_path / "s").exists()


def test_a_name_that_is_taken_and_a_training_that_goes_on(tmp_path: Path, process: Any) -> None:
    store = tmp_path / "s"
    for start, first in ((0, 0), (0, 0), (1, 1)):
        log_rollout_data(first, arguments(tmp_path, start_rollout_id=start), SAMPLES, {}, 1.0)
        process.hook.close("stopped")
        process.hook = None
    assert rows(store, "SELECT DISTINCT run, attempt, step FROM steps_all ORDER BY ALL") == [
        ("r", 1, 0), ("r", 2, 1), ("r-2", 1, 0),
    ]  # fmt: skip


def test_alerts_are_judged_live(tmp_path: Path, process: Any) -> None:
    args = arguments(tmp_path, num_rollout=200)
    for rollout_id in range(60):
        level = -1.0 if rollout_id < 30 else math.nan
        some = [sample(group, [1, 2], 1.0, rollout_log_probs=[level, level]) for group in (0, 0, 1, 1)]
        log_rollout_data(rollout_id, args, some, {}, 1.0)
    process.hook.recorder.flush()
    assert rows(tmp_path / "s", "SELECT count(*) > 0 FROM alerts WHERE state = 'firing'") == [(True,)]
