"""Prompts: their order over the steps, and their token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.config import TrainConfig
from trainer.config.settings import EvalConfig
from trainer.policy.policy import Policy
from trainer.tasks import Prompt, Task


class PromptStream:
    """Endless steps of `per_step` prompts: each epoch visits every prompt once, in a new seeded order.

    Raises ValueError if a step asks for more prompts than there are.
    """

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int) -> None:
        if per_step > len(prompts):
            raise ValueError(
                f"rollout.prompts is {per_step} but the task's train split has {len(prompts)} prompts, and a step "
                f"cannot hold a prompt twice. Set rollout.prompts to at most {len(prompts)}."
            )
        self._prompts, self._per_step, self._rng = prompts, per_step, np.random.default_rng(seed)
        self._queue: list[int] = []

    def __next__(self) -> list[Prompt]:
        while len(self._queue) < self._per_step:
            waiting = set(self._queue)
            self._queue += [int(i) for i in self._rng.permutation(len(self._prompts)) if int(i) not in waiting]
        step, self._queue = self._queue[: self._per_step], self._queue[self._per_step :]
        return [self._prompts[i] for i in step]

    def state_dict(self) -> dict[str, Any]:
        """The stream's position, as plain JSON types."""
        return {"prompts": len(self._prompts), "queue": self._queue, "rng": self._rng.bit_generator.state}

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if `state` was saved for a task with another number of prompts."""
        if state["prompts"] != len(self._prompts):
            raise ValueError(f"the task had {state['prompts']} training prompts then and has {len(self._prompts)} now")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict()`. Raises ValueError as `check` does."""
        self.check(state)
        self._queue, self._rng.bit_generator.state = list(state["queue"]), state["rng"]


def evaluation_prompts(config: TrainConfig, task: Task) -> dict[str, list[Prompt]]:
    """The prompts that an evaluation of the run samples, for each configured split that the task has."""
    found = {split: chosen_prompts(task.prompts(split), config.eval) for split in config.eval.splits}
    return {split: prompts for split, prompts in found.items() if prompts}


def chosen_prompts(prompts: Sequence[Prompt], evaluation: EvalConfig) -> list[Prompt]:
    """eval.prompts of a split's prompts, in their order: the first, or random ones whatever the run's seed."""
    if evaluation.choice == "first":
        return list(prompts[: evaluation.prompts])
    order = np.random.default_rng(0).permutation(len(prompts))
    return [prompts[index] for index in sorted(order[: evaluation.prompts])]


def system_prompt(config: TrainConfig, task: Task) -> str | None:
    """What stands before each prompt: rollout.system_prompt, else the task's own; None for nothing."""
    given = config.rollout.system_prompt
    return (task.system_prompt if given is None else given) or None


def prompt_ids(tokenizer: Any, prompt: Prompt, system: str | None) -> list[int]:
    """The prompt's token ids, through the chat template where the tokenizer has one."""
    if not tokenizer.chat_template:
        text = f"{system}\n\n{prompt.text}" if system else prompt.text
        plain: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return plain
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt.text})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def encode_prompts(policy: Policy, prompts: list[Prompt], system: str | None, max_new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt, through the chat template where the tokenizer has one.

    Raises ValueError for a prompt that leaves no room for `max_new_tokens` in the model's context.
    """
    encoded: list[list[int]] = []
    for prompt in prompts:
        ids = prompt_ids(policy.tokenizer, prompt, system)
        if not ids or len(ids) + max_new_tokens > policy.context:
            raise ValueError(
                f"Prompt {prompt.id!r} of split {prompt.split!r} has {len(ids)} tokens and rollout.max_new_tokens is "
                f"{max_new_tokens}, but the model's context is {policy.context} tokens. Lower rollout.max_new_tokens "
                "or shorten the prompt."
            )
        encoded.append(ids)
    return encoded
