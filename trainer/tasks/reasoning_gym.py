"""`reasoning_gym:<name>`: the procedurally generated problems of the reasoning-gym package, scored 0 or 1.

The package's scorers give part of the reward to any text that contains the answer, which a policy learns to exploit.
So only what stands in <answer>...</answer> is scored, and only a full score counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import reasoning_gym
from reasoning_gym.coaching.base_curriculum import RangeAttributeDefinition
from reasoning_gym.factory import DATASETS, create_curriculum, has_curriculum

from monitor.errors import nearest
from trainer.tasks.base import ANSWER, Prompt

HELDOUT = OOD = 128  # prompts in these splits, fewer if the dataset repeats itself
_TRIES = 4  # problems generated for each wanted one; if too many repeat, the split stays shorter


def extract_answer(completion: str) -> str | None:
    """The text of the last <answer>...</answer>, without outer white space; None if there is none or it is empty."""
    found = ANSWER.findall(completion)
    return (found[-1].strip() or None) if found else None


class ReasoningGymTask:
    """One dataset of reasoning-gym. Items are deterministic in (name, seed, index).

    Splits: train has the first `size` items. heldout has up to 128 later items whose question is not in train. ood has
    up to 128 items of a harder configuration, if the dataset's curriculum has one beyond the defaults. multipath is
    empty. Raises ValueError for an unknown name, or for a dataset that cannot be made from its defaults.
    """

    correct_at = 1.0
    has_forms = True
    system_prompt: str | None = (
        "Solve the problem step by step. Give the final answer, and nothing else, between <answer> and </answer>."
    )

    def __init__(self, name: str, seed: int = 0, size: int = 512) -> None:
        if name not in DATASETS:
            raise ValueError(
                f"Unknown reasoning-gym dataset {name!r}.{nearest(name, DATASETS)} There are {len(DATASETS)}, e.g. "
                "chain_sum, gcd, basic_arithmetic."
            )
        if size < 1:
            raise ValueError(f"size is {size}, expected at least 1 training prompt.")
        self.name = f"reasoning_gym:{name}"
        self._dataset, self._seed, self._size = name, seed, size
        self._splits: dict[str, list[Prompt]] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._scorer = self._make(size * (1 + _TRIES) + _TRIES * HELDOUT)

    def prompts(self, split: str) -> list[Prompt]:
        """Prompts of a split, generated on first use."""
        if split not in self._splits:
            self._splits[split] = list(self._generate(split))
        return self._splits[split]

    def reward(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: list[Any]
    ) -> list[float | None]:
        """1.0 for a fully right <answer>, else 0.0. Needs the column "problem", the prompts' ids."""
        if "problem" not in columns:
            raise ValueError(f"{self.name}: the reward needs the column 'problem', got {', '.join(columns) or 'none'}.")
        return [self._score(id, text) for id, text in zip(columns["problem"], completions, strict=True)]

    def gives_answer(self, completion: str) -> bool:
        """With <answer>...</answer>."""
        return extract_answer(completion) is not None

    def canonical(self, prompt: Prompt, completion: str) -> str | None:
        """The extracted answer with single spaces if it is right, else None."""
        answer = extract_answer(completion)
        right = answer is not None and self._score(prompt.id, completion) >= self.correct_at
        return " ".join(answer.split()) if right and answer is not None else None

    def _score(self, problem: str, completion: str) -> float:
        answer = extract_answer(completion)
        if answer is None:
            return 0.0
        if problem not in self._entries:
            self.prompts(problem.partition("-")[0])
        try:
            score = float(self._scorer.score_answer(answer=answer, entry=self._entries[problem]))
        except Exception:  # some scorers parse the answer and raise on what a policy writes
            return 0.0
        return 1.0 if score >= 1.0 else 0.0

    def _generate(self, split: str) -> Iterator[Prompt]:
        if split == "train":
            yield from self._take(self._scorer, split, range(self._size), self._size, set())
        elif split == "heldout":
            known = {prompt.text for prompt in self.prompts("train")}
            yield from self._take(
                self._scorer, split, range(self._size, self._size + _TRIES * HELDOUT), HELDOUT, known, unique=True
            )
        elif split == "ood":
            harder = self._harder()
            if harder is not None:
                known = {prompt.text for prompt in self.prompts("train")}
                yield from self._take(harder, split, range(_TRIES * OOD), OOD, known, unique=True)

    def _take(
        self, dataset: Any, split: str, indices: range, wanted: int, known: set[str], *, unique: bool = False
    ) -> Iterator[Prompt]:
        """The first `wanted` prompts of `indices`; with `unique`, only those with a question not seen before."""
        taken = 0
        for index in indices:
            if taken == wanted:
                return
            entry = dataset[index]
            text = str(entry["question"])
            if unique and text in known:
                continue
            known.add(text)
            taken += 1
            id = f"{split}-{index}"
            self._entries[id] = entry
            yield Prompt(id, text, split, {"answer": str(entry["answer"]), "problem": id})

    def _make(self, size: int, **config: Any) -> Any:
        try:
            return reasoning_gym.create_dataset(self._dataset, size=size, seed=self._seed, **config)
        except Exception as error:
            raise ValueError(
                f"reasoning-gym dataset {self._dataset!r} cannot be made from its defaults: "
                f"{type(error).__name__}: {error}. Choose another one."
            ) from error

    def _harder(self) -> Any:
        """The dataset at a harder level than the defaults; None if its curriculum has no such level that works.

        First all attributes of the curriculum are raised at once. If that does not work, single ones are tried, the
        last first: curricula name structure first and sizes of numbers last, and an item of deeper structure can take
        seconds to generate.
        """
        single = _raised(self._dataset, self._scorer.config)
        together = {key: value for raised in single for key, value in raised.items()}
        for config in [together, *single[::-1]] if single else []:
            try:
                harder = self._make(_TRIES * OOD, **config)
                harder[0]
            except Exception:  # these values do not fit together, or exceed what the dataset can make
                continue
            return harder
        return None


def _raised(name: str, default: Any) -> list[dict[str, Any]]:
    """For each attribute of the curriculum, the settings of its first level above the default's upper limit."""
    found: list[dict[str, Any]] = []
    if not has_curriculum(name):
        return found
    for attribute in create_curriculum(name).attributes.values():
        if isinstance(attribute, RangeAttributeDefinition):
            lower, upper = attribute.lower_field_name, attribute.upper_field_name
        elif attribute.field_name.startswith("max_"):  # for other scalars nothing says whether more is harder
            lower = upper = attribute.field_name
        else:
            continue
        top = getattr(default, upper, None)
        if not isinstance(top, (int, float)):
            continue
        above = [level for level in attribute.levels if isinstance(level, (int, float)) and level > top]
        if above:
            bottom = min(top + 1, above[0]) if isinstance(top, int) else above[0]
            found.append({upper: above[0]} | ({lower: bottom} if lower != upper else {}))
    return found
