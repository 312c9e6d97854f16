"""The registry of tasks: a name, or "<kind>:<argument>", makes a Task."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from monitor.errors import nearest
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
    """The task called `name`: "chain", "chain:<low>-<high>", "paths", "reasoning_gym:<dataset>" or "jsonl:<path>".

    Raises ValueError with the nearest known name for an unknown one.
    """
    kind, colon, argument = name.partition(":")
    target = TASKS.get(kind + colon)
    if target is None or (colon and not argument):
        known = ", ".join(f"{k}<...>" if k.endswith(":") else k for k in TASKS)
        hint = nearest(kind, [k.rstrip(":") for k in TASKS])
        raise ValueError(f"Unknown task {name!r}.{hint} Known tasks: {known}.")
    module, _, cls = target.partition(":")
    factory = getattr(import_module(module), cls)
    return cast(Task, factory(argument) if colon else factory())
