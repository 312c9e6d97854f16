"""Loading functions of a user's own by their name.

A reward function has TRL's signature, so functions written for TRL work.

A reward function is `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async. It
returns None for a completion that it does not apply to. TRL's optional keywords (trainer_state, log_metric, ...) are
not passed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from monitor.errors import nearest
from trainer.errors import RewardError
from trainer.rewards.checking import RewardFunction

TASK = "task"  # the name of the task's own reward
_FORMAT = "expected 'package.module:function'"


def load_reward(target: str) -> RewardFunction:
    """The function named "package.module:function".

    Raises RewardError if the text has another form, the module cannot be imported, or it holds no such function.
    """
    return load_function("reward", target, "my_rewards:exact_match", RewardError)


def load_function(setting: str, target: str, example: str, error_type: type[Exception]) -> Callable[..., Any]:
    """What `setting` names as "package.module:function"; modules are also looked for in the working directory.

    Raises `error_type`, naming the setting, if the text has another form, the module cannot be imported, or it holds no
    such function.
    """
    module_name, colon, name = target.partition(":")
    if not (colon and module_name and name):
        raise error_type(f"{setting} is {target!r}, {_FORMAT}, e.g. {example!r}.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = import_module(module_name)
    except Exception as error:
        raise error_type(
            f"{setting} {target!r}: module {module_name!r} cannot be imported: {type(error).__name__}: {error}. "
            f"Install it, or start rlvr in the folder that holds it."
        ) from error
    function = getattr(module, name, None)
    if function is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        ours = module_name in ("monitor", "trainer", "dashboard")
        hint = f" {module_name!r} is a package of rlvr-monitor: call your file something else." if ours else ""
        raise error_type(
            f"{setting} {target!r}: module {module_name!r} has no function {name!r}.{nearest(name, known)}{hint}"
        )
    if not callable(function):
        raise error_type(f"{setting} {target!r} is a {type(function).__name__}, expected a function.")
    return cast(Callable[..., Any], function)
