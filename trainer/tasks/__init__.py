"""The registry of tasks: a name, "<kind>:<argument>", or a user's own "package.module:function" makes a Task."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from monitor.errors import nearest
from trainer.rewards.loading import load_function
from trainer.tasks.base import SPLITS, Prompt, Task

TASKS = {  # kind -> "module:class"; kinds with an argument end in ":"
    "chain": "trainer.tasks.chain:ChainTask",
    "chain:": "trainer.tasks.chain:ChainTask",
    "paths": "trainer.tasks.paths:PathsTask",
    "reasoning_gym:": "trainer.tasks.reasoning_gym:ReasoningGymTask",
    "jsonl:": "trainer.tasks.jsonl:JsonlTask",
}

__all__ = ["SPLITS", "TASKS", "Prompt", "Task", "make_task"]


def make_task(name: str) -> Task:
    """The task called `name`: "chain", "chain:<low>-<high>", "paths", "reasoning_gym:<dataset>", "jsonl:<path>", or
    what the function or class "package.module:function" returns.

    Raises ValueError with the nearest known name for an unknown one, or with what a task of a user's own lacks.
    """
    kind, colon, argument = name.partition(":")
    target = TASKS.get(kind + colon)
    if target is None and colon and argument.isidentifier() and all(part.isidentifier() for part in kind.split(".")):
        return _own_task(name)
    if target is None or (colon and not argument):
        known = ", ".join(f"{k}<...>" if k.endswith(":") else k for k in TASKS)
        hint = nearest(kind, [k.rstrip(":") for k in TASKS])
        raise ValueError(f"Unknown task {name!r}.{hint} Known tasks: {known}, or your own as package.module:function.")
    module, _, cls = target.partition(":")
    factory = getattr(import_module(module), cls)
    return cast(Task, factory(argument) if colon else factory())


def _own_task(name: str) -> Task:
    """The task that a function or class of the user's makes, with everything that a run asks of it."""
    try:
        made = load_function("task", name, "my_tasks:Sums", ValueError)()
    except ValueError as error:
        hint = nearest(name.partition(":")[0], [kind.rstrip(":") for kind in TASKS])
        raise ValueError(f"{error}{hint}") from error
    asked = {*Task.__annotations__, *(part for part in vars(Task) if not part.startswith("_"))}
    missing = sorted(part for part in asked if not hasattr(made, part))
    if missing:
        raise ValueError(
            f"task {name!r} makes a {type(made).__name__} without {', '.join(missing)}. A task has all that "
            "trainer.tasks.Task lists (docs/extending.md)."
        )
    if not made.prompts("train"):
        raise ValueError(f"task {name!r} has no prompts of split 'train', so there is nothing to train on.")
    return cast(Task, made)
