"""Loading reward functions and checking what they return."""

from __future__ import annotations

import asyncio
import functools
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.errors import RewardError
from trainer.rewards.checking import checked_rewards
from trainer.rewards.loading import load_reward
from trainer.rewards.weighted import load_rewards

PROMPTS, COMPLETIONS, IDS = ["a", "b"], ["x", "yy"], [[1], [2, 3]]


def call(function: Any, **columns: Any) -> list[float | None]:
    return checked_rewards(function, PROMPTS, COMPLETIONS, IDS, **columns)


def test_trl_signature_with_columns() -> None:
    def exact(prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[str]) -> Any:
        assert (prompts, completion_ids) == (PROMPTS, IDS)
        return [float(a == c) for a, c in zip(answer, completions, strict=True)]

    assert call(exact, answer=["x", "z"]) == [1.0, 0.0]


def test_numbers_of_any_kind_and_none_become_floats() -> None:
    rewards = call(lambda **_: [np.float32(0.5), None])
    assert rewards == [0.5, None] and type(rewards[0]) is float
    assert call(lambda **_: np.array([1, 2])) == [1.0, 2.0]
    assert call(lambda **_: (True, 3)) == [1.0, 3.0]


def test_async_functions_inside_and_outside_a_loop() -> None:
    async def slow(**_: Any) -> list[float]:
        await asyncio.sleep(0.001)
        return [0.25, 0.75]

    async def notebook() -> list[float | None]:
        return call(slow)

    assert call(slow) == [0.25, 0.75]
    with ThreadPoolExecutor(1) as pool:  # a thread of its own: a browser's loop may run in this one
        assert pool.submit(lambda: asyncio.run(notebook())).result() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1.0], r"returned 1 rewards for 2 completions, expected one each"),
        ([1.0, float("nan")], r"returned nan for completion 1, expected a finite number, or None"),
        ([float("-inf"), 1.0], r"returned -inf for completion 0"),
        ([1.0, "1"], r"returned str '1' for completion 1, expected a number or None"),
        ([1.0, np.array([1.0, 2.0])], r"for completion 1, expected a number or None"),
        (0.5, r"returned float 0.5, expected a list of 2 numbers or None"),
        (None, r"returned NoneType None, expected a list of 2 numbers"),
        ({"a": 1, "b": 2}, r"returned dict .*, expected a list of 2"),
        ("ab", r"returned str 'ab', expected a list of 2"),
    ],
)
def test_wrong_returns_name_function_value_and_expectation(returned: Any, expected: str) -> None:
    def my_reward(**_: Any) -> Any:
        return returned

    with pytest.raises(RewardError, match=expected) as caught:
        call(my_reward)
    assert "test_rewards:" in str(caught.value) and "my_reward" in str(caught.value)


def test_raising_functions_say_what_they_were_called_with() -> None:
    def needs_gold(prompts: Any, completions: Any, completion_ids: Any, gold: Any) -> Any:
        return []

    with pytest.raises(RewardError, match=r"needs_gold raised TypeError: .*'gold'.* completion_ids, one list of 2"):
        call(needs_gold)
    with pytest.raises(RewardError, match=r"needs_gold raised TypeError"):
        call(functools.partial(needs_gold, other=1))


def test_load_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_x.py").write_text("LIMIT = 3\ndef exact_match(**k): return [1.0, 0.0]\n")
    (tmp_path / "broken_rewards_x.py").write_text("import not_there_x\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    assert call(load_reward("my_rewards_x:exact_match")) == [1.0, 0.0]
    for target, expected in [
        ("my_rewards_x:exact_mach", "has no function 'exact_mach'. Did you mean 'exact_match'?"),
        ("my_rewards_x:LIMIT", "is a int, expected a function"),
        ("no_such_module_x:f", "module 'no_such_module_x' cannot be imported: ModuleNotFoundError"),
        ("broken_rewards_x:f", "No module named 'not_there_x'"),
        ("exact_match", "reward is 'exact_match', expected 'package.module:function'"),
        ("m:", "expected 'package.module:function'"),
    ]:
        with pytest.raises(RewardError) as caught:
            load_reward(target)
        assert expected in str(caught.value)


def of_task(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any) -> Any:
    return [1.0, 0.0]


@pytest.fixture
def two_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two_rewards.py").write_text(
        "def short(prompts, completions, completion_ids, **columns):\n"
        "    return [None if len(text) > 1 else 0.5 for text in completions]\n"
        "def long(prompts, completions, completion_ids, **columns):\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("two_rewards")
def test_several_rewards_are_summed_with_their_weights() -> None:
    rewards = load_rewards("task, two_rewards:short=0.2, two_rewards:long = -1", of_task)
    given = rewards.given(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=IDS)
    assert given == {"task": [1.0, 0.0], "short": [0.5, None], "long": [1.0, 2.0]}
    # 1 + .2 x .5 - 1 = .1, and 0 + nothing - 2
    assert rewards.total(given) == pytest.approx([0.1, -2.0])
    assert [part.weight for part in rewards.parts] == [1.0, 0.2, -1.0]


def test_without_a_setting_the_reward_is_the_task_s() -> None:
    rewards = load_rewards(None, of_task)
    assert [part.name for part in rewards.parts] == ["task"]
    assert rewards.total(rewards.given(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=IDS)) == [1.0, 0.0]


@pytest.mark.usefixtures("two_rewards")
def test_functions_of_one_name_keep_their_modules(tmp_path: Path) -> None:
    (tmp_path / "other_rewards.py").write_text((tmp_path / "two_rewards.py").read_text())
    rewards = load_rewards("two_rewards:short,other_rewards:short,two_rewards:long", of_task)
    assert [part.name for part in rewards.parts] == ["two_rewards:short", "other_rewards:short", "long"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task,", "has a part ''"),
        ("task=", "has a part 'task='"),
        ("task=much", "'much' is no weight for 'task'"),
        ("task=inf", "'inf' is no weight"),
        ("task=0", "weights are all 0"),
        ("task,task=2", "names 'task' twice"),
        ("=2", "has a part '=2'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: str, message: str) -> None:
    with pytest.raises(RewardError, match=re.escape(message)):
        load_rewards(setting, of_task)
