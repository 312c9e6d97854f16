"""The loss against arithmetic done by hand, and the invariances its denominators promise."""

from __future__ import annotations

import math

import pytest
import torch

from monitor.signals.outcomes import zero_variance_share
from trainer.config import LossConfig
from trainer.learning.advantages import EPSILON, group_advantages, zero_variance
from trainer.learning.loss import LOSSES, kl_estimate, loss_totals, policy_loss, sampler_correction


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
        ("bnpo", (-1.2 - 0.5 - 1.0 + 1.6) / 4),  # 4 tokens in this call
        ("dr_grpo", (-1.2 - 0.5 - 1.0 + 1.6) / (2 * 3)),  # 2 responses of at most 3 tokens
    ],
)
def test_loss_by_hand(kind, expected):
    logprobs, old, advantages, mask = example()
    terms = policy_loss(logprobs, old, advantages, mask, mask.float(), LossConfig(kind=kind))
    assert float(terms.loss) == pytest.approx(expected, rel=1e-6)
    assert terms.clipped_high.tolist() == [[True, False, False], [False, False, False]]
    assert terms.clipped_low.tolist() == [[False, False, False], [True, False, False]]


def test_cispo_by_hand():
    logprobs, old, advantages, mask = example()
    terms = policy_loss(logprobs, old, advantages, mask, mask.float(), LossConfig(kind="cispo", clip_high=0.4))
    # -min(r, 1.4) A logprob, logprob = ln r - 1: row 0 (A = 1): -1.4 (ln 1.5 - 1) - 0.5 (ln 0.5 - 1) + 1;
    # row 1 (A = -2): 2 * 0.5 (ln 0.5 - 1)
    expected = (-1.4 * (math.log(1.5) - 1) - 0.5 * (math.log(0.5) - 1) + 1 + (math.log(0.5) - 1)) / 4
    assert float(terms.loss) == pytest.approx(expected, rel=1e-6)
    assert terms.clipped_high.tolist() == [[True, False, False], [False, False, False]]
    assert not terms.clipped_low.any()


def test_the_correction_of_the_sampler_by_hand():
    # p_old / p_sampler: .3 / .1 = 3, cut to 2; .1 / .2 = .5; a token whose difference is NaN counts as it is
    old = torch.tensor([[0.3, 0.1, 0.2, 0.1, 0.1]]).log()
    sampler = torch.tensor([[0.1, 0.2, torch.nan, 0.0, torch.inf]]).log()
    torch.testing.assert_close(sampler_correction(old, sampler, 2.0), torch.tensor([[2.0, 0.5, 1.0, 2.0, 0.0]]))
    logprobs, old, advantages, mask = example()
    factors = torch.tensor([[2.0, 0.5, 1.0], [0.5, 7.0, 7.0]])
    terms = policy_loss(logprobs, old, advantages, mask, mask.float(), LossConfig(), correction=factors)
    # the terms of test_loss_by_hand, each times its factor
    assert float(terms.loss) == pytest.approx(((-2.4 - 0.25 - 1.0) / 3 + 0.8) / 2, rel=1e-6)
    penalty = torch.ones(2, 3)
    terms = policy_loss(
        logprobs, old, advantages, mask, mask.float(), LossConfig(), correction=factors, penalty=penalty
    )
    # each penalty |ln r| too: row 0: 2 ln 1.5 + .5 ln 2, row 1: .5 ln 2
    more = ((2 * math.log(1.5) + 0.5 * math.log(2)) / 3 + 0.5 * math.log(2)) / 2
    assert float(terms.loss) == pytest.approx(((-2.4 - 0.25 - 1.0) / 3 + 0.8) / 2 + more, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "largest", "exact"), [("dapo", 100.0, True), ("cispo", 100.0, True), ("dapo", 1, False)]
)
def test_corrected_gradients_are_those_of_the_trainers_own_samples(kind, largest, exact):
    """E_q[min(p / q, C) grad] = E_p[grad] over all 7 tokens of a vocabulary, unless the bound C cuts, float64."""
    generator = torch.Generator().manual_seed(0)
    z, other, advantages = (torch.randn(7, dtype=torch.float64, generator=generator) for _ in range(3))

    def gradient(drawn_from, corrected):
        logits = z.clone().requires_grad_()
        logp = torch.log_softmax(logits, 0).unsqueeze(1)  # a response of one token for each token there is
        q = torch.log_softmax(z + other, 0).unsqueeze(1)
        factors = sampler_correction(logp, q, largest) if corrected else None
        mask = torch.ones(7, 1, dtype=torch.bool)
        chances = {"p": logp, "q": q}[drawn_from].detach().exp()  # weights of a mean over what is drawn
        policy_loss(
            logp, logp.detach(), advantages, mask, chances, LossConfig(kind=kind), correction=factors
        ).loss.backward()
        return logits.grad

    wanted, biased, found = gradient("p", False), gradient("q", False), gradient("q", True)
    assert (biased - wanted).norm() > 0.1 * wanted.norm()
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-9) is exact


def test_gspo_by_hand():
    logprobs, old, advantages, mask = example()
    terms = policy_loss(logprobs, old, advantages, mask, mask.float(), LossConfig(kind="gspo", clip_low=0.3))
    # row 0: s = (1.5 * 0.5 * 1)^(1/3) = 0.9086, within the clip; row 1: s = 0.5 < 0.7, A = -2: -min(-1, -1.4)
    assert float(terms.loss) == pytest.approx((-(0.75 ** (1 / 3)) + 1.4) / 2, rel=1e-6)
    assert terms.clipped_low.tolist() == [[False, False, False], [True, False, False]]


@pytest.mark.parametrize(("normalise", "share"), [("selected", 1.0), ("all", 2 / 3)])
def test_gspo_takes_the_ratio_of_the_selected_tokens(normalise, share):
    logprobs, old, advantages, mask = example()
    logprobs.requires_grad_()
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    config = LossConfig(kind="gspo", clip_low=0.6)
    terms = policy_loss(logprobs, old, advantages, mask, weights, config, normalise=normalise)
    # row 0: s = sqrt(1.5 * 0.5), 2 of its 3 tokens selected; row 1: s = 0.5, its one token, A = -2
    assert float(terms.loss.detach()) == pytest.approx((-math.sqrt(0.75) * share + 1.0) / 2, rel=1e-6)
    terms.loss.backward()
    half = -math.sqrt(0.75) * share / 2 / 2  # d s / d logprob = s / 2 at each of the two, over 2 responses
    assert logprobs.grad[0].tolist() == pytest.approx([half, half, 0.0], rel=1e-6)


def test_the_ratio_of_negative_advantages_is_bounded_by_delta():
    logprobs, old, advantages, mask = example()
    logprobs.requires_grad_()
    config = LossConfig(kind="dapo", clip_delta=1.3)
    terms = policy_loss(logprobs, old, -advantages, mask, mask.float(), config)
    # row 0 (A = -1): -min(-1.3, -1.2) = 1.3 (unbounded: 1.5); -min(-0.5, -0.8) = 0.8; 1. row 1 (A = 2): -min(1, 1.6)
    assert float(terms.loss.detach()) == pytest.approx((1.3 + 0.8 + 1.0 - 1.0) / 4, rel=1e-6)
    terms.loss.backward()
    assert logprobs.grad[0].tolist() == pytest.approx([0.0, 0.0, 0.25])  # bounded and clipped tokens have no gradient


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("normalise", ["selected", "all"])
def test_on_policy_all_kinds_with_one_denominator_have_one_gradient(kind, normalise):
    """At ratio 1 nothing is clipped: the gradient is -A w / D, whatever psi."""
    _, old, advantages, mask = example()
    logprobs = old.clone().requires_grad_()
    weights = torch.tensor([[2.0, 0.0, 3.0], [1.0, 0.0, 0.0]])
    policy_loss(logprobs, old, advantages, mask, weights, LossConfig(kind=kind), normalise=normalise).loss.backward()
    first = {"selected": 5.0, "all": 3.0}[normalise]  # row 0: weights sum to 5, and it has 3 tokens; row 1: 1 and 1
    d = {"grpo": (2 * first, 2.0), "gspo": (2 * first, 2.0), "dr_grpo": (6.0, 6.0)}.get(kind, (first + 1, first + 1))
    expected = [[-2 / d[0], 0.0, -3 / d[0]], [2 / d[1], 0.0, 0.0]]
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected))


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


FULL = {"kl_coef": 0.2, "kl_bias_correction": True, "entropy_coef": 0.1, "clip_high": 0.28}


def ragged(seed=0, n=8, t=6):
    """Random ragged rows in float64; one has no token in the mask, one has tokens but no weight."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=g)
    mask[4] = False
    weights = torch.rand(n, t, generator=g) * mask * (torch.rand(n, t, generator=g) < 0.6)
    weights[5] = 0.0
    old, advantages = -torch.rand(n, t, generator=g).double(), torch.randn(n, generator=g).double()
    logprobs = (old + 0.3 * torch.randn(n, t, generator=g)).requires_grad_()
    more = {"ref_logprobs": old - 0.2, "entropies": (0.5 - logprobs) ** 2}
    return logprobs, old, advantages, mask, weights.double(), more


def split_loss(config, normalise, *parts, seed=0):
    """(loss, gradient) summed over row ranges that share the whole batch's totals."""
    logprobs, old, advantages, mask, weights, more = ragged(seed)
    totals = loss_totals(mask, weights, normalise, 7)
    loss = sum(
        policy_loss(
            logprobs[p], old[p], advantages[p], mask[p], weights[p], config, totals=totals, normalise=normalise,
            **{key: value[p] for key, value in more.items()},
        ).loss
        for p in parts
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("normalise", ["selected", "all"])
@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "bnpo"])
def test_splitting_the_batch_leaves_value_and_gradient(kind, normalise, outside):
    config = LossConfig(kind=kind, kl_outside_mask=outside, **FULL)
    whole = split_loss(config, normalise, slice(0, 8))
    assert whole[1].abs().sum() > 0.01
    for parts in ((slice(0, 3), slice(3, 8)), [slice(i, i + 1) for i in range(8)]):
        torch.testing.assert_close(split_loss(config, normalise, *parts), whole, atol=1e-9, rtol=1e-6)


def test_bnpo_alone_depends_on_the_split():
    config = LossConfig(kind="bnpo")
    logprobs, old, advantages, mask = example()
    totals = loss_totals(mask, mask.float(), "all")
    parts = [
        policy_loss(logprobs[p], old[p], advantages[p], mask[p], mask[p].float(), config, totals=totals).loss
        for p in (slice(0, 1), slice(1, 2))
    ]
    # each row alone: its own mean, half of the responses: grpo's value
    assert [float(p) for p in parts] == pytest.approx([-2.7 / 3 / 2, 1.6 / 2], rel=1e-6)


@pytest.mark.parametrize("normalise", ["selected", "all"])
@pytest.mark.parametrize("kind", LOSSES)
def test_twice_the_weights(kind, normalise):
    """The same loss where D sums the weights, twice the loss where it counts tokens."""
    logprobs, old, advantages, mask, weights, _ = ragged()
    logprobs = logprobs.detach()
    config = LossConfig(kind=kind)
    one, two = (
        policy_loss(logprobs, old, advantages, mask, w, config, normalise=normalise).loss
        for w in (weights, 2 * weights)
    )
    expected = one if normalise == "selected" and kind != "dr_grpo" else 2 * one
    torch.testing.assert_close(two, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("estimator", "corrected", "direction"),
    [("k1", True, "reverse"), ("k2", False, "reverse"), ("k3", True, "reverse"), ("k3", False, "forward"),
     ("k1", False, "none")],
)  # fmt: skip
def test_the_mean_gradient_of_each_kl_estimate(estimator, corrected, direction):
    """Exactly, by summing over a vocabulary of 6 with the policy's own probabilities."""
    g = torch.Generator().manual_seed(0)
    z, z_ref = torch.randn(2, 6, generator=g).double()
    z.requires_grad_()
    logp, ref = torch.log_softmax(z, 0), torch.log_softmax(z_ref, 0)
    term = kl_estimate(ref - logp, estimator) * ((logp - logp.detach()).exp() if corrected else 1.0)
    found = torch.autograd.grad((logp.detach().exp() * term).sum(), z, retain_graph=True)[0]
    reverse, forward = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    loss = {"reverse": reverse, "forward": forward, "none": 0 * reverse}[direction]
    torch.testing.assert_close(found, torch.autograd.grad(loss, z)[0], atol=1e-12, rtol=0)
    if estimator != "k2":
        value = (logp.exp() * kl_estimate(ref - logp, estimator)).sum()
        assert float(value.detach()) == pytest.approx(float(reverse.detach()), rel=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("kind", LOSSES)
def test_off_policy_the_corrected_kl_is_unbiased_in_value_and_gradient(kind, estimator):
    """Exactly, in float64: all 9 responses of two tokens from a vocabulary of 3, each as likely as q makes it.

    Expected: the mean over the two positions of the reverse KL at the prefixes that q visits,
    (KL(p_1 || ref_1) + sum_a q_1(a) KL(p_2(. | a) || ref_2(. | a))) / 2. Rows of a table: the empty prefix, then a.
    """
    g = torch.Generator().manual_seed(3)
    z, z_old, z_ref = torch.randn(3, 4, 3, generator=g).double()
    z.requires_grad_()
    p, q, ref = (torch.log_softmax(table, -1) for table in (z, z_old, z_ref))
    config, found = LossConfig(kind=kind, kl_coef=1.0, kl_estimator=estimator, kl_bias_correction=True), 0.0
    ones, nothing = torch.ones(1, 2).double(), torch.zeros(1).double()
    for a in range(3):
        for b in range(3):
            new, old, base = (torch.stack([table[0, a], table[1 + a, b]]).unsqueeze(0) for table in (p, q, ref))
            loss = policy_loss(new, old, nothing, ones.bool(), ones, config, ref_logprobs=base).loss
            found = found + old.sum().exp() * loss
    kl = (p.exp() * (p - ref)).sum(-1)
    expected = (kl[0] + (q[0].exp() * kl[1:]).sum()) / 2
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    grad, grad_expected = (torch.autograd.grad(one, z, retain_graph=True)[0] for one in (found, expected))
    torch.testing.assert_close(grad, grad_expected, atol=1e-12, rtol=0)


def test_kl_estimates_by_hand():
    gap = torch.tensor([math.log(2.0)])
    found = [float(kl_estimate(gap, k)) for k in ("k1", "k2", "k3")]
    assert found == pytest.approx([-0.693147, 0.240227, 0.306853], rel=1e-5)  # ln 2: -g, g^2 / 2, 2 - g - 1


@pytest.mark.parametrize(("kind", "expected"), [("dapo", 0.30685), ("grpo", 0.30685), ("dr_grpo", 0.30685 * 4 / 6)])
def test_kl_outside_the_weights_counts_every_token_once(kind, expected):
    """ref - logprob = ln 2 at all 4 tokens of two responses, one of which has weight 0.1."""
    logprobs, old, advantages, mask = example()
    config = LossConfig(kind=kind, kl_coef=1.0, kl_outside_mask=True)
    weights = torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.0, 0.0]])
    loss = policy_loss(logprobs, old, 0 * advantages, mask, weights, config, ref_logprobs=logprobs + math.log(2.0)).loss
    assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_entropy_bonus_is_the_weighted_mean_whatever_the_kind(kind):
    logprobs, old, advantages, mask = example()
    weights, entropies = (
        torch.tensor([[1.0, 3.0, 0.0], [1.0, 0.0, 0.0]]),
        torch.tensor([[0.2, 0.4, 9.0], [0.6, 9.0, 9.0]]),
    )
    config = LossConfig(kind=kind, entropy_coef=9.0)
    zero = (logprobs, old, 0 * advantages, mask, weights, config)
    loss = policy_loss(*zero, entropies=entropies, entropy_coef=0.5).loss  # in place of the configured 9
    assert float(loss) == pytest.approx(-0.5 * (0.2 + 3 * 0.4 + 0.6) / 5, rel=1e-6)
    assert float(policy_loss(*zero, entropies=entropies, entropy_coef=0.0).loss) == 0.0


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_batch_with_nothing_to_learn_from_has_loss_and_gradient_0(kind, outside):
    logprobs, old, advantages, mask = example()
    logprobs.requires_grad_()
    nothing = torch.zeros_like(mask)
    config = LossConfig(kind=kind, kl_outside_mask=outside, **FULL)
    more = {"ref_logprobs": old, "entropies": old**2}
    loss = policy_loss(logprobs, old, advantages, nothing, mask.float(), config, **more).loss
    loss.backward()
    assert float(loss.detach()) == 0.0 and (logprobs.grad == 0).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_tokens_outside_the_mask_get_no_gradient_whatever_they_hold(kind):
    logprobs, old, advantages, mask = example()
    logprobs = torch.where(mask, logprobs, torch.nan).requires_grad_()
    config = LossConfig(kind=kind, **FULL)
    more = {"ref_logprobs": torch.where(mask, old, torch.inf), "entropies": torch.where(mask, 1.0, torch.nan)}
    policy_loss(logprobs, old, advantages, mask, torch.ones_like(old), config, **more).loss.backward()
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
    assert zero_variance(rewards, groups).tolist() == [False, True, False, True, False]
