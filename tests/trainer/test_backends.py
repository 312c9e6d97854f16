"""How rollouts are sampled: shared prompts, fixed shapes, paging, and a trained module that nothing touches."""

from __future__ import annotations

import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_policy

from trainer.config import ConfigError, TrainConfig
from trainer.errors import NonFiniteError
from trainer.rollout import generate as generate_module
from trainer.rollout import sampling as rollout_module
from trainer.rollout.generate import FixedCache, GrowingCache, _graphed, generate
from trainer.rollout.prompts import encode_prompts
from trainer.rollout.sampler_copy import Twin, twin_of
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


def mismatch(policy, rollouts, temperature):
    """Largest |ln p| between sampler and trainer."""
    mask = rollouts.mask
    with torch.no_grad():
        logprob, _ = policy.logprobs(policy.hidden(rollouts)[mask], rollouts.token_ids[mask], temperature)
    assert (rollouts.sampler_logprobs[~mask] == 0).all()
    return float((logprob - rollouts.sampler_logprobs[mask]).abs().max())


@pytest.mark.parametrize("texts", [TEXTS, UNEVEN, ["7"] * 4], ids=["groups", "uneven", "one token"])
@pytest.mark.parametrize("max_batch", [1024, 5])
def test_paged_responses_are_whole_and_have_the_trainers_log_probabilities(policy, texts, max_batch):
    rollouts = draw(policy, texts, max_batch=max_batch)
    assert mismatch(policy, rollouts, 0.9) < 2e-5
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
    assert twin_of(policy, "all").model is not model


def test_paged_sampling_follows_the_weights(policy):
    draw(policy)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.1)
    assert mismatch(policy, draw(policy), 0.9) < 2e-5


def test_paged_sampling_of_logits_that_are_not_finite(policy):
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        draw(policy)


def test_a_paged_failure_is_told_with_its_reason(policy):
    twin_of(policy, "all").model.forward = lambda **inputs: (_ for _ in ()).throw(RuntimeError("out of pages"))
    with pytest.raises(RuntimeError, match=r"0 of 32 rollouts: out of pages\. Set rollout\.backend to generate\."):
        draw(policy)


def test_each_distinct_prompt_is_run_once_and_its_rollouts_are_as_if_it_was_not(policy, monkeypatch):
    rows = []
    body = policy.body
    monkeypatch.setattr(policy, "body", lambda **inputs: (rows.append(len(inputs["input_ids"])), body(**inputs))[1])
    shared = draw(policy, [*TEXTS, "57:"], backend="generate")
    assert rows[:2] == [4, 33]
    prompts = encode_prompts(policy, [Prompt(t, t, "train") for t in [*TEXTS, "57:"]], None, 24)
    ids, attention = rollout_module._left_padded(policy, prompts, 4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        apart = generate(policy, ids, attention, torch.arange(33), limit=24, temperature=0.9, generator=generator)
    width = shared.mask.shape[1]
    assert torch.equal(shared.token_ids, apart.tokens[:, :width])
    torch.testing.assert_close(shared.sampler_logprobs, apart.logprobs[:, :width], atol=2e-6, rtol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_fixed_shapes_draw_the_same_tokens_step_after_step(policy, monkeypatch, compiled):
    """As on CUDA, with rows that stay: the draws of a growing cache that none leaves."""
    monkeypatch.setattr(generate_module, "COMPACT_EVERY", 10**6)
    twin = Twin(policy, "none")
    step = torch.compile(twin.logits, backend="aot_eager", dynamic=False, fullgraph=True) if compiled else twin.logits
    fixed = FixedCache(twin.logits, step, twin.model.config, rows=32, columns=40)
    assert fixed.possible
    for texts, scale in ((TEXTS, 1.0), (["8:"] * 16 + ["41:"] * 16, 1.1)):  # other widths and weights, one cache
        with torch.no_grad():
            policy.model.get_output_embeddings().weight.mul_(scale)
        monkeypatch.setattr(generate_module, "decoder_for", lambda policy, rows, columns: GrowingCache(policy))
        expected = draw(policy, texts, backend="generate")
        monkeypatch.setattr(generate_module, "decoder_for", lambda policy, rows, columns: fixed)
        found = draw(policy, texts, backend="generate")
        assert torch.equal(found.input_ids, expected.input_ids)
        torch.testing.assert_close(found.sampler_logprobs, expected.sampler_logprobs, atol=1e-5, rtol=0)
        assert mismatch(policy, found, 0.9) < 2e-5


def test_a_twin_with_linear_weights_cast_is_the_policy_under_autocast_bit_for_bit(policy):
    ids = torch.randint(3, 18, (5, 20), generator=torch.Generator().manual_seed(0))
    twins = {cast: Twin(policy, cast) for cast in ("linear", "all")}
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.05)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = policy.model(**inputs).logits[:, -1]
        found, _ = twins["linear"].refresh().logits(**inputs)
    assert expected.dtype is torch.bfloat16 and torch.equal(found, expected)
    with torch.no_grad():
        exact = policy.model(**inputs).logits[:, -1]
        rough, _ = twins["all"].refresh().logits(**inputs)
    assert not torch.equal(rough.float(), exact)
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()  # bfloat16 has 8 bits: 0.4 % a rounding
    kinds = {cast: Counter(p.dtype for p in twin.model.parameters()) for cast, twin in twins.items()}
    # two layers of seven linear weights and the head; embedding and five norms stay
    assert kinds["linear"] == {torch.bfloat16: 15, torch.float32: 6} and kinds["all"] == {torch.bfloat16: 21}
    assert all(b.dtype is torch.float32 for twin in twins.values() for b in twin.model.buffers())
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
    assert tiny_policy().twins == {}


@pytest.mark.parametrize("compiled", [False, True])
def test_fixed_shapes_under_autocast_are_the_trainers_to_bfloat16(policy, monkeypatch, compiled):
    """As on CUDA: bfloat16 linear weights, keys and values; float32 norms, embedding and sums between layers."""
    monkeypatch.setattr(policy, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    twin = Twin(policy, "linear")
    step = torch.compile(twin.logits, backend="aot_eager", dynamic=False, fullgraph=True) if compiled else twin.logits
    fixed = FixedCache(twin.logits, step, twin.model.config, rows=32, columns=40)
    monkeypatch.setattr(generate_module, "decoder_for", lambda policy, rows, columns: fixed)
    found = draw(policy, backend="generate")
    assert {layer.keys.dtype for layer in fixed._cache.layers} == {torch.bfloat16}
    assert mismatch(policy, found, 0.9) < 2e-3


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
