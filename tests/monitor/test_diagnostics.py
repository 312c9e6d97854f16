"""Entropy changes against autograd in float64, regimes and mismatch against numpy, the probe against a real step."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="monitor.signals needs torch")

import torch

from monitor.metrics import METRICS
from monitor.signals import token_signals
from monitor.signals.diagnostics import (
    diagnostic_scalars,
    entropy_change,
    mismatch_sums,
    probe_sums,
    renyi2_changes,
    update_sums,
)
from monitor.signals.stats import signal_statistics, step_record


def entropies64(z):
    """(H1, H2) of logits [..., V] in float64."""
    logp = torch.log_softmax(z, -1)
    return -(logp.exp() * logp).sum(-1), -torch.logsumexp(2 * logp, -1)


def ragged(n=6, t=7, v=23, seed=0, scale=3.0):
    """logits, signals with moments, mask and advantages of n rollouts of different lengths."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, t, v, generator=g) * scale
    ids = torch.distributions.Categorical(logits=logits).sample()
    mask = torch.arange(t) < torch.randint(2, t + 1, (n, 1), generator=g)
    signals = token_signals(logits, ids, mask, torch.arange(n) // 3, moments=True)
    return logits, ids, signals, mask, torch.randn(n, generator=g)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 8.0])
def test_entropy_changes_are_the_derivative_of_the_entropies_along_the_policy_gradient_step(scale):
    logits, ids, signals, mask, advantages = ragged(scale=scale)
    z = logits.double()
    one_hot = torch.nn.functional.one_hot(ids, z.shape[-1])
    step = advantages.double().view(-1, 1, 1) * (one_hot - torch.softmax(z, -1))
    _, expected = torch.autograd.functional.jvp(entropies64, z, step)  # d/d eta of (H1, H2) at z + eta * step
    for found, exact in zip(entropy_change(signals, advantages), expected, strict=True):
        np.testing.assert_allclose(found[mask], exact[mask], atol=3e-6)
        assert not found[~mask].any()
    eta = 1e-6  # and by finite differences, so that autograd is not the only witness
    for found, high, low in zip(
        entropy_change(signals, advantages), entropies64(z + eta * step), entropies64(z - eta * step), strict=True
    ):
        np.testing.assert_allclose(found[mask], ((high - low) / (2 * eta))[mask], atol=3e-6)


def test_entropy_change_of_two_tokens_by_hand():
    # p = (3/4, 1/4), the likely token sampled, A = 1: beta = 5/8, sum p^3 = 7/16
    # dH2 = -2 [(9/16 / (5/8) - 3/4) - (7/16 / (5/8) - 5/8)] = -2 [0.15 - 0.075] = -0.15
    # dz = (1/4, -1/4), dp = p (dz - 1/8) = (3/32, -3/32), dH1 = -sum dp ln p = -3/32 ln 3
    logits = torch.tensor([[[math.log(3.0), 0.0]]])
    signals = token_signals(logits, torch.zeros(1, 1).long(), torch.ones(1, 1) > 0, torch.zeros(1), moments=True)
    shannon, renyi2 = entropy_change(signals, torch.ones(1))
    assert float(shannon) == pytest.approx(-3 / 32 * math.log(3), abs=1e-6)
    assert float(renyi2) == pytest.approx(-0.15, abs=1e-6)


def test_entropy_changes_average_to_zero_over_the_policys_own_samples():
    """E over o ~ p of dH is 0: with equal advantages nothing is predicted to happen."""
    logits = torch.randn(1, 1, 9, generator=torch.Generator().manual_seed(1)).expand(9, 1, 9)
    signals = token_signals(logits, torch.arange(9).view(9, 1), torch.ones(9, 1) > 0, torch.zeros(9), moments=True)
    p = signals.logprob.double().exp()
    for change in entropy_change(signals, torch.full((9,), 2.0)):
        assert change.abs().max() > 0.1
        assert float((p * change).sum()) == pytest.approx(0.0, abs=1e-6)


def test_entropy_change_needs_the_moments():
    _, _, signals, _, advantages = ragged()
    with pytest.raises(ValueError, match=r"token_signals\(\.\.\., moments=True\)"):
        entropy_change(replace(signals, sum_p3=None), advantages)


def record_with_diagnostics(weights=None, probe=None):
    _, ids, signals, mask, advantages = ragged()
    weights = mask.float() if weights is None else weights
    stats = signal_statistics(
        signals,
        mask,
        weights,
        advantages > 0,
        advantages=advantages,
        sampler_logprobs=signals.logprob.clone(),
        probe=probe,
    )
    record, _ = step_record(1, signals, ids, mask, weights, stats, scalars={})
    return record.scalars, signals, mask, advantages


def test_scalars_are_those_of_numpy_on_the_same_tokens_with_weights_that_are_not_binary():
    mask = ragged()[3]
    weights = torch.where(mask, torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)) * 2, 0.0)
    weights[:, 1] = 0.0
    found, signals, mask, advantages = record_with_diagnostics(weights)
    keep = mask.numpy()
    w, p = weights.double().numpy()[keep], np.exp(signals.logprob.double().numpy()[keep])
    a = np.broadcast_to(advantages.double().numpy()[:, None], keep.shape)[keep]
    beta = np.exp(-signals.renyi2.double().numpy()[keep])
    for side, chosen in {"": w >= 0, "_selected": w > 0, "_positive": a > 0, "_negative": a < 0}.items():
        assert found[f"regime_h_share{side}"] == pytest.approx((p > beta)[chosen].mean())
        assert found[f"regime_l_share{side}"] == pytest.approx((p < beta)[chosen].mean())
    for key, change in zip(("entropy", "renyi2"), entropy_change(signals, advantages), strict=True):
        change = change.numpy()[keep]
        assert found[f"predicted_{key}_change"] == pytest.approx(change.mean())
        assert found[f"predicted_{key}_change_weighted"] == pytest.approx((w * change).sum() / w.sum())
    assert found["logprob_advantage_cov"] == pytest.approx(np.cov(np.log(p), a, bias=True)[0, 1])
    # METHOD section 3: sum(w) / tokens and (sum w)^2 / sum w^2, the latter as a share of the tokens
    assert found["weight_mean"] == pytest.approx(w.sum() / len(w))
    assert found["effective_sample_share"] == pytest.approx(w.sum() ** 2 / (w**2).sum() / len(w))


def test_a_side_without_tokens_has_no_share():
    _, _, signals, mask, _ = ragged()
    sums = update_sums(signals, mask, mask.float(), torch.ones(len(mask)))
    found = diagnostic_scalars({key: float(value) for key, value in sums.items()})
    assert "regime_h_share_positive" in found and "regime_h_share_negative" not in found
    assert found["logprob_advantage_cov"] == pytest.approx(0.0, abs=1e-12)


def test_sums_add_over_micro_batches():
    _, _, signals, mask, advantages = ragged()
    arguments = (mask, mask.float(), advantages)
    whole = update_sums(signals, *arguments)
    halves = [update_sums(signals.rows(*part), *(x[slice(*part)] for x in arguments)) for part in ((0, 3), (3, 6))]
    for key, value in whole.items():
        assert float(value) == pytest.approx(float(halves[0][key] + halves[1][key]), rel=1e-12, abs=1e-12), key


def test_mismatch_by_hand():
    # d = (0, ln 3, -ln 3, nan, and one masked): k3 = (0, 2 - ln 3, -2/3 + ln 3), beyond 2: two of three
    ln3 = math.log(3.0)
    trainer = torch.tensor([[-1.0, -1.0, -1.0, torch.nan, -9.0]])
    sampler = torch.tensor([[-1.0, -1.0 - ln3, -1.0 + ln3, -1.0, 0.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    sums = {key: float(value) for key, value in mismatch_sums(trainer, sampler, mask).items()}
    found = diagnostic_scalars(sums)
    assert found["sampler_mismatch"] == pytest.approx(2 * ln3 / 3, rel=1e-6)
    assert found["sampler_mismatch_k3"] == pytest.approx((2 - 2 / 3) / 3, rel=1e-6)
    assert found["sampler_mismatch_beyond2"] == pytest.approx(2 / 3)
    assert found["sampler_mismatch_nonfinite"] == 1.0


def test_importance_weights_by_hand():
    # p_trainer / p_sampler = 3, 1/2, 1 (and one that is not finite, one masked), at most 2: w = 2, 1/2, 1
    ratios = torch.tensor([[3.0, 0.5, 1.0, torch.nan, 9.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    sums = {key: float(value) for key, value in mismatch_sums(ratios.log(), torch.zeros(1, 5), mask, 2.0).items()}
    found = diagnostic_scalars(sums)
    assert found["sampler_ratio"] == pytest.approx(3.5 / 3, rel=1e-6)
    assert found["sampler_ratio_cut"] == pytest.approx(1 / 3)
    assert found["sampler_ess"] == pytest.approx(3.5**2 / (3 * (4 + 0.25 + 1)), rel=1e-6)  # 0.778
    assert "sampler_ess" not in diagnostic_scalars(
        {key: float(value) for key, value in mismatch_sums(ratios.log(), torch.zeros(1, 5), mask).items()}
    )


def test_mismatch_of_equal_log_probabilities_is_zero():
    found, *_ = record_with_diagnostics()
    assert [found[f"sampler_mismatch{end}"] for end in ("", "_k3", "_beyond2", "_nonfinite")] == [0.0] * 4


def test_predicted_renyi2_change_agrees_with_the_truth_to_second_order():
    g = torch.Generator().manual_seed(0)
    before = torch.randn(50, 31, generator=g, dtype=torch.float64) * 2
    direction = torch.randn(50, 31, generator=g, dtype=torch.float64)
    errors = []
    for eta in (1e-2, 1e-3):
        predicted, true = renyi2_changes(before, before + eta * direction + 7.0)  # a shift of all logits is no change
        h2 = entropies64(before + eta * direction)[1] - entropies64(before)[1]
        np.testing.assert_allclose(true, h2, atol=1e-13)
        errors.append(float((predicted - true).abs().mean()))
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)  # a tenth of the step, a hundredth of the error


def test_forbidden_tokens_leave_the_prediction_finite():
    before = torch.tensor([[0.0, 1.0, -torch.inf]])
    predicted, true = renyi2_changes(before, before + torch.tensor([[1e-4, 0.0, 0.0]]))
    assert float(predicted) == pytest.approx(float(true), rel=1e-3) and float(true) != 0


def test_probe_scalars_are_those_of_numpy():
    rng = np.random.default_rng(0)
    true = rng.normal(0.3, 1.0, 40)
    predicted = true + rng.normal(0.0, 0.1, 40)
    pair = (torch.from_numpy(predicted), torch.from_numpy(np.where(np.arange(40) == 7, np.nan, true)))
    found, *_ = record_with_diagnostics(probe=pair)
    keep = np.arange(40) != 7  # a pair that is not finite is left out
    assert found["probe_predicted_change"] == pytest.approx(predicted[keep].mean())
    assert found["probe_true_change"] == pytest.approx(true[keep].mean())
    assert found["probe_error"] == pytest.approx(np.abs(predicted - true)[keep].mean())
    assert found["probe_pearson"] == pytest.approx(np.corrcoef(predicted[keep], true[keep])[0, 1])


def test_a_policy_that_did_not_move_has_no_correlation():
    found = diagnostic_scalars({key: float(v) for key, v in probe_sums(torch.zeros(5), torch.zeros(5)).items()})
    assert found == {"probe_predicted_change": 0.0, "probe_true_change": 0.0, "probe_error": 0.0}


def test_every_diagnostic_is_in_the_table_of_metrics():
    found, *_ = record_with_diagnostics(probe=(torch.arange(3.0), torch.arange(3.0)))
    assert set(found) <= set(METRICS)


def test_the_entropy_flow_is_the_change_split_by_its_sign():
    _, _, signals, mask, advantages = ragged()
    weights = mask.float() * torch.rand(mask.shape, generator=torch.Generator().manual_seed(5))
    found = diagnostic_scalars({k: float(v) for k, v in update_sums(signals, mask, weights, advantages).items()})
    change = entropy_change(signals, advantages)[0].numpy()
    lowering, raising = np.minimum(change, 0.0), np.maximum(change, 0.0)
    n, w = float(mask.sum()), weights.double().numpy()
    for side, part in (("lowering", lowering), ("raising", raising)):
        assert found[f"predicted_entropy_{side}"] == pytest.approx(part.sum() / n)
        assert found[f"predicted_entropy_{side}_weighted"] == pytest.approx((w * part).sum() / w.sum())
    total = found["predicted_entropy_lowering"] + found["predicted_entropy_raising"]
    assert total == pytest.approx(found["predicted_entropy_change"]) and lowering.any() and raising.any()
