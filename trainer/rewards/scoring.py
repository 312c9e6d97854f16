"""From rollouts to texts and rewards, on the host."""

from __future__ import annotations

from trainer.flow import Rollouts, Scored
from trainer.policy.policy import Policy
from trainer.rewards.weighted import Rewards
from trainer.tasks import Prompt


def score(policy: Policy, rollouts: Rollouts, prompts: list[Prompt], rewards: Rewards) -> Scored:
    """Decodes the responses and calls the reward functions."""
    mask, token_ids = rollouts.mask.cpu(), rollouts.token_ids.cpu()
    completion_ids = [ids[kept].tolist() for ids, kept in zip(token_ids, mask, strict=True)]
    completions = policy.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    columns = {key: [prompt.columns[key] for prompt in prompts] for key in prompts[0].columns}
    lost_before = rewards.lost
    given = rewards.given(
        prompts=[prompt.text for prompt in prompts],
        completions=completions,
        completion_ids=completion_ids,
        **columns,
    )
    total = rewards.total(given)
    return Scored(prompts, completions, completion_ids, total, given, total, rewards.lost - lost_before)
