"""What a reward function returns, checked: one finite number or None for each completion."""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trainer.errors import RewardError

RewardFunction = Callable[..., Any]


def function_name(function: RewardFunction) -> str:
    """The name of a reward function in messages: module:qualified name."""
    owner = function.func if hasattr(function, "func") else function  # functools.partial
    name = getattr(owner, "__qualname__", type(owner).__qualname__)
    return f"{getattr(owner, '__module__', '?')}:{name}"


def checked_rewards(
    function: RewardFunction,
    /,  # a task may have a column called function
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    **columns: list[Any],
) -> list[float | None]:
    """Calls `function`, sync or async, and returns one finite float or None for each completion.

    numpy and torch scalars count as numbers, and bool as 0 or 1. Raises RewardError if the function raises, returns
    another number of rewards, or returns anything but finite numbers and None. The error names the function, the value
    and what was expected.
    """
    name = function_name(function)
    try:
        result = function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        if inspect.isawaitable(result):
            result = _await(result)
    except Exception as error:
        given = ", ".join(["prompts", "completions", "completion_ids", *columns])
        raise RewardError(
            f"Reward function {name} raised {type(error).__name__}: {error}. It was called with {given}, "
            f"one list of {len(completions)} each."
        ) from error
    if isinstance(result, (str, bytes, dict)) or not hasattr(result, "__len__") or not hasattr(result, "__iter__"):
        raise RewardError(
            f"Reward function {name} returned {_short(result)}, expected a list of {len(completions)} numbers or None."
        )
    rewards = list(result)
    if len(rewards) != len(completions):
        raise RewardError(
            f"Reward function {name} returned {len(rewards)} rewards for {len(completions)} completions, expected one "
            "each."
        )
    return [_reward(name, index, value) for index, value in enumerate(rewards)]


def _reward(name: str, index: int, value: Any) -> float | None:
    if value is None:
        return None
    scalar = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if not isinstance(scalar, numbers.Real):
        raise RewardError(
            f"Reward function {name} returned {_short(value)} for completion {index}, expected a number or None."
        )
    reward = float(scalar)
    if not math.isfinite(reward):
        raise RewardError(
            f"Reward function {name} returned {reward} for completion {index}, expected a finite number, or None where "
            "it does not apply."
        )
    return reward


def _await(result: Any) -> Any:
    async def wait() -> Any:
        return await result

    return _run(wait())


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:  # called from inside a loop (a notebook): give the function a loop of its own
        return pool.submit(asyncio.run, coroutine).result()


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
