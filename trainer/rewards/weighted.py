"""One or more reward functions with their weights, e.g. "task,my_rewards:short=0.2"."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trainer.config import TrainConfig
from trainer.errors import RewardError
from trainer.rewards.checking import RewardFunction, checked_rewards
from trainer.rewards.loading import TASK, load_reward
from trainer.tasks import Task

if TYPE_CHECKING:
    from trainer.rewards.workers import RewardWorkers

GRAMMAR = "Expected FUNCTION or FUNCTION=WEIGHT, several with commas, e.g. 'task,my_rewards:short=0.2'."


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward function, what names it in a configuration, its weight, and the name of its recorded mean."""

    target: str
    name: str
    weight: float
    function: RewardFunction


@dataclass(frozen=True, slots=True)
class Rewards:
    """What responses are rewarded with: sum_i weight_i reward_i over the functions that apply to them.

    A function that returns None for a response does not apply to it and counts 0, as in TRL. The first function says
    which responses are correct. workers: the processes that call them; None: this process does.
    """

    parts: tuple[Reward, ...]
    workers: RewardWorkers | None = None

    def given(self, **arguments: Any) -> dict[str, list[float | None]]:
        """What each function gives, checked. arguments: prompts, completions, completion_ids and the columns."""
        if self.workers is not None:
            return {part.name: self.workers.rewards(part.target, **arguments) for part in self.parts}
        return {part.name: checked_rewards(part.function, **arguments) for part in self.parts}

    @property
    def lost(self) -> int:
        """How many rewards of all calls took too long in a worker or ended it."""
        return 0 if self.workers is None else self.workers.lost

    def total(self, given: Mapping[str, Sequence[float | None]]) -> list[float]:
        """The weighted sum for each response; 0 where no function applies."""
        columns = [[part.weight * (reward or 0.0) for reward in given[part.name]] for part in self.parts]
        return [math.fsum(row) for row in zip(*columns, strict=True)]


def rewards_of(config: TrainConfig, task: Task) -> Rewards:
    """What a configuration's responses are rewarded with. Raises RewardError like `load_rewards`."""
    rewards = load_rewards(config.reward, task.reward)
    if not config.reward_workers:
        return rewards
    from trainer.rewards.workers import RewardWorkers

    targets = [part.target for part in rewards.parts]
    return replace(rewards, workers=RewardWorkers(config.task, targets, config.reward_workers, config.reward_seconds))


def load_rewards(setting: str | None, of_task: RewardFunction) -> Rewards:
    """The functions that `reward` names, or the task's own without any.

    Raises RewardError for another form, a weight that is no finite number, a function that is named twice, or one that
    cannot be loaded.
    """
    entries = [_entry(text.strip(), setting) for text in (setting or TASK).split(",")]
    targets = [target for target, _ in entries]
    twice = [target for target, n in Counter(targets).items() if n > 1]
    if twice:
        raise RewardError(f"reward is {setting!r} which names {twice[0]!r} twice. Give it once, with one weight.")
    if all(weight == 0 for _, weight in entries):
        raise RewardError(f"reward is {setting!r}, whose weights are all 0, so nothing could be learned.")
    short = Counter(target.rpartition(":")[2] for target in targets)
    return Rewards(
        tuple(
            Reward(
                target,
                name if short[name := target.rpartition(":")[2]] == 1 else target,
                weight,
                of_task if target == TASK else load_reward(target),
            )
            for target, weight in entries
        )
    )


def _entry(text: str, setting: str | None) -> tuple[str, float]:
    target, equals, number = (part.strip() for part in text.partition("="))
    if not target or (equals and not number):
        raise RewardError(f"reward is {setting!r}, which has a part {text!r}. {GRAMMAR}")
    try:
        weight = float(number) if equals else 1.0
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise RewardError(
            f"reward is {setting!r}, but {number!r} is no weight for {target!r}: expected a finite number."
        )
    return target, weight
