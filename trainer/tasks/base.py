"""What a task is: prompts in splits, a reward function with TRL's signature, canonical forms of answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)  # where prompts ask answers to stand; the last match counts
SPLITS = ("train", "heldout", "ood", "multipath")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem. Reward functions get its `columns` (e.g. {"answer": "24"}), as one list for each column."""

    id: str
    text: str
    split: str
    columns: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A verifiable task: what `make_task` of a name returns. One of your own is named as package.module:function."""

    name: str
    correct_at: float  # a completion is correct if its reward is at least this
    has_forms: bool  # whether `canonical` tells correct answers apart; if not, evaluations have no "distinct"
    system_prompt: str | None  # sent before the prompt to models with a chat template

    def prompts(self, split: str) -> Sequence[Prompt]:
        """Prompts of a split of SPLITS, always in the same order; empty if the task has no such split."""
        ...

    def reward(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: list[Any]
    ) -> list[float | None]:
        """One reward for each completion, None where the reward does not apply. The signature is TRL's."""
        ...

    def gives_answer(self, completion: str) -> bool:
        """Whether the task's own reward finds an answer in it where prompts ask for one, right or wrong."""
        ...

    def canonical(self, prompt: Prompt, completion: str) -> str | None:
        """The form of a correct answer. Answers of the same form count as one. None if the task has no forms."""
        ...
