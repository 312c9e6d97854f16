"""From scored rollouts to the batch that an update trains on."""

from __future__ import annotations

import torch

from trainer.config import TrainConfig
from trainer.flow import Rollouts, Scored, TokenBatch, to_device
from trainer.learning.advantages import group_advantages, zero_variance


def token_batch(rollouts: Rollouts, scored: Scored, correct_at: float, config: TrainConfig) -> TokenBatch:
    """The batch that an update trains on. Rollouts of a group must be contiguous."""
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
        correct=to_device(scored.judged, device) >= correct_at,
        advantages=group_advantages(rewards, group_ids, scale_by_std=config.loss.scale_by_std),
        loss_mask=rollouts.mask & ~left_out.unsqueeze(1),
    )
