"""The rollouts of a step as rows of the store: texts, rewards, advantages."""

from __future__ import annotations

import numpy as np

from monitor.records import SampleTable
from monitor.token_texts import TokenTexts
from trainer.flow import Scored, TokenBatch


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
