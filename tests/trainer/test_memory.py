"""What makes a run fit: passes by tokens, layers computed twice, samplers without memory, adapters switched off."""

from __future__ import annotations

import copy

import pytest
import torch
from test_backends import TEXTS, draw
from test_update import assert_same_gradient, batch_of, config_of, gradient_of, gradients
from tiny import tiny_policy

from trainer.config import ConfigError, LoraConfig, TrainConfig
from trainer.learning.loss import LOSSES
from trainer.policy.lora import with_adapters
from trainer.policy.micro_batches import MicroBatches, grouped
from trainer.policy.policy import Policy, WithoutAdapters
from trainer.rollout import generate as generate_module
from trainer.rollout.generate import FixedCache
from trainer.rollout.sampler_copy import SamplerCopy, release_samplers
from trainer.update import Updater


def test_rows_go_together_by_length_within_the_limits():
    # longest first: (2, 8) is 10 tokens, (2, 7) beside it makes 2 x 10 = 20; a third would be 30
    assert grouped([(2, 8), (2, 1), (2, 2), (2, 7)], rows=9, tokens=20) == [[0, 3], [2, 1]]
    assert grouped([(2, 8), (2, 1), (2, 2), (2, 7)], rows=1, tokens=20) == [[0], [3], [2], [1]]
    # the longest prompt and the longest response count: (9, 1) and (1, 9) make 2 x 18
    assert grouped([(9, 1), (1, 9)], rows=9, tokens=35) == [[0], [1]]
    assert grouped([(9, 1), (1, 9)], rows=9, tokens=36) == [[0, 1]]
    assert grouped([(5, 50), (5, 1)], rows=9, tokens=20) == [[0], [1]]  # longer than the limit: alone


def test_a_part_is_its_rows_without_the_padding_around_them():
    policy, config = tiny_policy(), config_of()
    batch = batch_of(policy, config)
    parts = MicroBatches(16, 60).split(batch)
    assert sorted(torch.cat([part.rows for part in parts]).tolist()) == list(range(16)) and len(parts) > 3
    for part in parts:
        cut, rows = part.batch, part.rows
        assert cut.input_ids.numel() <= 60
        assert cut.mask.any(0).all() and cut.attention_mask.any(0).all()  # no column is padding alone
        for i, row in enumerate(rows.tolist()):
            assert (
                cut.input_ids[i][cut.attention_mask[i]].tolist()
                == batch.input_ids[row][batch.attention_mask[row]].tolist()
            )
            assert cut.token_ids[i][cut.mask[i]].tolist() == batch.token_ids[row][batch.mask[row]].tolist()
            assert cut.advantages[i] == batch.advantages[row] and cut.group_ids[i] == batch.group_ids[row]
        assert torch.equal(part.of(batch.mask), cut.mask)
    assert MicroBatches(16, batch.input_ids.numel()).split(batch)[0].batch is batch  # nothing to cut
    three = MicroBatches(3).split(batch)
    assert [len(part.batch) for part in three] == [3] * 5 + [1] and three[5].rows.tolist() == [15]


@pytest.mark.parametrize("tokens", [20, 60, 150])
@pytest.mark.parametrize("loss", [kind for kind in LOSSES if kind != "bnpo"])
def test_passes_by_tokens_change_memory_and_not_gradients(loss, tokens):
    whole, split = (gradient_of(config_of(loss={"kind": loss}, optim={"micro_tokens": n})) for n in (None, tokens))
    assert_same_gradient(split[0][0], whole[0][0], whole[3], whole[2])
    assert torch.equal(split[1].weights, whole[1].weights)
    torch.testing.assert_close(split[1].signals.entropy, whole[1].signals.entropy, atol=1e-5, rtol=0)
    torch.testing.assert_close(split[1].loss, whole[1].loss, atol=1e-6, rtol=1e-5)
    for name, column in whole[1].loss_stats.sums.items():
        torch.testing.assert_close(split[1].loss_stats.sums[name], column, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ict", "divergence"])
def test_no_pass_has_more_tokens_than_the_limit(kind):
    config = config_of(
        weighting={"kind": kind, "ramp_steps": 1} if kind == "divergence" else {"kind": kind},
        optim={"micro_tokens": 50, "mini_batches": 2}, loss={"kl_coef": 0.1}, record={"probe_every": 1},
    )  # fmt: skip
    policy, reference = tiny_policy(), tiny_policy(seed=1)
    updater, batch = Updater(policy, reference, config), batch_of(policy, config)
    tokens = []
    for module in (policy, reference):
        module.model.get_decoder().register_forward_pre_hook(
            lambda module, args, inputs: tokens.append(inputs["input_ids"].numel()), with_kwargs=True
        )
    updater.update(batch, step=1)
    padded = batch.input_ids.numel()
    assert max(tokens) <= 50 and sum(tokens) < 5 * padded  # 3 passes and a KL, of two probed: far less than padded


def test_sharded_ranks_pass_in_step():
    with pytest.raises(ConfigError, match=r"optim\.micro_tokens is 99 with shard true: .* Set optim\.micro_batch"):
        TrainConfig(shard=True, optim={"micro_tokens": 99})


def saved_bytes(policy, batch):
    """Bytes that the graph of a forward pass keeps, each tensor once."""
    kept = {}
    keep = lambda tensor: kept.setdefault(tensor.data_ptr(), tensor.untyped_storage().nbytes()) and tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = policy.hidden(batch)
    weights = {p.data_ptr() for p in policy.model.parameters()}
    return sum(size for place, size in kept.items() if place not in weights), states


def test_checkpointed_layers_have_the_same_gradient_and_keep_far_less(monkeypatch):
    config = config_of(loss={"kl_coef": 0.1})
    found, kept = [], []
    for on in (False, True):
        policy, reference = tiny_policy(), tiny_policy(seed=1)
        if on:
            policy.checkpoint_layers()
        batch = batch_of(policy, config)  # sampling goes through the same layers
        kept.append(saved_bytes(policy, batch)[0])
        updater = Updater(policy, reference, config)
        grads = []
        monkeypatch.setattr(
            updater, "_optimizer_step", lambda loss, p=policy, g=grads: (g.append(gradients(p)), loss, loss)[1:]
        )
        updater.update(batch, step=1)
        found.append(grads[0])
    assert torch.equal(*found) and found[0].abs().sum() > 0
    assert kept[1] < 0.35 * kept[0]


def test_a_copy_of_a_checkpointed_policy_is_a_copy():
    """Its layers run their own weights, not those of the module that they were copied from."""
    policy = tiny_policy()
    policy.checkpoint_layers()
    copied = copy.deepcopy(policy.model)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    ids = torch.tensor([[3, 4, 5]])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert (copied(input_ids=ids).logits == 0).all() and (policy.model(input_ids=ids).logits != 0).any()


def test_the_reference_of_adapters_is_the_policy_without_them():
    """The same update as with a second copy of the base model, to the last bit, and its adapters go on learning."""
    found = []
    for own in (False, True):
        config = config_of(loss={"kl_coef": 0.5}, lora={"rank": 2}, optim={"epochs": 2})
        base = tiny_policy()
        torch.manual_seed(1)
        policy = Policy(with_adapters(tiny_policy().model, LoraConfig(rank=2)), base.tokenizer, base.device)
        reference = WithoutAdapters(policy) if own else base
        updater, batch = Updater(policy, reference, config), batch_of(base, config)
        for step in (1, 2, 3):
            update = updater.update(batch, step)
        found.append((torch.cat([p.detach().flatten() for p in updater.trained]), update.loss, update.grad_norm))
        assert all(p.requires_grad for p in updater.trained) and float(update.grad_norm) > 0
        assert not torch.equal(policy.hidden(batch), base.hidden(batch))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_sampler_holds_no_memory_between_uses_and_draws_alike(monkeypatch):
    policy = tiny_policy()
    copied = SamplerCopy(policy, "linear")
    cast = list(copied._cast.values())
    fixed = FixedCache(copied.logits, copied.logits, copied.model.config, rows=32, columns=40)
    policy.sampler_copies["linear"] = copied
    copied.memory[32, 40] = fixed
    monkeypatch.setattr(policy, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(generate_module, "decoder_for", lambda policy, rows, columns: (copied.refresh(), fixed)[1])
    first = draw(policy, backend="generate")
    tensors = [*cast, *(layer.keys for layer in fixed._cache.layers), *(layer.values for layer in fixed._cache.layers)]
    assert len(tensors) == 15 + 4 and all(tensor.untyped_storage().size() == 0 for tensor in tensors)
    again = draw(policy, TEXTS, backend="generate")
    assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.sampler_logprobs, again.sampler_logprobs)
    copied.refresh()
    assert all(torch.equal(mine, theirs.bfloat16()) for theirs, mine in copied._cast.items())
    release_samplers(policy)
    assert all(tensor.untyped_storage().size() == 0 for tensor in cast)
