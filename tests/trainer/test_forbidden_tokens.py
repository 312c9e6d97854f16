"""Tokens that a head forbids, with a logit of -inf: as if the vocabulary did not have them, gradients included."""

from __future__ import annotations

import pytest
import torch
from rounding import LARGEST, rounding
from test_update import batch_of, config_of
from tiny import tiny_policy
from torch import nn

from trainer.policy import policy as policy_module
from trainer.policy.policy import Policy
from trainer.update import Updater

FORBIDDEN = [3, 7, 8]


def forbidding_policy():
    """A policy whose head has a bias, -inf for some tokens, as padded vocabularies have it."""
    base = tiny_policy()
    head = nn.Linear(32, base.vocabulary)
    head.weight.data = base.model.lm_head.weight.data
    head.bias.data = torch.randn(base.vocabulary, generator=torch.Generator().manual_seed(1))
    head.bias.data[FORBIDDEN] = -torch.inf
    base.model.lm_head = head
    return Policy(base.model, base.tokenizer, torch.device("cpu"))


@pytest.mark.parametrize("slab", [1 << 24, 19 * 5])  # one slab, or slabs of five positions that are computed twice
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_and_its_gradient_are_those_of_the_other_tokens(monkeypatch, temperature, slab):
    monkeypatch.setattr(policy_module, "SLAB_ELEMENTS", slab)
    policy = forbidding_policy()
    head, generator = policy.model.lm_head, torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 32, generator=generator).requires_grad_()
    allowed = [i for i in range(policy.vocabulary) if i not in FORBIDDEN]
    places = torch.randint(len(allowed), (13,), generator=generator)
    logprob, entropy = policy.logprobs(hidden, torch.tensor(allowed)[places], temperature)
    found = torch.autograd.grad((entropy + 0.5 * logprob).sum(), [hidden, head.weight, head.bias])

    h, w, b = (x.detach().double().requires_grad_() for x in (hidden, head.weight[allowed], head.bias[allowed]))
    logp = torch.log_softmax((h @ w.T + b) / temperature, -1)
    expected_entropy = -(logp.exp() * logp).sum(-1)
    expected_logprob = logp.gather(1, places.unsqueeze(1)).squeeze(1)
    expected = torch.autograd.grad((expected_entropy + 0.5 * expected_logprob).sum(), [h, w, b])

    scale = float(((h @ w.T + b) / temperature).detach().abs().max())
    atol = LARGEST * rounding(torch.float32, 32, scale)
    assert (entropy - expected_entropy).abs().max() < atol and (logprob - expected_logprob).abs().max() < atol
    inside = (found[0], found[1][allowed], found[2][allowed])
    for ours, exact in zip(inside, expected, strict=True):
        assert (ours - exact).norm() < LARGEST * rounding(torch.float32, 32 + 13, scale) * exact.norm()
        assert exact.norm() > 0.01
    for gradient in found[1:]:
        assert (gradient[FORBIDDEN] == 0).all()


def test_an_update_with_an_entropy_bonus_is_finite_and_a_nan_still_shows():
    config = config_of(loss={"entropy_coef": 0.1}, optim={"lr": 1e-3})
    policy = forbidding_policy()
    update = Updater(policy, None, config).update(batch_of(policy, config), step=1)
    assert torch.isfinite(update.grad_norm) and update.grad_norm > 0
    weights = policy.model.lm_head.weight
    assert torch.isfinite(weights).all() and (policy.model.lm_head.bias[FORBIDDEN] == -torch.inf).all()
    with torch.no_grad():
        policy.model.lm_head.weight[5] = torch.nan
        _, entropy = policy.logprobs(torch.randn(2, 32), torch.tensor([4, 4]), 1.0)
    assert entropy.isnan().all()
