"""Reward functions that come with the trainer, for tasks whose own reward is too sparse."""

from __future__ import annotations

import math
import re
from typing import Any

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def close_to_answer(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], *, answer: list[str], **columns: Any
) -> list[float]:
    """A shaped reward for models that are rarely right: how near the completion's last number x is to the answer y.

    1.0 if x = y, else 0.5 * max(0, 1 - |x - y| / max(|y|, 1)); 0.0 if the completion or the answer holds no number.
    Example: answer 20, "about 15" -> 0.5 * (1 - 5/20) = 0.375.
    Source: none, ours. Use it with --reward trainer.rewards:close_to_answer.
    """
    rewards = []
    for text, wanted in zip(completions, answer, strict=True):
        found, right = _NUMBER.findall(text), _NUMBER.fullmatch(wanted.strip())
        gap = abs(float(found[-1]) - float(wanted)) if found and right else math.inf
        near = 0.5 * max(0.0, 1.0 - gap / max(abs(float(wanted)), 1.0)) if right else 0.0
        rewards.append(1.0 if gap == 0 else near)
    return rewards
