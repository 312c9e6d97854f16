"""The types that flow through a training step, and the shape legend.

N rollouts of a step (Q prompts x G rollouts, groups contiguous), P prompt columns (left-padded), T response columns
(right-padded; column t is response position t in every row), V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from trainer.tasks import Prompt


@dataclass(frozen=True, slots=True, eq=False)
class Rollouts:
    """What the sampler returns, before rewards.

    input_ids int64 [N, P + T]: left-padded prompt, then the response, padded right.
    attention_mask bool [N, P + T]; mask bool [N, T]: response tokens, the end token included.
    sampler_logprobs float32 [N, T], 0 where mask is False; truncated bool [N]: no end token within the limit.
    Example, prompt ids [7, 8], response [5, 2] with end token 2, P = 3, T = 3:
        input_ids [[pad, 7, 8, 5, 2, pad]], attention_mask [[0, 1, 1, 1, 1, 0]], mask [[1, 1, 0]].
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    sampler_logprobs: Tensor
    truncated: Tensor

    @property
    def token_ids(self) -> Tensor:
        """int64 [N, T], the response columns."""
        return self.input_ids[:, self.input_ids.shape[1] - self.mask.shape[1] :]


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Rollouts with their groups, rewards and advantages: all that an update needs. The masks are decided here.

    group_ids int64 [N], on the host; rewards, advantages float32 [N]; correct bool [N].
    loss_mask bool [N, T]: `mask` without the responses that loss.mask_truncated and loss.drop_zero_variance leave out.
    Only the loss leaves them out; signals and the record keep them. The other fields are those of Rollouts.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    sampler_logprobs: Tensor
    truncated: Tensor
    group_ids: Tensor
    rewards: Tensor
    correct: Tensor
    advantages: Tensor
    loss_mask: Tensor

    @property
    def token_ids(self) -> Tensor:
        """int64 [N, T], the response columns."""
        return self.input_ids[:, self.input_ids.shape[1] - self.mask.shape[1] :]

    def rows(self, start: int, stop: int) -> TokenBatch:
        return TokenBatch(*(getattr(self, spec.name)[start:stop] for spec in fields(self)))

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True, eq=False)
class LossTerms:
    """What the loss used, so that nothing recomputes it. `loss` is 0-d with gradient; the rest is [N, T] and detached.

    log_ratio = ln p_new - ln p_old, nats. kl: the estimate before any bias correction, nats. Both are 0 where the loss
    reads no logits. clipped_low, clipped_high: bool, True only at weighted tokens; for cispo clipped_high marks its
    cap, and for gspo a response is marked as a whole.
    """

    loss: Tensor
    log_ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl: Tensor


@dataclass(frozen=True, slots=True)
class Scored:
    """Texts and rewards of a step's rollouts, row by row, in the host's memory.

    rewards: the weighted sums that the policy learns from. given: {function: what it gave}, the first of which says
    what is correct; without any the rewards do. sampled: the rewards of every rollout that was sampled for the step,
    those of replaced groups included. lost: how many of the rewards of `sampled` took too long in a worker.
    """

    prompts: Sequence[Prompt]
    completions: list[str]
    completion_ids: list[list[int]]
    rewards: list[float]
    given: Mapping[str, list[float | None]] = field(default_factory=dict)
    sampled: list[float] = field(default_factory=list)
    lost: int = 0

    @property
    def judged(self) -> list[float]:
        """The reward of each row that says whether it is correct."""
        first = next(iter(self.given.values()), None)
        return self.rewards if first is None else [reward or 0.0 for reward in first]


def to_device(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
