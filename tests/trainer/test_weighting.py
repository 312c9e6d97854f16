"""What holds for every weighting, and how they are set. The answers worked out by hand: test_weighting_answers.py."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

import pytest
import test_weighting_answers
import torch
from weighting_inputs import KINDS, REQUIRED, config_of, inputs_of, mask_of, random_inputs, signals_of, weights

from monitor.signals import TokenSignals, deviation_cap
from trainer.config import (
    OFF_POLICY,
    WEIGHTINGS,
    ConfigError,
    TrainConfig,
    WeightingConfig,
    changed_weighting,
    make_weighting,
)
from trainer.learning.weightings import WEIGHT_FUNCTIONS, capped_deviation, token_penalty

PER_RESPONSE = ("uniform", "ict", "ict_frequent", "ict_soft", "rsi", "advantage_reweight", "divergence", "attention",
                "ict_undecided")  # fmt: skip
BINARY = (
    "uniform", "ict", "ict_frequent", "random", "ict_undecided", "random_undecided", "top_entropy", "stapo", "rsi",
    "clip_cov", "kl_cov",
)  # fmt: skip


COMMON = WeightingConfig.model_fields.keys()


def defaults_of(kind):
    """{parameter: its default, or None where it is required} of a kind."""
    fields = {name: field for name, field in WEIGHTINGS[kind].model_fields.items() if name not in COMMON}
    return {name: None if field.is_required() else field.default for name, field in fields.items()}


def test_names_functions_and_known_answers_agree():
    assert WEIGHTINGS.keys() == WEIGHT_FUNCTIONS.keys()
    assert WEIGHTINGS.keys() >= OFF_POLICY
    answered = {name.removeprefix("test_known_answer_") for name in vars(test_weighting_answers)}
    assert answered >= WEIGHTINGS.keys(), f"no test_known_answer_ of {WEIGHTINGS.keys() - answered}"


@pytest.mark.parametrize("kind", KINDS)
def test_docstrings_state_formula_scope_denominator_defaults_and_source(kind):
    function, defaults = WEIGHT_FUNCTIONS[kind], defaults_of(kind)
    text = " ".join(inspect.getdoc(function).split())
    for part in ("Formula: w", "Scope: ", "Denominator: ", "Source: "):
        assert part in text, part
    parameters = inspect.signature(function).parameters
    assert next(iter(parameters)) == "inputs" and set(parameters) - {"inputs"} == defaults.keys()
    for name, value in defaults.items():
        stated = f"{name} = {value}" if value is not None else name
        assert stated in text.partition("Defaults: ")[2], stated


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_one_in_warm_up_and_zero_outside_the_mask(kind):
    acting = random_inputs()
    assert torch.equal(weights(kind, replace(acting, steps_active=0)), acting.mask.float())
    found = weights(kind, acting)
    assert found.dtype == torch.float32 and found.shape == acting.mask.shape
    assert (found[~acting.mask] == 0).all() and (found >= 0).all() and found.isfinite().all()
    assert not torch.equal(found, acting.mask.float()) or kind in ("uniform", "kl_cov", "stare", "stapo", "clip_cov")
    assert kind not in BINARY or set(found.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_carry_no_gradient(kind):
    given = random_inputs()
    for tensor in (given.signals.logprob, given.signals.deviation, given.signals.entropy, given.current_logprobs):
        tensor.requires_grad_()
    assert not weights(kind, given).requires_grad


def rows_of(given, order):
    signals = TokenSignals(*(getattr(given.signals, spec.name)[order] for spec in fields(TokenSignals)))
    return replace(
        given, signals=signals, mask=given.mask[order], advantages=given.advantages[order],
        current_logprobs=given.current_logprobs[order], attention=given.attention[order],
    )  # fmt: skip


BY_POSITION = {"random", "random_undecided", "random_budget", "clip_cov"}  # these draw a number for each position


@pytest.mark.parametrize("kind", sorted(set(KINDS) - BY_POSITION))
def test_permuting_rollouts_permutes_weights(kind):
    given, order = random_inputs(), torch.tensor([3, 1, 0, 2, 7, 4, 6, 5])
    assert torch.allclose(weights(kind, rows_of(given, order)), weights(kind, given)[order], atol=1e-6)


@pytest.mark.parametrize("kind", PER_RESPONSE)
def test_splitting_the_batch_changes_no_weight_of_a_response(kind):
    given = random_inputs()
    parts = [weights(kind, rows_of(given, torch.arange(i, i + 4))) for i in (0, 4)]
    assert torch.allclose(torch.cat(parts), weights(kind, given), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_response_tokens_get_no_weight(kind):
    given = random_inputs(n=4)
    empty = replace(given, mask=torch.zeros_like(given.mask))
    assert (weights(kind, empty) == 0).all()
    row = given.mask.clone()
    row[1] = False
    found = weights(kind, replace(given, mask=row))
    assert (found[1] == 0).all() and found.isfinite().all()


@pytest.mark.parametrize("kind", ["ict", "ict_frequent", "ict_soft", "random", "attention"])
def test_a_response_of_one_token_keeps_it(kind):
    given = inputs_of(signals_of(deviation=[[0.3]]), mask_of(1), attention=torch.zeros(1, 1))
    assert weights(kind, given).tolist() == [[0 if kind == "ict_frequent" else 1]]
    silent = replace(given, signals=signals_of(deviation=[[0.0]]))
    assert weights(kind, silent).tolist() == [[1]]


@pytest.mark.parametrize("kind", ["ict", "ict_frequent", "random", "top_entropy"])
def test_keeping_every_token_is_uniform(kind):
    given = random_inputs()
    assert torch.equal(weights(kind, given, keep=1.0), given.mask.float())


@pytest.mark.parametrize("kind", ["ict_soft", "attention"])
def test_soft_weights_have_mean_one_in_each_response(kind):
    given = random_inputs()
    found = weights(kind, given)
    assert torch.allclose(found.sum(1), given.mask.sum(1).float(), rtol=1e-5)


def test_ict_soft_of_a_response_almost_without_deviation_is_uniform():
    # one of 40 tokens deviates: the 95 % quantile is at rank 0.95 * 39 = 37.05, still 0, so every clipped x is 0
    deviation = torch.zeros(1, 40)
    deviation[0, 7] = 0.2
    assert torch.equal(weights("ict_soft", inputs_of(signals_of(deviation=deviation), mask_of(40))), torch.ones(1, 40))


def test_the_capped_deviation_is_a_share_of_what_is_possible():
    # cap(2) = 0.2158, cap(4) = 0.3804: 0.1079 is half of the first, 0.3804 all of the second; alone (n = 1) it is 0
    signals = signals_of(deviation=[[0.1079, 0.3804, 0.0]], alive=[[2, 4, 1]])
    assert deviation_cap(torch.tensor([2, 4])).tolist() == pytest.approx([0.2158, 0.3804], abs=1e-4)
    assert capped_deviation(signals)[0].tolist() == pytest.approx([0.5, 1.0, 0.0], abs=1e-3)


def test_only_kl_cov_has_a_penalty_and_only_after_warm_up():
    given = random_inputs()
    assert all(token_penalty(given, config_of(kind)) is None for kind in KINDS if kind != "kl_cov")
    assert token_penalty(replace(given, steps_active=0), config_of("kl_cov")) is None
    assert token_penalty(given, config_of("kl_cov")).sum() == 1


@pytest.mark.parametrize("kind", ["divergence", "attention"])
def test_inputs_that_a_kind_needs_are_asked_for(kind):
    with pytest.raises(ValueError, match=f"{kind} needs the .* set WeightInputs"):
        weights(kind, random_inputs(current_logprobs=None, attention=None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ict", "alpha": 0.5}, "weighting.alpha is 0.5, but weighting.kind is 'ict', which does not use it. "
         "Leave it out, or choose advantage_reweight."),
        ({"kind": "stare", "low": 0.1}, "or choose rsi or clip_cov."),
        ({"kind": "rsi"}, "weighting.kind 'rsi' needs weighting.low and weighting.high"),
        ({"kind": "rsi", "low": -1.0}, "weighting.kind 'rsi' needs weighting.high"),
        ({"kind": "rsi", "low": 1.0, "high": 0.5}, "weighting.low is 1.0, expected less than weighting.high, 0.5."),
        ({"kind": "clip_cov", "low": 7.0}, "weighting.low is 7.0, expected less than weighting.high, 5.0."),
        ({"kind": "stare", "share": 0.0}, "share is 0.0: input should be greater than 0."),
        ({"kind": "divergence", "strength": 2.0}, "strength is 2.0: input should be less than 2."),
    ],
)  # fmt: skip
def test_wrong_parameters_are_explained(settings, message):
    with pytest.raises(ConfigError) as error:
        make_weighting(settings)
    assert message in str(error.value)


def test_parameters_are_those_that_were_set_and_the_defaults_of_the_kind():
    assert make_weighting({"keep": 0.3}).parameters == {"keep": 0.3}  # ict, the default kind
    assert make_weighting({"kind": "uniform"}).parameters == {}
    assert make_weighting({"kind": "clip_cov", "high": 9.0}).parameters == {"share": 2e-4, "low": 1.0, "high": 9.0}


def test_another_kind_takes_over_the_parameters_that_it_has_too():
    file = {"keep": 0.3, "warmup_steps": 5}
    assert changed_weighting(file, {"kind": "random"}) == {"kind": "random", "keep": 0.3, "warmup_steps": 5}
    assert changed_weighting(file, {"kind": "uniform"}) == {"kind": "uniform", "warmup_steps": 5}
    assert changed_weighting(file, {"keep": 0.1}) == {"kind": "ict", "keep": 0.1, "warmup_steps": 5}


@pytest.mark.parametrize("kind", sorted(OFF_POLICY))
def test_kinds_that_do_nothing_on_policy_are_refused_there(kind):
    with pytest.raises(ConfigError, match=f"'{kind}' acts only once the policy differs from the one that sampled"):
        TrainConfig(weighting={"kind": kind})
    assert TrainConfig(weighting={"kind": kind}, optim={"mini_batches": 2}).weighting.kind == kind


def test_capping_a_deviation_that_has_no_cap_is_refused():
    with pytest.raises(ConfigError, match=r"signals\.scale is 'capped' with signals\.reference 'leave_one_out'"):
        TrainConfig(signals={"scale": "capped", "reference": "leave_one_out"})


def test_required_settings_of_the_tests_are_those_of_the_kinds():
    required = {kind: {name for name, value in defaults_of(kind).items() if value is None} for kind in KINDS}
    assert {kind: set(names) for kind, names in REQUIRED.items()} == {
        k: names for k, names in required.items() if names
    }
