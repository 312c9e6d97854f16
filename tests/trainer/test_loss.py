"""The loss against arithmetic done by hand, and the invariances its denominators promise."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.advantages import EPSILON, group_advantages, zero_variance_share
from trainer.config import LossConfig
from trainer.loss import loss_totals, policy_loss


def example():
    """Two responses of 3 and 1 tokens. Ratios: row 0: 1.5, 0.5, 1.0; row 1: 0.5. Advantages +1 and -2."""
    ratios = torch.tensor([[1.5, 0.5, 1.0], [0.5, 1.0, 1.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    old = torch.full((2, 3), -1.0)
    return old + ratios.log(), old, torch.tensor([1.0, -2.0]), mask


# psi = -min(r A, clip(r, .8, 1.2) A):
#   row 0 (A = 1): -min(1.5, 1.2) = -1.2; -min(0.5, 0.8) = -0.5; -1.0
#   row 1 (A = -2): -min(-1.0, -1.6) = 1.6
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("grpo", ((-1.2 - 0.5 - 1.0) / 3 + 1.6) / 2),  # own means, then the mean over 2 responses
        ("dapo", (-1.2 - 0.5 - 1.0 + 1.6) / 4),  # 4 tokens
        ("dr_grpo", (-1.2 - 0.5 - 1.0 + 1.6) / (2 * 3)),  # 2 responses of at most 3 tokens
    ],
)
def test_loss_by_hand(kind, expected):
    logprobs, old, advantages, mask = example()
    terms = policy_loss(logprobs, old, advantages, mask, mask.float(), LossConfig(kind=kind))
    assert float(terms.loss) == pytest.approx(expected, rel=1e-6)
    assert terms.clipped_high.tolist() == [[True, False, False], [False, False, False]]
    assert terms.clipped_low.tolist() == [[False, False, False], [True, False, False]]


@pytest.mark.parametrize(
    ("kind", "normalise", "expected"),
    [
        ("grpo", "selected", (-1.2 / 1 + 1.6 / 1) / 2),  # each row selects its first token
        ("grpo", "all", (-1.2 / 3 + 1.6 / 1) / 2),
        ("dapo", "selected", (-1.2 + 1.6) / 2),
        ("dapo", "all", (-1.2 + 1.6) / 4),
    ],
)
def test_sparse_weights_and_both_normalisations(kind, normalise, expected):
    logprobs, old, advantages, mask = example()
    weights = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    terms = policy_loss(logprobs, old, advantages, mask, weights, LossConfig(kind=kind), normalise=normalise)
    assert float(terms.loss) == pytest.approx(expected, rel=1e-6)


def test_kl_is_k3_and_entropy_is_a_bonus():
    logprobs, old, advantages, mask = example()
    config = LossConfig(kind="dapo", kl_coef=0.5, entropy_coef=0.1)
    plain = policy_loss(logprobs, old, advantages, mask, mask.float(), LossConfig(kind="dapo")).loss
    terms = policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        mask.float(),
        config,
        ref_logprobs=logprobs + math.log(2.0),
        entropies=torch.full((2, 3), 0.3),
    )
    # ref - logprob = ln 2: k3 = 2 - ln 2 - 1 = 0.30685 at each of 4 tokens
    assert float(terms.loss - plain) == pytest.approx(0.5 * (1 - math.log(2)) - 0.1 * 0.3, rel=1e-5)
    assert float(terms.kl[mask].mean()) == pytest.approx(1 - math.log(2), rel=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("normalise", ["selected", "all"])
def test_splitting_the_batch_leaves_the_gradient(kind, normalise):
    g = torch.Generator().manual_seed(0)
    n, t = 8, 6
    mask = torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=g)
    weights = mask * (torch.rand(n, t, generator=g) < 0.5)
    weights[:, 0] = 1.0
    old, advantages = -torch.rand(n, t, generator=g), torch.randn(n, generator=g)
    logprobs = (old + 0.3 * torch.randn(n, t, generator=g)).requires_grad_()
    totals, config = loss_totals(mask, weights, normalise), LossConfig(kind=kind)

    def gradient(*parts: slice) -> torch.Tensor:
        loss = sum(
            policy_loss(
                logprobs[p], old[p], advantages[p], mask[p], weights[p], config, totals=totals, normalise=normalise
            ).loss
            for p in parts
        )
        return torch.autograd.grad(loss, logprobs)[0]

    torch.testing.assert_close(gradient(slice(0, 8)), gradient(slice(0, 3), slice(3, 8)), atol=1e-8, rtol=1e-6)


def test_tokens_outside_the_mask_get_no_gradient_whatever_they_hold():
    logprobs, old, advantages, mask = example()
    logprobs = torch.where(mask, logprobs, torch.nan).requires_grad_()
    policy_loss(logprobs, old, advantages, mask, mask.float(), LossConfig()).loss.backward()
    assert torch.isfinite(logprobs.grad[mask]).all() and (logprobs.grad[~mask] == 0).all()


def test_group_advantages_by_hand():
    # group 7: rewards 1, 0, 0: mean 1/3, sample sd sqrt(((2/3)^2 + 2 (1/3)^2) / 2) = 0.57735; group 3: all equal
    rewards, groups = torch.tensor([1.0, 0.5, 0.0, 0.5, 0.0]), torch.tensor([7, 3, 7, 3, 7])
    found = group_advantages(rewards, groups)
    sd = math.sqrt((4 / 9 + 2 / 9) / 2)
    expected = [(2 / 3) / (sd + EPSILON), 0.0, (-1 / 3) / (sd + EPSILON), 0.0, (-1 / 3) / (sd + EPSILON)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    plain = group_advantages(rewards, groups, scale_by_std=False)
    assert plain.tolist() == pytest.approx([2 / 3, 0, -1 / 3, 0, -1 / 3], abs=1e-7)
    assert float(zero_variance_share(rewards, groups)) == 0.5
