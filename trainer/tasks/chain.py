"""The first built-in task: reach a number by written steps of single-digit arithmetic.

Prompt "57:" asks for a chain of 3 to 6 steps that ends in 57, e.g. "9*5=45,45+8=53,53+4=57;". The first step starts
from a digit, and each later step from the result before it. Each operand is a digit 1 to 9, the operators are + - *,
and every result is in 0 to 999. Every target has thousands of correct chains, so a policy that still explores shows
many of them: pass@1 says how often it is right, and distinct correct answers say in how many ways.

Splits divide the targets 10 to 99: `multipath` has ten targets with many divisors (short chains by * as well as
by +), `heldout` every sixth of the others, and `train` the rest. `ood` has the 50 targets after 99, which reinforcement
learning never sees. "chain:60-99" takes other targets than 10 to 99. Large ones are harder, and above 150 the built-in
policies hardly ever succeed.
"""

from __future__ import annotations

import re
from typing import Any

from trainer.tasks.base import Prompt

MIN_STEPS, MAX_STEPS = 3, 6
MAX_RESULT = 999
MIN_TARGETS = 12
_STEP = re.compile(r"(\d+)([+*-])(\d)=(\d+)")
_MULTIPATH = (24, 30, 36, 40, 48, 60, 64, 72, 84, 96)


def apply(op: str, a: int, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b


def parse_chain(completion: str) -> list[tuple[int, str, int, int]] | None:
    """The steps (a, op, b, result) of a valid chain, None if any rule of the module's docstring is broken.

    >>> parse_chain("9*5=45,45+8=53,53+4=57;")
    [(9, '*', 5, 45), (45, '+', 8, 53), (53, '+', 4, 57)]
    """
    written = written_steps(completion)
    if written is None:
        return None
    steps: list[tuple[int, str, int, int]] = []
    for a, op, b, result in written:
        starts_right = 1 <= a <= 9 if not steps else a == steps[-1][3]
        if not (starts_right and 1 <= b <= 9 and apply(op, a, b) == result <= MAX_RESULT):
            return None
        steps.append((a, op, b, result))
    return steps


def written_steps(completion: str) -> list[tuple[int, str, int, int]] | None:
    """(a, op, b, result) of 3 to 6 steps as they are written, right or wrong; None for any other text."""
    matches = [_STEP.fullmatch(part) for part in completion.strip().removesuffix(";").split(",")]
    if not MIN_STEPS <= len(matches) <= MAX_STEPS:
        return None
    steps = [(int(match[1]), match[2], int(match[3]), int(match[4])) for match in matches if match]
    return steps if len(steps) == len(matches) else None


class ChainTask:
    """See the module's docstring. Reward 1.0 for a valid chain that ends in the target, else 0.0."""

    name = "chain"
    correct_at = 1.0
    has_forms = True
    system_prompt = None

    def __init__(self, targets: str = "10-99") -> None:
        """targets: "LOW-HIGH", both included. Raises ValueError for other text or fewer than twelve targets."""
        match = re.fullmatch(r"(\d+)-(\d+)", targets)
        low, high = (int(match[1]), int(match[2])) if match else (0, 0)
        if not (low + MIN_TARGETS - 1 <= high <= MAX_RESULT):
            raise ValueError(
                f"Task 'chain:{targets}' names no targets: expected chain:LOW-HIGH with {MIN_TARGETS} targets or more, "
                f"the highest at most {MAX_RESULT}, e.g. chain:60-99."
            )
        self._targets = range(low, high + 1)

    def prompts(self, split: str) -> list[Prompt]:
        ordinary = [n for n in self._targets if n not in _MULTIPATH]
        targets = {
            "train": [n for n in ordinary if n % 6 != 5],
            "heldout": [n for n in ordinary if n % 6 == 5],
            "multipath": [n for n in self._targets if n in _MULTIPATH],
            "ood": [n for n in range(self._targets.stop, self._targets.stop + 50) if n <= MAX_RESULT],
        }[split]
        return [Prompt(f"{n}", f"{n}:", split, {"target": n}) for n in targets]

    def reward(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        rewards: list[float | None] = []
        for completion, target in zip(completions, columns["target"], strict=True):
            steps = parse_chain(completion)
            rewards.append(float(steps is not None and steps[-1][3] == target))
        return rewards

    def gives_answer(self, completion: str) -> bool:
        """Written as steps, as many as are allowed, whether or not their sums are right."""
        return written_steps(completion) is not None

    def canonical(self, prompt: Prompt, completion: str) -> str | None:
        """The chain, with the first step's operands in order where they commute: 5*9 and 9*5 have one form."""
        steps = parse_chain(completion)
        if steps is None:
            return None
        a, op, b, _ = steps[0]
        first = f"{min(a, b)}{op}{max(a, b)}" if op in "+*" else f"{a}{op}{b}"
        return ",".join([first, *(f"{op}{b}" for _, op, b, _ in steps[1:])])
