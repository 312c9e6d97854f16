"""Rollouts to rewards and a TokenBatch; prompts in a seeded order; texts for the store. The host side of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from monitor.records import SampleTable
from trainer.advantages import group_advantages, zero_variance
from trainer.config import TrainConfig
from trainer.policy import Policy
from trainer.tasks import Prompt, Task
from trainer.tokens import Rollouts, Scored, TokenBatch, to_device

RewardFunction = Callable[..., list[float | None]]


class PromptStream:
    """Endless steps of `per_step` prompts: each epoch visits every prompt once, in a new seeded order.

    Raises ValueError if a step asks for more prompts than there are.
    """

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int) -> None:
        if per_step > len(prompts):
            raise ValueError(
                f"rollout.prompts is {per_step} but the task's train split has {len(prompts)} prompts; "
                f"a step cannot hold one twice. Set rollout.prompts to at most {len(prompts)}."
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
        """Where the stream stands, as plain JSON types."""
        return {"prompts": len(self._prompts), "queue": self._queue, "rng": self._rng.bit_generator.state}

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if a `state_dict()` is of a task with another number of prompts."""
        if state["prompts"] != len(self._prompts):
            raise ValueError(f"the task had {state['prompts']} training prompts then and has {len(self._prompts)} now")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Raises ValueError as `check` does."""
        self.check(state)
        self._queue, self._rng.bit_generator.state = list(state["queue"]), state["rng"]


def evaluation_prompts(config: TrainConfig, task: Task) -> dict[str, list[Prompt]]:
    """The prompts that an evaluation of the run samples, for each configured split that the task has."""
    found = {split: list(task.prompts(split))[: config.eval.prompts] for split in config.eval.splits}
    return {split: prompts for split, prompts in found.items() if prompts}


def score(policy: Policy, rollouts: Rollouts, prompts: list[Prompt], reward: RewardFunction) -> Scored:
    """Decodes the responses and asks the reward function; a reward of None counts as 0."""
    mask, token_ids = rollouts.mask.cpu(), rollouts.token_ids.cpu()
    completion_ids = [ids[kept].tolist() for ids, kept in zip(token_ids, mask, strict=True)]
    completions = policy.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    columns = {key: [prompt.columns[key] for prompt in prompts] for key in prompts[0].columns}
    rewards = reward(
        prompts=[prompt.text for prompt in prompts],
        completions=completions,
        completion_ids=completion_ids,
        **columns,
    )
    return Scored(prompts, completions, completion_ids, [0.0 if r is None else float(r) for r in rewards])


def token_batch(rollouts: Rollouts, scored: Scored, correct_at: float, config: TrainConfig) -> TokenBatch:
    """The batch an update trains on; rollouts of a group are contiguous."""
    device = rollouts.mask.device
    group_ids = torch.arange(len(scored.rewards)) // config.rollout.group_size
    rewards = to_device(scored.rewards, device)
    left_out = torch.zeros_like(rollouts.truncated)
    if config.loss.mask_truncated:
        left_out = left_out | rollouts.truncated
    if config.loss.drop_zero_variance:
        left_out = left_out | zero_variance(rewards, group_ids)
    return TokenBatch(
        input_ids=rollouts.input_ids,
        attention_mask=rollouts.attention_mask,
        mask=rollouts.mask,
        sampler_logprobs=rollouts.sampler_logprobs,
        truncated=rollouts.truncated,
        group_ids=group_ids,
        rewards=rewards,
        correct=rewards >= correct_at,
        advantages=group_advantages(rewards, group_ids, scale_by_std=config.loss.scale_by_std),
        loss_mask=rollouts.mask & ~left_out.unsqueeze(1),
    )


class TokenTexts:
    """Texts of token ids, each decoded once."""

    def __init__(self, policy: Policy) -> None:
        self._decode = policy.tokenizer.decode
        self._texts: dict[int, str] = {}

    def __call__(self, completion_ids: list[list[int]]) -> list[list[str]]:
        for token in {token for ids in completion_ids for token in ids} - self._texts.keys():
            self._texts[token] = self._decode([token])
        return [list(map(self._texts.__getitem__, ids)) for ids in completion_ids]


def sample_table(batch: TokenBatch, scored: Scored, texts: TokenTexts) -> SampleTable:
    """One row for each rollout of the step, with its texts."""
    n = len(batch)
    return SampleTable(
        sample=np.arange(n, dtype=np.int32),
        group_id=batch.group_ids.numpy().astype(np.int32),
        prompt_id=[prompt.id for prompt in scored.prompts],
        split=[prompt.split for prompt in scored.prompts],
        reward=batch.rewards.cpu().numpy(),
        correct=batch.correct.cpu().numpy(),
        advantage=batch.advantages.cpu().numpy(),
        n_tokens=np.array([len(ids) for ids in scored.completion_ids], dtype=np.int32),
        truncated=batch.truncated.cpu().numpy(),
        prompt=[prompt.text for prompt in scored.prompts],
        completion=scored.completions,
        token_texts=texts(scored.completion_ids),
    )
