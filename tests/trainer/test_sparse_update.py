"""The sparse update: logits at the selected positions alone give the gradient that all positions give."""

from __future__ import annotations

import pytest
import torch
from test_update import batch_of, config_of, dense_logp, gradients
from tiny import tiny_policy

from trainer.learning.loss import LOSSES, loss_totals, policy_loss
from trainer.learning.weightings import token_weights
from trainer.update import Updater


@pytest.mark.parametrize("weighting", ["uniform", "ict", "top_entropy", "ict_soft"])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_policy_that_has_moved_gets_the_dense_gradient_from_the_selected_positions(kind, weighting):
    """Ratios on both sides of the clip, weights in {0, 1} and between; logits exist for the selected tokens only."""
    clip = 0.01 if kind == "gspo" else 0.2  # a response's ratio moves less than a token's
    loss = {"kind": kind, "entropy_coef": 0.01, "clip_low": clip, "clip_high": clip}
    config = config_of(weighting={"kind": weighting}, loss=loss)
    policy = tiny_policy()
    updater, batch = Updater(policy, None, config), batch_of(policy, config)
    weights = token_weights(updater._inputs(updater._whole_signals(batch), batch, 1), config.weighting)
    totals = loss_totals(batch.loss_mask, weights, "selected", config.rollout.max_new_tokens)
    logp, logprobs = dense_logp(policy, batch, config)
    noise = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    old = torch.where(batch.mask, logprobs.detach() + 0.3 * noise, 0.0)
    dense = policy_loss(
        logprobs, old, batch.advantages, batch.loss_mask, weights, config.loss, totals=totals,
        entropies=-(logp.exp() * logp).sum(-1),
    )  # fmt: skip
    dense.loss.backward()
    expected = gradients(policy).clone()
    policy.model.zero_grad()
    projected = []
    inner = policy.logprobs
    policy.logprobs = lambda hidden, *rest: (projected.append(len(hidden)), inner(hidden, *rest))[1]
    terms = updater._terms(policy.hidden(batch), batch, old, weights, totals)
    terms.loss.backward()
    assert (gradients(policy) - expected).norm() < 1e-5 * expected.norm() and expected.norm() > 1e-3
    assert float(terms.loss.detach()) == pytest.approx(float(dense.loss.detach()), rel=1e-5, abs=1e-6)
    assert projected == [int((weights != 0).sum())] and (weighting == "uniform") == (
        projected == [int(batch.mask.sum())]
    )
    assert terms.clipped_low.any() or terms.clipped_high.any()
