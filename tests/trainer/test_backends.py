"""How rollouts are sampled: shared prompts, fixed shapes, paging, and a trained module that nothing touches."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rounding import LARGEST, rounding, stored_results, summed_terms
from tiny import tiny_policy

from trainer.config import ConfigError, TrainConfig
from trainer.errors import NonFiniteError
from trainer.rollout import generate as generate_module
from trainer.rollout import sampling as rollout_module
from trainer.rollout.generate import FixedCache, GrowingCache, _graphed, generate
from trainer.rollout.prompts import encode_prompts
from trainer.rollout.sampler_copy import SamplerCopy, sampler_copy_of
from trainer.rollout.sampling import choose_backend, sample
from trainer.runtime.ranks import Ranks
from trainer.tasks import Prompt

TEXTS = [text for text in ("7:", "57:", "123:", "9:") for _ in range(8)]  # four groups of 8, three prompt lengths
UNEVEN = ["7:", "57:", "57:", "123:", "7:"]  # no group size


def draw(policy, texts=TEXTS, seed=0, temperature=0.9, limit=24, backend="paged", max_batch=1024):
    prompts = encode_prompts(policy, [Prompt(t, t, "train") for t in texts], None, limit)
    return sample(
        policy, prompts, max_new_tokens=limit, temperature=temperature, max_batch=max_batch, backend=backend,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def gaps(policy, rollouts, temperature):
    """ln p of sampler less trainer at each token, and the logits over the temperature."""
    mask = rollouts.mask
    with torch.no_grad():
        hidden = policy.hidden(rollouts)[mask]
        logprob, _ = policy.logprobs(hidden, rollouts.token_ids[mask], temperature)
        logits = policy.project(hidden).float() / temperature
    assert (rollouts.sampler_logprobs[~mask] == 0).all()
    return rollouts.sampler_logprobs[mask] - logprob, logits


def rms(values):
    return float(values.double().square().mean().sqrt())


def assert_agree(policy, rollouts, temperature=0.9):
    """Sampler and trainer give each token the same probability, but for the rounding of float32 sums."""
    found, logits = gaps(policy, rollouts, temperature)
    terms = summed_terms(policy.model.config, rollouts.input_ids.shape[1])
    assert found.abs().max() < LARGEST * rounding(torch.float32, terms, float(logits.abs().max()))


@pytest.fixture
def replayed(monkeypatch):
    """replayed(rollouts): later draws take these tokens, so that two ways meet the same prefixes to the end.

    Their probabilities differ by rounding: free draws would part where a random number falls into that gap.
    """
    monkeypatch.setattr(generate_module, "COMPACT_EVERY", 10**6)  # every row stays

    def along(rollouts):
        columns, none = iter(rollouts.token_ids.T), torch.zeros(len(rollouts.mask), dtype=torch.long)
        monkeypatch.setattr(generate_module, "_draw", lambda logp, generator: next(columns, none))

    return along


@pytest.mark.parametrize("texts", [TEXTS, UNEVEN, ["7"] * 4], ids=["groups", "uneven", "one token"])
@pytest.mark.parametrize("max_batch", [1024, 5])
def test_paged_responses_are_whole_and_have_the_trainers_log_probabilities(policy, texts, max_batch):
    rollouts = draw(policy, texts, max_batch=max_batch)
    assert_agree(policy, rollouts)
    prompts = encode_prompts(policy, [Prompt(t, t, "train") for t in texts], None, 24)
    end, width = policy.tokenizer.eos_token_id, rollouts.mask.shape[1]
    for i, ids in enumerate(prompts):
        seen = rollouts.attention_mask[i, : -width or None]
        assert rollouts.input_ids[i, : -width or None][seen].tolist() == ids  # row i answers prompt i
        kept = rollouts.token_ids[i][rollouts.mask[i]].tolist()
        assert rollouts.mask[i, : len(kept)].all() and end not in kept[:-1]
        assert bool(rollouts.truncated[i]) == (kept[-1] != end) and (kept[-1] == end or len(kept) == 24)


def test_paged_draws_are_those_of_the_seed_and_leave_the_global_generator(policy):
    state = torch.get_rng_state()
    first, again, other = draw(policy, seed=1), draw(policy, seed=1), draw(policy, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.sampler_logprobs, again.sampler_logprobs)
    assert first.input_ids.shape != other.input_ids.shape or not torch.equal(first.input_ids, other.input_ids)


def test_paged_siblings_are_drawn_apart_and_follow_the_policy(policy):
    """They share the prompt's blocks, not the first token: a pair agrees with probability sum p^2."""
    rollouts = draw(policy, ["57:"] * 1000 + ["7:"] * 1000, limit=1, temperature=1.0)
    with torch.no_grad():
        expected = torch.softmax(policy.project(policy.hidden(rollouts))[0, 0], -1)
    first = rollouts.token_ids[:1000, 0]
    counts = torch.bincount(first, minlength=len(expected))
    assert ((counts - 1000 * expected).abs() < 5 * torch.sqrt(1000 * expected * (1 - expected)) + 1).all()
    agreement, share = float((first[::2] == first[1::2]).float().mean()), float((expected**2).sum())
    assert abs(agreement - share) < 5 * (share * (1 - share) / 500) ** 0.5  # binomial, 500 pairs
    assert 0.1 < share < 0.9


def test_paged_sampling_never_touches_the_trained_module(policy, monkeypatch):
    model = policy.model.train()
    frozen = next(model.parameters()).requires_grad_(False)
    model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    before = {name: (p, p.clone(), p.grad, p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.set_attn_implementation("eager")  # paging needs another: its manager switches and switches back
    switched = []
    switch = type(model).set_attn_implementation
    monkeypatch.setattr(
        type(model), "set_attn_implementation", lambda self, name: (switched.append((self, name)), switch(self, name))
    )
    draw(policy)
    assert [name for _, name in switched] == ["paged|eager", "eager"]
    assert all(module is not model for module, _ in switched) and model.config._attn_implementation == "eager"
    assert all(module.training for module in model.modules()) and not frozen.requires_grad
    for name, p in model.named_parameters():
        was, value, grad, requires, dtype = before[name]
        assert p is was and torch.equal(p, value) and p.grad is grad and p.requires_grad is requires
        assert p.dtype is dtype is torch.float32 and (grad is None or torch.equal(grad, grads[name]))
    assert sampler_copy_of(policy, "all").model is not model


def test_paged_sampling_follows_the_weights(policy):
    draw(policy)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.1)
    assert_agree(policy, draw(policy))


def test_paged_sampling_of_logits_that_are_not_finite(policy):
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        draw(policy)


def test_a_paged_failure_is_told_with_its_reason(policy):
    sampler_copy_of(policy, "all").model.forward = lambda **inputs: (_ for _ in ()).throw(RuntimeError("out of pages"))
    with pytest.raises(RuntimeError, match=r"0 of 32 rollouts: out of pages\. Set rollout\.backend to generate\."):
        draw(policy)


def test_each_distinct_prompt_is_run_once_and_its_rollouts_are_as_if_it_was_not(policy, monkeypatch, replayed):
    rows = []
    body = policy.body
    monkeypatch.setattr(policy, "body", lambda **inputs: (rows.append(len(inputs["input_ids"])), body(**inputs))[1])
    shared = draw(policy, [*TEXTS, "57:"], backend="generate")
    assert rows[:2] == [4, 33]
    prompts = encode_prompts(policy, [Prompt(t, t, "train") for t in [*TEXTS, "57:"]], None, 24)
    ids, attention = rollout_module._left_padded(policy, prompts, 4)
    replayed(shared)
    with torch.no_grad():
        apart = generate(policy, ids, attention, torch.arange(33), limit=24, temperature=0.9, generator=None)
    width = shared.mask.shape[1]
    assert torch.equal(shared.token_ids, apart.tokens[:, :width]) and torch.equal(shared.mask, ~apart.ended[:, :width])
    assert_agree(policy, shared)
    assert_agree(policy, replace(shared, sampler_logprobs=apart.logprobs[:, :width]))


@pytest.mark.parametrize("compiled", [False, True])
def test_fixed_shapes_go_on_as_a_growing_cache_does_step_after_step(policy, monkeypatch, replayed, compiled):
    """As on CUDA, with rows that stay. Along the same tokens; its own draws are those of the seed, bit for bit."""
    copied = SamplerCopy(policy, "none")
    step = (
        torch.compile(copied.logits, backend="aot_eager", dynamic=False, fullgraph=True) if compiled else copied.logits
    )
    fixed = FixedCache(copied.logits, step, copied.model.config, rows=32, columns=40)
    assert fixed.possible
    draws = generate_module._draw
    for texts, scale in ((TEXTS, 1.0), (["8:"] * 16 + ["41:"] * 16, 1.1)):  # other widths and weights, one cache
        with torch.no_grad():
            policy.model.get_output_embeddings().weight.mul_(scale)
        monkeypatch.setattr(generate_module, "_draw", draws)
        monkeypatch.setattr(generate_module, "decoder_for", lambda policy, rows, columns: GrowingCache(policy))
        expected = draw(policy, texts, backend="generate")
        monkeypatch.setattr(generate_module, "decoder_for", lambda policy, rows, columns: fixed)
        first, again = (draw(policy, texts, backend="generate") for _ in range(2))
        assert torch.equal(first.input_ids, again.input_ids)
        assert torch.equal(first.sampler_logprobs, again.sampler_logprobs)
        replayed(expected)
        found = draw(policy, texts, backend="generate")
        assert torch.equal(found.input_ids, expected.input_ids)
        for rollouts in (expected, first, found):
            assert_agree(policy, rollouts)


def test_a_copy_with_linear_weights_cast_is_the_policy_under_autocast_bit_for_bit(policy):
    """On the same shapes, the head's too: the casts are the same, and one product has one order of adding."""
    ids = torch.randint(3, 18, (5, 20), generator=torch.Generator().manual_seed(0))
    sampler_copies = {cast: SamplerCopy(policy, cast) for cast in ("linear", "all")}
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.05)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = policy.model(**inputs, logits_to_keep=1).logits[:, -1]
        found, _ = sampler_copies["linear"].refresh().logits(**inputs)
    assert expected.dtype is torch.bfloat16 and torch.equal(found, expected)
    with torch.no_grad():
        exact = policy.model(**inputs).logits[:, -1]
        rough, _ = sampler_copies["all"].refresh().logits(**inputs)
    assert not torch.equal(rough.float(), exact)
    # sums between layers, norms and embedding are rounded too, and the weights; exact has none of these roundings
    assert rms(rough - exact) < LARGEST * rounding(torch.bfloat16, stored_results(policy.model.config), rms(exact))
    kinds = {cast: Counter(p.dtype for p in copied.model.parameters()) for cast, copied in sampler_copies.items()}
    # two layers of seven linear weights and the head; embedding and five norms stay
    assert kinds["linear"] == {torch.bfloat16: 15, torch.float32: 6} and kinds["all"] == {torch.bfloat16: 21}
    assert all(b.dtype is torch.float32 for copied in sampler_copies.values() for b in copied.model.buffers())
    assert all(p.dtype is torch.float32 and p.requires_grad for p in policy.model.parameters())


def placed(device, world=1):
    return SimpleNamespace(device=torch.device(device), in_step=Ranks(0, world))


def test_auto_chooses_by_device_and_size(monkeypatch):
    monkeypatch.setattr(rollout_module, "_flash_attention", lambda: True)
    assert choose_backend(placed("cpu"), 4096, 8192) == "generate"
    assert choose_backend(placed("cpu"), 1, 1, "paged") == "paged"
    assert choose_backend(placed("cuda"), 64, 1024) == "paged"
    assert choose_backend(placed("cuda"), 16, 1024) == choose_backend(placed("cuda"), 64, 256) == "generate"
    assert choose_backend(placed("cuda", world=2), 64, 1024) == "generate"
    assert choose_backend(placed("cuda"), 64, 1024, "generate") == "generate"
    monkeypatch.setattr(rollout_module, "_flash_attention", lambda: False)
    assert choose_backend(placed("cuda"), 64, 1024) == "generate"


def test_a_sharded_policy_is_not_paged():
    with pytest.raises(ValueError, match="'paged' with shard"):
        choose_backend(placed("cpu", world=2), 64, 1024, "paged")
    with pytest.raises(ConfigError, match=r"rollout\.backend is 'paged' with shard"):
        TrainConfig(shard=True, rollout={"backend": "paged"})
    assert tiny_policy().sampler_copies == {}


@pytest.mark.parametrize("compiled", [False, True])
def test_fixed_shapes_under_autocast_are_the_trainers_to_bfloat16(policy, monkeypatch, compiled):
    """As on CUDA: bfloat16 linear weights, keys and values; float32 norms, embedding and sums between layers."""
    monkeypatch.setattr(policy, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    copied = SamplerCopy(policy, "linear")
    step = (
        torch.compile(copied.logits, backend="aot_eager", dynamic=False, fullgraph=True) if compiled else copied.logits
    )
    fixed = FixedCache(copied.logits, step, copied.model.config, rows=32, columns=40)
    monkeypatch.setattr(generate_module, "decoder_for", lambda policy, rows, columns: fixed)
    gap, logits = gaps(policy, draw(policy, backend="generate"), 0.9)
    assert {layer.keys.dtype for layer in fixed._cache.layers} == {torch.bfloat16}
    allowed = rounding(torch.bfloat16, stored_results(policy.model.config), rms(logits))
    assert rms(gap) < allowed  # attention adds in another order for one query than for all: 1 in the last of 8 bits
    start = fixed.start
    monkeypatch.setattr(fixed, "start", lambda *given: (start(*given), fixed._position.add_(1))[0])
    gap, _ = gaps(policy, draw(policy, backend="generate"), 0.9)
    assert rms(gap) > 5 * allowed  # which a position that is off by one is far beyond


def test_a_step_that_cannot_be_compiled_runs_as_it_is(monkeypatch):
    def backend(module, inputs):
        raise RuntimeError("no C compiler")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **_: compile_(step, backend=backend))
    step = _graphed(lambda x: x + 1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")  # the compiler warns of its own deprecations
        assert step(x=torch.zeros(2)).tolist() == [1, 1]
    assert any("not compiled and slower: " in (text := str(w.message)) and "no C compiler" in text for w in found)
    assert step(x=torch.ones(2)).tolist() == [2, 2]  # without a second attempt
