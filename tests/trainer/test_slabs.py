"""Logits for signals: in slabs, one at a time, in the dtype that autocast gives them."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from rounding import LARGEST, rounding
from tiny import tiny_policy

from monitor.signals import slabs, token_signals
from trainer.flow import TokenBatch
from trainer.policy import policy as policy_module

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def batch_of(policy, rows: int, width: int) -> TokenBatch:
    """Two groups of prompts of 2 tokens and responses of `width`, of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(policy.vocabulary, (rows, width + 2), generator=generator).to(policy.device)
    there = torch.ones_like(ids, dtype=torch.bool)
    zeros = torch.zeros(rows, device=policy.device)
    mask = there[:, 2:]
    groups = torch.arange(rows) // (rows // 2)
    return TokenBatch(ids, there, mask, zeros.unsqueeze(1) * mask, zeros, groups, zeros, zeros > 1, zeros, mask)


@pytest.mark.parametrize("width", [6, 60])
def test_one_slab_of_logits_exists_at_a_time_whatever_the_response_length(monkeypatch, width):
    policy, rows = tiny_policy(), 4
    batch = batch_of(policy, rows, width)
    limit = rows * policy.vocabulary * 3  # three positions
    monkeypatch.setattr(policy_module, "SLAB_ELEMENTS", limit + 1)
    project, sizes, alive = policy.project, [], []

    def watched(slab):
        assert all(logits() is None for logits in alive), "an earlier slab is still held"
        logits = project(slab)
        sizes.append(logits.numel())
        alive.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(policy, "project", watched)
    hidden = policy.hidden(batch).detach()
    found = policy.signals(hidden, batch, 1.0)
    assert sizes == [limit] * (width // 3)
    logits = project(hidden).detach()
    whole = token_signals(logits, batch.token_ids, batch.mask, batch.group_ids, moments=True)
    scale = float(logits.abs().max())  # the head's products, in slabs or whole, add hidden_size terms
    allowed = LARGEST * rounding(torch.float32, policy.model.config.hidden_size, scale)
    for name in whole.__dataclass_fields__:
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=0, atol=allowed)


def test_autocast_hands_bf16_logits_to_the_signals_and_nothing_casts_them_back(monkeypatch):
    policy = tiny_policy()
    batch, seen = batch_of(policy, 4, 6), []

    def watched(logits, *args, **options):
        seen.append(logits.dtype)
        return token_signals(logits, *args, **options)

    monkeypatch.setattr(policy, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(slabs, "token_signals", watched)
    policy.signals(policy.hidden(batch).detach(), batch, 1.0)
    assert seen == [torch.bfloat16]


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("width", [8, 40])
def test_on_a_gpu_the_peak_is_one_slab(monkeypatch, width):
    policy = tiny_policy(vocabulary=32_000, device=torch.device("cuda"))
    batch = batch_of(policy, 8, width)
    hidden = policy.hidden(batch).detach()
    monkeypatch.setattr(policy_module, "CUDA_SLAB_ELEMENTS", 8 * 32_000 * 4)
    policy.signals(hidden, batch, 1.0)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    policy.signals(hidden, batch, 1.0)
    extra = torch.cuda.max_memory_allocated() - before
    slab, head = 8 * 32_000 * 4 * 2, 32_000 * 32 * 2  # bytes of bf16 logits, and of the head's weights cast once
    assert extra < 1.1 * slab + head + 2e5


@pytest.mark.parametrize("rows", [2, 8, 10])
def test_rows_of_like_length_give_the_states_and_gradients_of_one_padded_pass(rows):
    policy, width = tiny_policy(), 12
    batch = batch_of(policy, rows, width)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(width) < lengths
    attention = torch.cat([torch.ones(rows, 2, dtype=torch.bool), mask], 1)
    batch = replace(batch, mask=mask, attention_mask=attention)
    want = policy.padded_hidden(batch.input_ids, attention, width)[mask]
    got = policy.hidden(batch)[mask]
    allowed = LARGEST * rounding(torch.float32, policy.model.config.hidden_size, float(want.detach().abs().max()))
    torch.testing.assert_close(got, want, rtol=0, atol=allowed)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    parameters = [p for p in policy.model.get_decoder().parameters() if p.requires_grad]
    for mine, whole in zip(
        torch.autograd.grad((got * weights).sum(), parameters),
        torch.autograd.grad((want * weights).sum(), parameters),
        strict=True,
    ):
        scale = float(whole.abs().max())
        torch.testing.assert_close(mine, whole, rtol=0, atol=max(1e-6, 1e-4 * scale))


def test_padding_is_left_out_of_the_passes(monkeypatch):
    policy, width = tiny_policy(), 12
    batch = batch_of(policy, 8, width)
    lengths = torch.tensor([12, 1, 3, 2, 3, 1, 6, 5])
    mask = torch.arange(width) < lengths.unsqueeze(1)
    batch = replace(batch, mask=mask, attention_mask=torch.cat([torch.ones(8, 2, dtype=torch.bool), mask], 1))
    body, shapes = policy.body, []
    monkeypatch.setattr(policy, "body", lambda **given: shapes.append(given["input_ids"].shape) or body(**given))
    policy.hidden(batch)
    # Sorted: 1 1 | 2 3 | 3 5 | 6 12, and a prompt of 2 before each.
    assert [tuple(shape) for shape in shapes] == [(2, 3), (2, 5), (2, 7), (2, 14)]
