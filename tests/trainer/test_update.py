"""The optimizer's side: sparse gradients equal dense ones, and splitting changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from rounding import LARGEST, gradient_rounding, rounding, summed_terms
from test_backends import assert_agree
from tiny import tiny_policy
from weighting_inputs import REQUIRED, random_inputs
from weighting_inputs import config_of as weighting_of

from monitor.signals import deviation_cap
from monitor.signals.diagnostics import diagnostic_scalars, entropy_change, mismatch_sums
from trainer.config import OFF_POLICY, WEIGHTINGS, ConfigError, LossConfig, TrainConfig, changed_weighting
from trainer.errors import NonFiniteError
from trainer.flow import Scored
from trainer.learning.batch import token_batch
from trainer.learning.loss import LOSSES, loss_totals, policy_loss
from trainer.learning.weightings import BY_GROUP, ict_weights, token_penalty, token_weights
from trainer.policy import policy as policy_module
from trainer.policy.attention import attention_received
from trainer.rollout.prompts import encode_prompts
from trainer.rollout.sampling import sample
from trainer.tasks import Prompt
from trainer.update import Updater, mini_batch_groups


def config_of(**changes) -> TrainConfig:
    settings = {
        "rollout": {"prompts": 4, "group_size": 4, "max_new_tokens": 16},
        "optim": {"lr": 1e-2},
    }
    for key, value in changes.items():
        settings[key] = {**settings.get(key, {}), **value}
    settings["weighting"] = changed_weighting(
        {"kind": "ict", "keep": 0.3, "warmup_steps": 0}, changes.get("weighting", {})
    )
    return TrainConfig(**settings)


def batch_of(policy, config, seed=0, rewards=None):
    prompts = [Prompt(t, t, "train") for t in ("7:", "57:", "123:", "8:")]
    repeated = [p for p in prompts for _ in range(config.rollout.group_size)]
    rollouts = sample(
        policy,
        encode_prompts(policy, repeated, None, 16),
        max_new_tokens=16,
        temperature=config.rollout.temperature,
        generator=torch.Generator().manual_seed(seed),
    )
    if rewards is None:
        rewards = torch.rand(len(repeated), generator=torch.Generator().manual_seed(seed)).round().tolist()
        rewards[:4] = [0.0] * 4  # one group without variance
    return token_batch(rollouts, Scored(repeated, [], [], rewards), 1.0, config)


def gradients(policy):
    return torch.cat([p.grad.flatten() for p in policy.model.parameters()])


def assert_same_gradient(found, expected, policy, batch):
    """But for rounding: two passes whose products have other shapes add in another order."""
    allowed = gradient_rounding(policy.model.config, batch.input_ids.shape[1], int(batch.mask.sum()))
    assert (found - expected).norm() < allowed * expected.norm()


def gradient_of(config, *, slab=None, monkeypatch=None, reference=None):
    """The gradient that the configured update hands to the optimizer, and the policy it belongs to."""
    policy = tiny_policy()
    if slab:
        monkeypatch.setattr(policy_module, "SLAB_ELEMENTS", slab)
    updater, batch = Updater(policy, reference, config), batch_of(policy, config)
    seen = []
    updater.optimizer.step = lambda: seen.append(gradients(policy).clone())
    update = updater.update(batch, step=1)
    return seen, update, batch, policy


def dense_logp(policy, batch, config):
    logp = torch.log_softmax(policy.project(policy.hidden(batch)) / config.rollout.temperature, -1)
    return logp, logp.gather(-1, batch.token_ids.unsqueeze(-1)).squeeze(-1)


def dense_gradient(policy, batch, weights, config, reference=None):
    """The same loss from the logits of every position, in one piece."""
    policy.model.zero_grad()
    logp, logprobs = dense_logp(policy, batch, config)
    reference = None if reference is None else dense_logp(reference, batch, config)[1].detach()
    normalise = config.weighting.normalise
    totals = loss_totals(batch.loss_mask, weights, normalise, config.rollout.max_new_tokens)
    terms = policy_loss(
        logprobs, logprobs.detach(), batch.advantages, batch.loss_mask, weights, config.loss, totals=totals,
        normalise=normalise, entropies=-(logp.exp() * logp).sum(-1), ref_logprobs=reference,
    )  # fmt: skip
    terms.loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.optim.grad_clip)
    return gradients(policy)


ON_POLICY = sorted(WEIGHTINGS.keys() - OFF_POLICY)


@pytest.mark.parametrize("kind", ON_POLICY)
@pytest.mark.parametrize("normalise", ["selected", "all"])
def test_gradient_of_the_selected_positions_equals_the_dense_one(kind, normalise):
    settings = {"kind": kind, "normalise": normalise, **REQUIRED.get(kind, {})}
    config = config_of(weighting=settings, loss={"entropy_coef": 0.01})
    (found,), update, batch, policy = gradient_of(config)
    expected = dense_gradient(policy, batch, update.weights, config)
    assert_same_gradient(found, expected, policy, batch)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_loss_uses_the_sampling_temperature(temperature):
    config = config_of(rollout={"temperature": temperature})
    (found,), update, batch, policy = gradient_of(config)
    expected = dense_gradient(policy, batch, update.weights, config)
    assert_same_gradient(found, expected, policy, batch)
    for logprobs in (update.signals.logprob, batch.sampler_logprobs):
        assert_agree(policy, replace(batch, sampler_logprobs=logprobs), temperature)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_with_kl_at_the_positions_it_needs(kind, outside):
    loss = {"kind": kind, "kl_coef": 0.5, "kl_outside_mask": outside, "mask_truncated": True, "entropy_coef": 0.01}
    config, reference = config_of(loss=loss), tiny_policy(seed=1)
    (found,), update, batch, policy = gradient_of(config, reference=reference)
    expected = dense_gradient(policy, batch, update.weights, config, reference)
    assert_same_gradient(found, expected, policy, batch)
    assert 0 < int((update.weights > 0).sum()) < int(batch.loss_mask.sum()) < int(batch.mask.sum())


def test_left_out_responses_have_no_weight_and_leave_the_others_as_if_alone():
    """The gradient is that of a batch without them; signals and mask keep them."""
    settings = {"loss": {"mask_truncated": True, "drop_zero_variance": True}, "weighting": {"kind": "uniform"}}
    config = config_of(**settings)
    (found,), update, batch, policy = gradient_of(config)
    kept = batch.loss_mask.any(1)
    equal = batch.rewards.view(4, 4).std(1).repeat_interleave(4) == 0
    assert torch.equal(kept, ~(batch.truncated | equal)) and equal.any() and batch.truncated.any() and kept.any()
    assert torch.equal(update.weights > 0, batch.loss_mask) and (update.signals.alive > 0).equal(batch.mask)
    policy.model.zero_grad()
    _, logprobs = dense_logp(policy, batch, config)
    rows = (logprobs[kept], logprobs[kept].detach(), batch.advantages[kept], batch.mask[kept], batch.mask[kept].float())
    policy_loss(*rows, LossConfig()).loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    assert_same_gradient(found, gradients(policy), policy, batch)


def test_a_step_whose_responses_are_all_left_out_has_gradient_0():
    config = config_of(loss={"drop_zero_variance": True, "kl_coef": 0.5, "entropy_coef": 0.1})
    policy = tiny_policy()
    batch = batch_of(policy, config, rewards=[1.0] * 16)
    update = Updater(policy, tiny_policy(seed=1), config).update(batch, step=1)
    assert not batch.loss_mask.any() and float(update.loss) == float(update.grad_norm) == 0.0
    assert float(update.loss_stats.sums["update_tokens"]) == 0


@pytest.mark.parametrize("optim", [{}, {"mini_batches": 2, "epochs": 2}])
def test_the_controlled_share_is_the_one_that_weights_use(optim):
    """After `observe` the net entropy change of the weighted update is the new share of the unweighted one."""
    loss = {"entropy_target": 1.0, "entropy_actuator": "budget"}
    config = config_of(weighting={"kind": "ict_budget"}, loss=loss, optim=optim)
    policy = tiny_policy()
    updater, batch = Updater(policy, None, config), batch_of(policy, config)
    batch = replace(batch, advantages=-batch.advantages)  # with these the unweighted update lowers the entropy
    updater.control.observe(0.98)  # e = -0.02: i = 0.3 - 0.002, and a share of i - 0.1
    update = updater.update(batch, step=1)
    change = entropy_change(update.signals, batch.advantages)[0]
    assert change.sum() < -1e-3
    assert float((update.weights * change).sum()) == pytest.approx(0.198 * float(change.sum()), rel=1e-5)


def test_kl_to_the_old_policy_acts_once_the_policy_has_moved():
    config = config_of(loss={"kl_coef": 0.5, "kl_reference": "old"}, optim={"mini_batches": 2, "epochs": 2})
    policy = tiny_policy()
    update = Updater(policy, None, config).update(batch_of(policy, config), step=1)
    assert float(update.loss_stats.sums["kl"]) > 1e-4


@pytest.mark.parametrize("actuator", ["coefficient", "temperature"])
def test_one_controlled_value_serves_signals_and_loss(actuator):
    """After `observe` the signals and the loss use the new temperature, and the loss the new coefficient."""
    loss = {"entropy_target": 1.0, "entropy_actuator": actuator, "entropy_step": 0.3, "entropy_coef_max": 1.0}
    config = config_of(loss=loss | {"temperature_step": 0.2})
    policy = tiny_policy()
    updater, batch = Updater(policy, None, config), batch_of(policy, config)
    updater.control.observe(0.0)  # as low as can be: exp(0.2) times the temperature, or 0.3 of bonus
    seen = []
    updater.optimizer.step = lambda: seen.append(gradients(policy).clone())
    update = updater.update(batch, step=1)
    tau = math.exp(0.2) if actuator == "temperature" else 1.0
    fixed = config_of(rollout={"temperature": tau}, loss={"entropy_coef": 0.3 if actuator == "coefficient" else 0.0})
    expected = dense_gradient(policy, batch, update.weights, fixed)
    assert_same_gradient(seen[0], expected, policy, batch)
    assert_agree(policy, replace(batch, sampler_logprobs=update.signals.logprob), tau)


@pytest.mark.parametrize("size", [5, 4, 3, 1])  # a group and a bit, a group, less
@pytest.mark.parametrize("loss", [kind for kind in LOSSES if kind != "bnpo"])
def test_micro_batches_change_memory_and_not_gradients(loss, size):
    """Gradients are compared before clipping, which would hide another scale."""
    whole, split = (
        gradient_of(config_of(loss={"kind": loss}, optim={"micro_batch": n, "grad_clip": 1e9})) for n in (256, size)
    )
    assert_same_gradient(split[0][0], whole[0][0], whole[3], whole[2])
    assert torch.equal(split[1].weights, whole[1].weights)
    for logprobs in (split[1].signals.logprob, whole[1].signals.logprob):
        assert_agree(whole[3], replace(whole[2], sampler_logprobs=logprobs), 1.0)
    gap = (split[1].signals.deviation - whole[1].signals.deviation).abs().max()
    assert gap < LARGEST * rounding(torch.float32, summed_terms(whole[3].model.config, 20), 7)  # logits are below 7


@pytest.mark.parametrize("kind", sorted(BY_GROUP))
def test_weights_of_kinds_by_group_depend_on_nothing_beyond_it(kind):
    inputs = random_inputs()  # two groups of four
    config = weighting_of(kind)
    together = token_weights(inputs, config)
    apart = torch.cat([token_weights(inputs.rows(first, first + 4), config) for first in (0, 4)])
    assert torch.equal(together, apart) and together.sum() > 0


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 1),
        ({"optim": {"micro_batch": 7}}, 1),  # a group at a time
        ({"optim": {"micro_batch": 3}}, 2),  # less than a group
        ({"optim": {"micro_tokens": 60}}, 2),
        ({"loss": {"kind": "gspo"}}, 1),
        ({"loss": {"kind": "dr_grpo"}}, 1),
        ({"loss": {"kind": "dapo"}}, 2),  # divides by the sum of all weights,
        ({"loss": {"kind": "dapo"}, "weighting": {"kind": "uniform"}}, 1),  # which here are 1
        ({"loss": {"kind": "dapo"}, "weighting": {"normalise": "all"}}, 1),
        ({"loss": {"kind": "bnpo"}}, 2),
        ({"loss": {"entropy_coef": 0.01}}, 2),
        ({"loss": {"entropy_coef": 0.01}, "weighting": {"kind": "uniform"}}, 1),
        ({"weighting": {"kind": "entropy_budget"}}, 2),  # sums over the batch
        ({"weighting": {"kind": "random"}}, 2),
        ({"optim": {"epochs": 2}}, 3),
    ],
)
def test_a_step_with_one_update_passes_each_row_once_where_it_can(changes, passes):
    changes = {**changes, "optim": {"micro_batch": 5, **changes.get("optim", {})}}
    config = config_of(**changes)
    policy = tiny_policy()
    updater, batch = Updater(policy, None, config), batch_of(policy, config)
    rows = []
    policy.model.get_decoder().register_forward_pre_hook(
        lambda module, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    updater.update(batch, step=1)
    assert sum(rows) == 16 * passes


@pytest.mark.parametrize("size", [1, 3, 5, 16])
@pytest.mark.parametrize("kind", ["ict", "divergence", "attention"])
def test_no_pass_through_the_model_has_more_rows_than_the_micro_batch(kind, size):
    config = config_of(
        weighting={"kind": kind, "ramp_steps": 1} if kind == "divergence" else {"kind": kind},
        optim={"micro_batch": size, "mini_batches": 2 if kind == "divergence" else 1},
        loss={"kl_coef": 0.1},
        record={"probe_every": 1},
    )
    policy, reference = tiny_policy(), tiny_policy(seed=1)
    updater, batch = Updater(policy, reference, config), batch_of(policy, config)
    rows = []
    for module in (policy, reference):
        module.model.get_decoder().register_forward_pre_hook(
            lambda module, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
        )
    updater.update(batch, step=1)
    assert max(rows) <= size and sum(rows) >= 3 * 16


@pytest.mark.parametrize(
    ("prompts", "mini_batches", "sizes"),
    [(4, 3, [1, 1, 2]), (4, 4, [1] * 4), (16, 3, [5, 5, 6]), (8, 5, [1, 1, 2, 2, 2]), (16, 9, [1, 1] + [2] * 7)],
)
def test_mini_batches_are_exactly_as_many_and_balanced(prompts, mini_batches, sizes):
    bounds = mini_batch_groups(prompts, mini_batches)
    found = [end - first for first, end in bounds]
    assert [i for first, end in bounds for i in range(first, end)] == list(range(prompts))
    assert len(found) == mini_batches and sorted(found) == sizes and max(found) - min(found) <= 1


@pytest.mark.parametrize("micro_batch", [3, 256])
def test_an_epoch_has_as_many_updates_as_mini_batches(micro_batch):
    config = config_of(optim={"mini_batches": 3, "epochs": 2, "micro_batch": micro_batch})
    policy = tiny_policy()
    updater, batch = Updater(policy, None, config), batch_of(policy, config)
    rows, inner = [], updater._mini_batch
    updater._mini_batch = lambda part, *rest: (rows.append(len(part)), inner(part, *rest))[1]
    steps, step = [], updater.optimizer.step
    updater.optimizer.step = lambda: (steps.append(1), step())[1]
    update = updater.update(batch, step=1)
    assert rows == [4, 4, 8] * 2 and len(steps) == 6
    assert len(update.weights) == len(batch)


def test_more_mini_batches_than_groups_are_refused_with_the_nearest_numbers():
    message = r"optim\.mini_batches to 4 or less, or rollout\.prompts to 5 or more"
    with pytest.raises(ConfigError, match=message):
        config_of(optim={"mini_batches": 5})


def test_slabs_of_logits_change_memory_and_not_gradients(monkeypatch):
    config = config_of()
    (whole,), first, batch, policy = gradient_of(config)
    (slabs,), second, *_ = gradient_of(config, slab=19 * 20, monkeypatch=monkeypatch)  # 20 logit rows at a time
    assert_same_gradient(slabs, whole, policy, batch)
    scale = LARGEST * rounding(torch.float32, policy.model.config.hidden_size)  # the head's product, in slabs
    assert (first.signals.deviation - second.signals.deviation).abs().max() < scale


def test_mini_batches_and_epochs_update_from_the_old_signals():
    config = config_of(optim={"epochs": 2, "mini_batches": 2})
    policy = tiny_policy()
    updater, batch = Updater(policy, None, config), batch_of(policy, config)
    steps = []
    inner = updater.optimizer.step
    updater.optimizer.step = lambda: (steps.append(1), inner())[1]
    update = updater.update(batch, step=1)
    assert len(steps) == 4
    # on the first mini-batch ratios are 1; later ones have moved, and the old log-probabilities have not
    assert float(update.loss_stats.sums["log_ratio_abs"]) > 0
    assert_agree(tiny_policy(), replace(batch, sampler_logprobs=update.signals.logprob), 1.0)
    assert int(update.loss_stats.histograms["log_ratio"].n[0]) == 2 * int((update.weights > 0).sum())


@pytest.mark.parametrize("changes", [{}, {"optim": {"mini_batches": 2}}, {"optim": {"micro_tokens": 60}}])
def test_the_update_corrects_for_a_sampler_of_other_probabilities(changes):
    """A sampler that reports two thirds of p everywhere: each gradient is 1.5 times as large, or 1.2 under that bound.

    Gradients are kept from being clipped; the record has the mean weight, how many were cut, and an ESS of 1.
    """
    policy = tiny_policy()
    batch = batch_of(policy, config_of())
    found = {}
    for bound in (None, 2.0, 1.2):
        config = config_of(**changes, loss={"sampler_ratio_max": bound})
        config = config.model_copy(update={"optim": config.optim.model_copy(update={"grad_clip": 1e6})})
        policy = tiny_policy()
        updater, seen = Updater(policy, None, config), []
        updater.optimizer.step = lambda policy=policy, seen=seen: seen.append(gradients(policy).clone())
        other = replace(batch, sampler_logprobs=batch.sampler_logprobs - math.log(1.5) * batch.mask)
        update = updater.update(other, step=1)
        found[bound] = seen
        sums = mismatch_sums(update.signals.logprob, other.sampler_logprobs, other.mask, bound)
        told = diagnostic_scalars({key: float(value) for key, value in sums.items()})
        if bound is None:
            assert "sampler_ess" not in told
            continue
        assert told["sampler_ratio"] == pytest.approx(min(1.5, bound), rel=1e-4)
        assert told["sampler_ess"] == pytest.approx(1, abs=1e-6)
        assert told["sampler_ratio_cut"] == (bound == 1.2)
    for bound, factor in ((2.0, 1.5), (1.2, 1.2)):
        for plain, corrected in zip(found[None], found[bound], strict=True):
            torch.testing.assert_close(corrected, factor * plain, rtol=1e-3, atol=1e-6)


def test_kl_to_the_reference_starts_at_zero_and_then_pulls_back():
    config = config_of(loss={"kl_coef": 0.5})
    policy, reference = tiny_policy(), tiny_policy()
    updater = Updater(policy, reference, config)
    first = updater.update(batch_of(policy, config), step=1)
    second = updater.update(batch_of(policy, config, seed=1), step=2)
    assert 0 <= float(first.loss_stats.sums["kl"]) < 1e-3 * float(second.loss_stats.sums["kl"])


def test_a_non_finite_gradient_never_reaches_the_weights():
    config = config_of()
    policy = tiny_policy()
    updater, batch = Updater(policy, None, config), batch_of(policy, config)
    before = [p.detach().clone() for p in policy.model.parameters()]
    batch.advantages[:] = torch.inf
    with pytest.raises(NonFiniteError, match="gradient norm"):
        updater.update(batch, step=1)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_divergence_weighs_by_how_far_the_policy_has_moved():
    config = config_of(
        weighting={"kind": "divergence", "ramp_steps": 1}, optim={"epochs": 2, "mini_batches": 2, "micro_batch": 4}
    )
    policy = tiny_policy()
    updater, batch = Updater(policy, None, config), batch_of(policy, config)
    seen = []
    inner = updater._mini_batch
    updater._mini_batch = lambda *args: (seen.append(inner(*args)), seen[-1])[1]
    update = updater.update(batch, step=1)
    first, second, *last = (outcome[3] for outcome in seen)
    allowed = LARGEST * rounding(torch.float32, summed_terms(policy.model.config, batch.input_ids.shape[1]))
    assert (first - batch.mask[:8].float()).abs().max() < allowed  # nothing has moved yet
    assert second.max() > 1.001  # the first update has moved the other half of the rollouts too
    assert torch.equal(update.weights, torch.cat(last))  # recorded: the last epoch's
    assert ((update.weights >= 1 - allowed) & (update.weights <= 1.15))[batch.mask].all()


def test_the_penalty_of_kl_cov_holds_its_tokens_near_the_old_policy():
    """The same updates with a penalty of 0 and of 100 on half of the tokens: those move less."""
    moved = {}
    for penalty in (0.0, 100.0):
        settings = {"kind": "kl_cov", "share": 0.5, "penalty": penalty}
        config = config_of(weighting=settings, optim={"epochs": 6, "lr": 1e-3}, loss={"kind": "dapo"})
        policy = tiny_policy()
        updater, batch = Updater(policy, None, config), batch_of(policy, config)
        inputs = updater._inputs(old := updater._whole_signals(batch), batch, 1)
        chosen = token_penalty(inputs, config.weighting) != 0 if penalty else None
        update = updater.update(batch, step=1)
        assert torch.equal(update.weights, batch.mask.float())
        moved[penalty] = (updater._whole_signals(batch).logprob - old.logprob).abs()
    assert moved[100.0][chosen].mean() < 0.7 * moved[0.0][chosen].mean()


def test_the_capped_scale_changes_the_choice_and_not_the_record():
    raw, capped = (gradient_of(config_of(signals={"scale": scale})) for scale in ("raw", "capped"))
    assert torch.equal(raw[1].signals.deviation, capped[1].signals.deviation)
    share = raw[1].signals.deviation / deviation_cap(raw[1].signals.alive).clamp(min=1e-6)
    assert torch.equal(capped[1].weights, ict_weights(share, raw[2].mask, keep=0.3))
    assert not torch.equal(raw[1].weights, capped[1].weights)


@pytest.mark.parametrize("slab", [1 << 24, 5000])  # 5000: chunks of a few rows
def test_attention_received_is_the_last_layers_from_later_response_tokens(monkeypatch, slab):
    monkeypatch.setattr(policy_module, "SLAB_ELEMENTS", slab)
    policy = tiny_policy()
    batch = batch_of(policy, config_of())
    found = attention_received(policy, batch, 256)
    assert policy.model.config._attn_implementation == "sdpa"
    policy.model.set_attn_implementation("eager")
    with torch.no_grad():
        out = policy.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), output_attentions=True,
            position_ids=(batch.attention_mask.long().cumsum(1) - 1).clamp(min=0),
        )  # fmt: skip
    last, prompt = out.attentions[-1].double(), batch.input_ids.shape[1] - batch.mask.shape[1]
    for row, length in enumerate(batch.mask.sum(1).tolist()):
        for t in range(length):
            later = [float(last[row, :, prompt + q, prompt + t].mean()) for q in range(t + 1, length)]
            expected = sum(later) / len(later) if later else 0.0
            assert float(found[row, t]) == pytest.approx(expected, abs=1e-6)
    assert (found[~batch.mask] == 0).all()


def test_no_selected_token_leaves_the_policy_as_it_is():
    config = config_of(weighting={"kind": "rsi", "low": 5.0, "high": 6.0})
    (gradient,), update, batch, _ = gradient_of(config)
    assert (gradient == 0).all() and float(update.loss) == 0 and (update.weights == 0).all() and batch.mask.any()


def test_a_model_that_returns_no_attention_is_refused():
    policy = tiny_policy()
    batch = batch_of(policy, config_of())
    layer = policy.model.get_decoder().layers[-1].self_attn
    layer.register_forward_hook(lambda module, inputs, output: (output[0], None))  # as fused implementations do
    with pytest.raises(ValueError, match=r"returns no attention, which weighting\.kind attention needs"):
        attention_received(policy, batch, 256)
    assert policy.model.config._attn_implementation == "sdpa"
