"""What a task is: prompts in splits, a reward function with TRL's signature, canonical forms of answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)  # where prompts ask for it; the last one counts
SPLITS = ("train", "heldout", "ood", "multipath")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem. `columns` (e.g. {"answer": "24"}) are handed to reward functions, one list per column."""

    id: str
    text: str
    split: str
    columns: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A verifiable task. Adding one: a module with such a class, a row in `trainer.tasks.TASKS`, a test."""

    name: str
    correct_at: float  # a completion is correct if its reward is at least this
    has_forms: bool  # whether `canonical` tells correct answers apart; else evaluations have no "distinct"
    system_prompt: str | None  # sent before the prompt to models with a chat template

    def prompts(self, split: str) -> Sequence[Prompt]:
        """Prompts of a split of SPLITS, always in the same order; empty if the task has no such split."""
        ...

    def reward(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: list[Any]
    ) -> list[float | None]:
        """One reward per completion (TRL's signature); None where it does not apply."""
        ...

    def gives_answer(self, completion: str) -> bool:
        """Whether the task's own reward finds an answer in it where prompts ask for one, right or wrong."""
        ...

    def canonical(self, prompt: Prompt, completion: str) -> str | None:
        """The form under which equal correct answers count as one; None where the task has no such idea."""
        ...
