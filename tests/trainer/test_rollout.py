"""Sampling: log-probabilities, reproducibility, padding, rows that end early, limits."""

from __future__ import annotations

import pytest
import torch

from trainer.errors import NonFiniteError
from trainer.rollout import generate
from trainer.rollout.prompts import encode_prompts
from trainer.rollout.sampling import sample
from trainer.tasks import Prompt


def draw(policy, texts, seed=0, temperature=1.0, limit=24, max_batch=1024):
    prompts = encode_prompts(policy, [Prompt(t, t, "train") for t in texts], None, limit)
    generator = torch.Generator().manual_seed(seed)
    return sample(
        policy, prompts, max_new_tokens=limit, temperature=temperature, generator=generator, max_batch=max_batch
    )


TEXTS = ["7:", "57:", "123:", "9:"] * 8  # three prompt lengths, so left padding matters


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_log_probabilities_agree(policy, temperature):
    rollouts = draw(policy, TEXTS, temperature=temperature)
    mask = rollouts.mask
    with torch.no_grad():
        hidden = policy.hidden(rollouts)
        logprob, _ = policy.logprobs(hidden[mask], rollouts.token_ids[mask], temperature)
    torch.testing.assert_close(logprob, rollouts.sampler_logprobs[mask], atol=2e-5, rtol=0)
    assert (rollouts.sampler_logprobs[~mask] == 0).all()


def test_equal_seeds_draw_alike_and_others_differ(policy):
    first, again, other = draw(policy, TEXTS, 1), draw(policy, TEXTS, 1), draw(policy, TEXTS, 2)
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.sampler_logprobs, again.sampler_logprobs)
    assert first.input_ids.shape != other.input_ids.shape or not torch.equal(first.input_ids, other.input_ids)


def test_each_response_ends_at_its_first_end_token_or_at_the_limit(policy):
    rollouts = draw(policy, TEXTS, limit=12)
    end = policy.tokenizer.eos_token_id
    for ids, mask, truncated in zip(rollouts.token_ids, rollouts.mask, rollouts.truncated, strict=True):
        kept = ids[mask].tolist()
        assert len(kept) == int(mask.sum()) and mask[: len(kept)].all()  # no holes
        assert end not in kept[:-1]
        assert bool(truncated) == (kept[-1] != end)
        assert not truncated or len(kept) == 12
    assert rollouts.truncated.any() and not rollouts.truncated.all()


@pytest.mark.parametrize(("every", "max_batch"), [(1, 1024), (3, 5), (10**6, 7)])
def test_rows_that_end_early_and_chunks_keep_each_response_with_its_cache(policy, monkeypatch, every, max_batch):
    """A row that got another row's keys and values would be far from its own log-probabilities."""
    monkeypatch.setattr(generate, "COMPACT_EVERY", every)
    rollouts = draw(policy, TEXTS, limit=30, max_batch=max_batch)
    with torch.no_grad():
        hidden = policy.hidden(rollouts)
        logprob, _ = policy.logprobs(hidden[rollouts.mask], rollouts.token_ids[rollouts.mask], 1.0)
    torch.testing.assert_close(logprob, rollouts.sampler_logprobs[rollouts.mask], atol=2e-5, rtol=0)


def test_sampled_frequencies_follow_the_policy(policy):
    rollouts = draw(policy, ["57:"] * 4000, limit=1)
    with torch.no_grad():
        logits = policy.project(policy.hidden(rollouts))[0, 0]
    expected = torch.softmax(logits, -1)
    counts = torch.bincount(rollouts.token_ids[:, 0], minlength=len(expected))
    # each count is binomial: five standard deviations of sqrt(4000 p (1 - p))
    bound = 5 * torch.sqrt(4000 * expected * (1 - expected)) + 1
    assert ((counts - 4000 * expected).abs() < bound).all()


def test_a_prompt_too_long_for_the_context_is_named(policy):
    with pytest.raises(ValueError, match=r"Prompt 'p9' has 60 tokens and rollout.max_new_tokens is 24, but .* 64"):
        encode_prompts(policy, [Prompt("p9", "1" * 60, "train")], None, 24)


def test_non_finite_logits_stop_the_sampling(policy):
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        draw(policy, ["57:"])
