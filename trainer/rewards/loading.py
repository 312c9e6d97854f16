"""Reward functions with TRL's signature: loading one by name, and checking what it returns.

A reward function is `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async; None
where it does not apply to a completion. TRL's optional keywords (trainer_state, log_metric, ...) are not passed.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import re
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from monitor.errors import MonitorError, nearest

RewardFunction = Callable[..., Any]
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_FORMAT = "expected 'package.module:function'"


class RewardError(MonitorError):
    """A reward function that cannot be loaded, raised, or returned something that is no list of rewards."""


def load_reward(target: str) -> RewardFunction:
    """The function named "package.module:function"; modules are also looked for in the working directory.

    Raises RewardError if the text has another form, the module cannot be imported, or it holds no such function.
    """
    module_name, colon, name = target.partition(":")
    if not (colon and module_name and name):
        raise RewardError(f"reward is {target!r}, {_FORMAT}, e.g. 'my_rewards:exact_match'.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = import_module(module_name)
    except Exception as error:
        raise RewardError(
            f"reward {target!r}: module {module_name!r} cannot be imported: {type(error).__name__}: {error}. "
            f"Install it or start from the folder that holds it."
        ) from error
    function = getattr(module, name, None)
    if function is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RewardError(f"reward {target!r}: module {module_name!r} has no function {name!r}.{nearest(name, known)}")
    if not callable(function):
        raise RewardError(f"reward {target!r} is a {type(function).__name__}, expected a function.")
    return function


def close_to_answer(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], *, answer: list[str], **columns: Any
) -> list[float]:
    """A shaped reward for models that are rarely right: how near the completion's last number is to the answer.

    1.0 if equal, else 0.5 * max(0, 1 - |x - y| / max(|y|, 1)); 0.0 without a number or where the answer is none.
    Example: answer 20, "about 15" -> 0.5 * (1 - 5/20) = 0.375. Ours; use: --reward trainer.rewards:close_to_answer.
    """
    rewards = []
    for text, wanted in zip(completions, answer, strict=True):
        found, right = _NUMBER.findall(text), _NUMBER.fullmatch(wanted.strip())
        gap = abs(float(found[-1]) - float(wanted)) if found and right else math.inf
        near = 0.5 * max(0.0, 1.0 - gap / max(abs(float(wanted)), 1.0)) if right else 0.0
        rewards.append(1.0 if gap == 0 else near)
    return rewards


def function_name(function: RewardFunction) -> str:
    """How messages call a reward function: module:qualified name."""
    owner = function.func if hasattr(function, "func") else function  # functools.partial
    name = getattr(owner, "__qualname__", type(owner).__qualname__)
    return f"{getattr(owner, '__module__', '?')}:{name}"


def checked_rewards(
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    **columns: list[Any],
) -> list[float | None]:
    """Call `function` and return one finite float, or None, for each completion; it may be sync or async.

    Raises RewardError naming the function, the value and what is expected if it raises, returns another number of
    rewards, or anything but numbers and None. numpy and torch scalars count as numbers; bool as 0 or 1.
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
