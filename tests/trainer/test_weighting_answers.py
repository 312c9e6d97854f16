"""Weightings on responses small enough to work out by hand; one `test_known_answer_<kind>` each, and finer points."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from weighting_inputs import config_of, inputs_of, mask_of, signals_of, signals_of_changes, weights

from trainer.config import LossConfig
from trainer.learning.loss import policy_loss
from trainer.learning.weightings import ict_weights, token_penalty
from trainer.learning.weightings.covariance import token_covariance
from trainer.learning.weightings.inputs import quantile_per_row


def test_known_answer_uniform():
    assert weights("uniform", inputs_of(signals_of(entropy=torch.rand(2, 3)), mask_of(3, 2))).tolist() == [
        [1, 1, 1],
        [1, 1, 0],
    ]


def test_known_answer_ict():
    # T = 5, keep 0.3: ceil(1.5) = 2 highest: positions 3 (0.4) and 1 (0.2). T = 3: ceil(0.9) = 1: position 0
    deviation = torch.tensor([[0.0, 0.2, 0.1, 0.4, 0.05], [0.3, 0.2, 0.1, 9.0, 9.0]])
    expected = [[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert ict_weights(deviation, mask_of(5, 3), keep=0.3).tolist() == expected
    given = inputs_of(signals_of(deviation=deviation), mask_of(5, 3))
    assert weights("ict", given, keep=0.3).tolist() == expected


def test_ict_ties_go_to_the_earlier_position():
    found = ict_weights(torch.tensor([[0.0, 0.2, 0.2, 0.2]]), mask_of(4), keep=0.5)
    assert found.tolist() == [[0, 1, 1, 0]]


def test_ict_ceiling_is_not_fooled_by_rounding():
    # 0.1 * 30 is 3.0000000000000004 in floating point; the ceiling must stay 3
    assert ict_weights(torch.rand(1, 30), mask_of(30), keep=0.1).sum() == 3
    assert ict_weights(torch.rand(1, 31), mask_of(31), keep=0.1).sum() == 4


def test_a_response_without_deviation_keeps_weight_one():
    found = ict_weights(torch.zeros(2, 4), mask_of(4, 2), keep=0.1)
    assert found.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5])
def test_keep_outside_its_range_is_refused(keep):
    with pytest.raises(ValueError, match=rf"keep is {keep}, expected a share in \(0, 1\]"):
        ict_weights(torch.rand(1, 4), mask_of(4), keep=keep)


def test_known_answer_ict_frequent():
    # keep 0.7 of 5: drops ceil(0.3 * 5) = 2, positions 3 and 1; of 3: drops ceil(0.9) = 1, position 0
    deviation = [[0.0, 0.2, 0.1, 0.4, 0.05], [0.3, 0.2, 0.1, 9.0, 9.0]]
    found = weights("ict_frequent", inputs_of(signals_of(deviation=deviation), mask_of(5, 3)), keep=0.7)
    assert found.tolist() == [[1, 0, 1, 0, 1], [0, 1, 1, 0, 0]]


# above 0.05 nat: 4 tokens of row 0, 1 of row 1 (0.05 itself is not above), none of row 2
UNDECIDED = inputs_of(
    signals_of(
        deviation=[[0.5, 0.1, 0.3, 0.2, 0.0], [0.4, 0.0, 0.6, 0.0, 0.0], [0.1, 0.2, 0.3, 0.0, 0.0]],
        entropy=[[0.01, 0.9, 0.8, 0.7, 0.06], [0.05, 0.3, 0.0, 9.0, 9.0], [0.04, 0.0, 0.01, 9.0, 9.0]],
    ),
    mask_of(5, 3, 3),
)


def test_known_answer_ict_undecided():
    # ceil(0.3 * 4) = 2 of the deviations 0.1, 0.3, 0.2, 0: positions 2 and 3, and not the 0.5 of a decided token;
    # row 1: its one undecided token, of deviation 0; row 2: none
    found = weights("ict_undecided", UNDECIDED, keep=0.3)
    assert found.tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    # above 0.75 nat: positions 1 and 2 of row 0, of which ceil(0.1 * 2) = 1
    assert weights("ict_undecided", UNDECIDED, min_entropy=0.75)[0].tolist() == [0, 0, 1, 0, 0]


def test_known_answer_random_undecided():
    # ceil(0.3 * 4) = 2 of positions 1 to 4, 1 of 1, 0 of 0; over 80 draws each of the four expects 40, sd 4.5
    draws = [
        weights("random_undecided", replace(UNDECIDED, generator=torch.Generator().manual_seed(s)), keep=0.3)
        for s in range(80)
    ]
    assert all(w.sum(1).tolist() == [2, 1, 0] and w[1, 1] == 1 for w in draws)
    counts = torch.stack([w[0] for w in draws]).sum(0)
    assert counts[0] == 0 and (counts[1:] - 40).abs().max() <= 18


def test_frequent_is_the_complement_of_ict():
    deviation, mask = torch.rand(5, 20, generator=torch.Generator().manual_seed(0)), mask_of(20, 11, 10, 9, 1)
    kept = weights("ict_frequent", inputs_of(signals_of(deviation=deviation), mask))  # 90 % kept
    assert torch.equal(kept + ict_weights(deviation, mask, keep=0.1), mask.float())


def test_known_answer_random():
    signals, mask = signals_of(deviation=torch.rand(50, 40)), mask_of(*([40] * 50))
    first, again, other = (weights("random", inputs_of(signals, mask, seed=s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.sum(1).tolist() == [4.0] * 50  # ceil(0.1 * 40)
    # 50 rows keep 4 of 40: each half of the positions expects 100 of 200; sd about 6.7
    assert abs(float(first[:, :20].sum()) - 100) < 30


def test_known_answer_top_entropy():
    # 7 tokens, keep 0.2: ceil(1.4) = 2 tokens: 0.9 of row 0 and 0.8 of row 0; row 1 keeps none
    entropy = [[0.1, 0.9, 0.8, 0.2], [0.3, 0.4, 0.5, 7.0]]
    found = weights("top_entropy", inputs_of(signals_of(entropy=entropy), mask_of(4, 3)))
    assert found.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]


def test_known_answer_stapo():
    # entropies of the 6 response tokens: 0, 1, 2, 3, 4, 5; their 0.8-quantile is at rank 0.8 * 5 = 4: 4.
    # row 0 (advantage +1): p = 0.001 at entropies 0 and 4: 0 < 4 is silenced, 4 < 4 is not; p = 0.003 is not rare.
    # row 1 (advantage -1): p = 0.001 everywhere, kept. Row 2 (advantage 0): kept. Outside the mask: 0
    p = torch.tensor([[0.001, 0.003, 0.001], [0.001, 0.001, 0.001], [0.001, 0.001, 0.001]])
    entropy = [[0.0, 1.0, 4.0], [2.0, 3.0, 9.0], [5.0, 9.0, 9.0]]
    given = inputs_of(signals_of(entropy=entropy, logprob=p.log()), mask_of(3, 2, 1), [1.0, -1.0, 0.0])
    assert weights("stapo", given).tolist() == [[0, 1, 1], [1, 1, 0], [1, 0, 0]]


def test_stapo_takes_the_quantile_linearly_between_ranks():
    # entropies 0, 1, 2: the 0.75-quantile is at rank 1.5: 1.5, so 0 and 1 are silenced; at 0.5 it is 1, so only 0 is
    given = inputs_of(signals_of(entropy=[[0.0, 1.0, 2.0]], logprob=[[-9.0, -9.0, -9.0]]), mask_of(3), [1.0])
    assert weights("stapo", given, entropy_quantile=0.75).tolist() == [[0, 0, 1]]
    assert weights("stapo", given, entropy_quantile=0.5).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("q", [0.0, 0.05, 0.33, 0.5, 0.95, 1.0])
def test_row_quantiles_are_those_of_torch(q):
    values, mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)), mask_of(9, 6, 2, 1)
    expected = [torch.quantile(row[kept].double(), q).item() for row, kept in zip(values, mask, strict=True)]
    assert quantile_per_row(values, mask, q).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_known_answer_ict_soft():
    # u = 0, 1, 3 (mean 4/3), x = ln(1 + u / mean) = 0, ln 1.75, ln 3.25 = 0, 0.559616, 1.178655;
    # q05 at rank 0.1: 0.0559616; q95 at rank 1.9: 0.559616 + 0.9 * 0.619039 = 1.116751;
    # clipped 0.0559616, 0.559616, 1.116751, mean 0.577443: w = 0.096913, 0.969128, 1.933959
    given = inputs_of(signals_of(deviation=[[0.0, 0.1, 0.3], [0.2, 9.0, 9.0]]), mask_of(3, 1))
    found = weights("ict_soft", given)
    assert found[0].tolist() == pytest.approx([0.096913, 0.969128, 1.933959], abs=1e-5)
    assert found[1].tolist() == [1, 0, 0]


def test_known_answer_rsi():
    # RSI = 1 + logprob / H: 1 - 1/2 = 0.5, 1 - 3/2 = -0.5, 1 - 6/2 = -2, and 1 where H is 0
    signals = signals_of(entropy=[[2.0, 2.0, 2.0, 0.0]], logprob=[[-1.0, -3.0, -6.0, 0.0]])
    given = inputs_of(signals, mask_of(4))
    assert weights("rsi", given, low=-1.0, high=0.5).tolist() == [[1, 1, 0, 0]]
    assert weights("rsi", given, low=-2.0, high=1.0).tolist() == [[1, 1, 1, 1]]
    assert weights("rsi", given, low=-0.4, high=0.4).tolist() == [[0, 0, 0, 0]]


def test_known_answer_stare():
    # advantage > 0 in rows 0 and 2, 5 tokens: share 0.3 boosts ceil(1.5) = 2, the surprisals 5 and 4; the 9 of row 1
    # (advantage -1) and of row 2 outside the mask do not count. Mean entropy 0.2 < 0.3
    logprob = [[-1.0, -5.0, -2.0], [-9.0, -9.0, -9.0], [-4.0, -3.0, -9.0]]
    signals = signals_of(entropy=[[0.2] * 3] * 3, logprob=logprob)
    given = inputs_of(signals, mask_of(3, 3, 2), [1.0, -1.0, 0.5])
    expected = torch.tensor([[1, 1.1, 1], [1, 1, 1], [1.1, 1, 0]])
    assert torch.allclose(weights("stare", given, share=0.3), expected)
    # at a mean entropy of 0.2 the gate of 0.15 stays shut
    assert torch.equal(weights("stare", given, share=0.3, target_entropy=0.15), given.mask.float())


def test_known_answer_advantage_reweight():
    # 0.3 * p + 0.7 at p = 1, 0.5, 0.01: 1, 0.85, 0.703
    given = inputs_of(
        signals_of(logprob=torch.tensor([[1.0, 0.5, 0.01, 0.3]]).log()), torch.tensor([[True, True, True, False]])
    )
    assert weights("advantage_reweight", given)[0].tolist() == pytest.approx([1.0, 0.85, 0.703, 0.0])


def test_known_answer_divergence():
    # r = e^0.2: k3 = 1.221403 - 0.2 - 1 = 0.021403; sigmoid(50 * k3) = sigmoid(1.070138) = 0.744623;
    # w = 1 + 0.3 * 0.244623 = 1.073387. Halfway up the ramp alpha = 25: sigmoid(0.535069) = 0.630665: 1.039199.
    # r = e^-0.2: k3 = 0.818731 + 0.2 - 1 = 0.018731, sigmoid(0.936538) = 0.718400: 1.065520. r = 1: 1
    signals = signals_of(logprob=[[-1.0, -1.0, -1.0]])
    moved = torch.tensor([[-0.8, -1.2, -1.0]])
    full, half = (inputs_of(signals, mask_of(3), current_logprobs=moved, steps_active=step) for step in (100, 50))
    assert weights("divergence", full)[0].tolist() == pytest.approx([1.073387, 1.065520, 1.0], abs=1e-5)
    assert weights("divergence", half)[0, 0].item() == pytest.approx(1.039199, abs=1e-5)
    # the low-divergence form is its mirror image
    assert weights("divergence", full, sharpness=-50.0)[0, 0].item() == pytest.approx(1 - 0.073387, abs=1e-5)


# dH1 of 6 tokens: L = -1 - 4 - 3 = -8, U = 1.5 + 0.5 = 2, net -6; the -9 lies outside the mask
CHANGES = [[-1.0, 1.5, -4.0], [-3.0, 0.5, -9.0]]
BRAKED = inputs_of(signals_of_changes(CHANGES, [[0.1, 0.0, 0.3], [0.2, 0.0, 0.0]]), mask_of(3, 2), [1.0, 1.0])


def test_known_answer_entropy_budget():
    # share 0.3: (0.3 * -6 - 2) / -8 = -3.8 / -8 = 0.475; share 0: -2 / -8 = 0.25; share -0.2: (1.2 - 2) / -8 = 0.1;
    # share -0.5: (3 - 2) / -8 < 0, cut to 0; share 1: -8 / -8 = 1
    for share, a in ((0.3, 0.475), (0.0, 0.25), (-0.2, 0.1), (-0.5, 0.0), (1.0, 1.0)):
        found = weights("entropy_budget", BRAKED, share=share)
        assert torch.allclose(found, torch.tensor([[a, 1, a], [a, 1, 0]])), share
    # at advantage -1 every sign turns: L = -2, U = 8, a net of 6 is left alone
    assert torch.equal(weights("entropy_budget", replace(BRAKED, advantages=-BRAKED.advantages)), BRAKED.mask.float())


def test_known_answer_ict_budget():
    # share 0.3 takes 0.7 * 6 = 4.2 back: the tokens of deviation 0.1 (1) and 0.2 (3), and 0.2 of the 4 at 0.3: 0.95
    assert torch.allclose(weights("ict_budget", BRAKED), torch.tensor([[0, 1, 0.95], [0, 1, 0]]))
    # share 0.5 takes 3: the 1, and 2 of the 3 at 0.2: 1/3; share 1 takes nothing
    assert torch.allclose(weights("ict_budget", BRAKED, share=0.5), torch.tensor([[0, 1, 1], [1 / 3, 1, 0]]))
    assert torch.equal(weights("ict_budget", BRAKED, share=1.0), BRAKED.mask.float())
    # share -0.5 asks for 9 of the 8 that are lost: all go
    assert weights("ict_budget", BRAKED, share=-0.5).tolist() == [[0, 1, 0], [0, 1, 0]]
    # equal deviations share one weight: of the 8 at 0.2, 4.2 go: 3.8 / 8 = 0.475, as in entropy_budget
    tied = replace(BRAKED, signals=signals_of_changes(CHANGES, torch.full((2, 3), 0.2)))
    assert torch.allclose(weights("ict_budget", tied), weights("entropy_budget", tied))
    assert torch.equal(weights("ict_budget", replace(BRAKED, advantages=-BRAKED.advantages)), BRAKED.mask.float())


def test_known_answer_ict_soft_budget():
    # u / m is 1/3, 1 and 2/3 on losses of 1, 4 and 3. share 0.9 takes 0.6 back: b = 0.6 / (1 * 2/3 + 3 * 1/3) = 0.36:
    # 1 - 0.36 * 2/3 = 0.76, 1, 1 - 0.36 * 1/3 = 0.88, and 0.76 + 4 + 3 * 0.88 = 8 - 0.6
    assert torch.allclose(weights("ict_soft_budget", BRAKED, share=0.9), torch.tensor([[0.76, 1, 1], [0.88, 1, 0]]))
    # share 0.3 takes 4.2, more than the 5/3 of b = 1: a = (8 - 4.2) / (8 - 5/3) = 0.6: 0.2, 0.6, 0.4
    assert torch.allclose(weights("ict_soft_budget", BRAKED), torch.tensor([[0.2, 1, 0.6], [0.4, 1, 0]]))
    assert torch.equal(weights("ict_soft_budget", BRAKED, share=1.0), BRAKED.mask.float())
    assert weights("ict_soft_budget", BRAKED, share=-0.5).tolist() == [[0, 1, 0], [0, 1, 0]]
    for equal in (0.2, 0.0):  # without a ranking it is the entropy budget
        tied = replace(BRAKED, signals=signals_of_changes(CHANGES, torch.full((2, 3), equal)))
        assert torch.allclose(weights("ict_soft_budget", tied), weights("entropy_budget", tied))


def test_known_answer_random_budget():
    # 4.2 of the loss is taken back in one of six orders of the tokens 1, 4 and 3; the last taken keeps a part:
    # 1 4: 0.8 of 4; 1 3 4 and 3 1 4: 0.95 of 4; 4 1: 0.8 of 1; 4 3: 14/15 of 3; 3 4: 0.7 of 4
    possible = {(0, 0.2, 1), (0, 0.95, 0), (0.8, 0, 1), (1, 0, 0.9333), (1, 0.7, 0)}
    found = set()
    for seed in range(60):
        drawn = weights("random_budget", replace(BRAKED, generator=torch.Generator().manual_seed(seed)))
        assert drawn[0, 1] == drawn[1, 1] == 1 and drawn[1, 2] == 0
        found.add(tuple(round(float(w), 4) for w in (drawn[0, 0], drawn[0, 2], drawn[1, 0])))
    assert found == possible


def test_known_answer_opefo():
    # U - L = 10: lowering 2 * 2 / 10 = 0.4, raising 2 * 8 / 10 = 1.6; -8 * 0.4 + 2 * 1.6 = 0; with the advantages
    # turned, the raising flow is the larger one, and is the one that gets 0.4
    expected = torch.tensor([[0.4, 1.6, 0.4], [0.4, 1.6, 0]])
    assert torch.allclose(weights("opefo", BRAKED), expected)
    assert torch.allclose(weights("opefo", replace(BRAKED, advantages=-BRAKED.advantages)), expected)
    # of a group without advantages nothing moves, and its weights are 1; without raising tokens none is left
    assert torch.allclose(weights("opefo", replace(BRAKED, advantages=torch.tensor([0.0, 1.0])))[0], torch.ones(3))
    alone = inputs_of(signals_of_changes([[-1.0, -2.0]]), mask_of(2), [1.0])
    assert weights("opefo", alone).tolist() == [[0, 0]]


# tokens: row 0 (A = 2) logprob -1, -3; row 1 (A = -1) logprob -2, -6, of 4 tokens: mean logprob -3, mean A 0.5
# c = (logprob + 3)(A - 0.5): 2 * 1.5 = 3, 0; 1 * -1.5 = -1.5, -3 * -1.5 = 4.5
COVARIANCE = inputs_of(signals_of(logprob=[[-1.0, -3.0], [-2.0, -6.0]]), mask_of(2, 2), [2.0, -1.0])


def test_the_covariance_of_a_token():
    assert token_covariance(COVARIANCE).tolist() == [[3.0, 0.0], [-1.5, 4.5]]


def test_known_answer_clip_cov():
    # between 1 and 5 are 3 and 4.5; max(1, floor(2e-4 * 4)) = 1 of them goes; between 1 and 4 only 3 can
    assert weights("clip_cov", COVARIANCE).tolist() in ([[0, 1], [1, 1]], [[1, 1], [1, 0]])
    assert weights("clip_cov", COVARIANCE, high=4.0).tolist() == [[0, 1], [1, 1]]
    # floor(0.9 * 4) = 3 are asked for, but two lie between; none lies between 5 and 9
    assert weights("clip_cov", COVARIANCE, share=0.9).tolist() == [[0, 1], [1, 0]]
    assert weights("clip_cov", COVARIANCE, low=5.0, high=9.0).tolist() == [[1, 1], [1, 1]]


def test_clip_cov_draws_among_the_candidates():
    draws = [weights("clip_cov", inputs_of(COVARIANCE.signals, mask_of(2, 2), [2.0, -1.0], seed=s)) for s in range(40)]
    first = sum(float(w[0, 0] == 0) for w in draws)
    assert all(w.sum() == 3 for w in draws) and 8 <= first <= 32  # 20 expected, sd 3.2


def test_known_answer_kl_cov():
    # weight 1 everywhere; the penalty is on the floor(0.5 * 4) = 2 largest covariances, 4.5 and 3; with 2e-4 on one
    assert weights("kl_cov", COVARIANCE).tolist() == [[1, 1], [1, 1]]
    assert token_penalty(COVARIANCE, config_of("kl_cov", share=0.5)).tolist() == [[1, 0], [0, 1]]
    assert token_penalty(COVARIANCE, config_of("kl_cov", penalty=0.25)).tolist() == [[0, 0], [0, 0.25]]


def test_the_penalty_in_the_loss():
    # log-ratios 0.1 and -0.2, A = 0, penalty 0 and 0.5: (0 + 0.5 * 0.2) / 2 tokens = 0.05; its gradient by the second
    # log-probability is 0.5 * sign(-0.2) / 2 = -0.25
    new = torch.tensor([[-0.9, -1.2]], dtype=torch.float64, requires_grad=True)
    old, ones = torch.full((1, 2), -1.0, dtype=torch.float64), torch.ones(1, 2)
    terms = policy_loss(
        new, old, torch.zeros(1), ones.bool(), ones, LossConfig(kind="dapo"), penalty=torch.tensor([[0.0, 0.5]])
    )
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(0.05) and new.grad[0].tolist() == pytest.approx([0.0, -0.25])


def test_known_answer_attention():
    # row 0: a = 0.1, 0.3, 0.2 over the tokens that have a later one, mean 0.2: 0.5, 1.5, 1, and 1 for the last;
    # row 1: one judged token, so 1 and 1; row 2 received nothing: all 1
    attention = torch.tensor([[0.1, 0.3, 0.2, 0.0], [0.7, 0.0, 9.0, 9.0], [0.0, 0.0, 0.0, 9.0]])
    given = inputs_of(signals_of(entropy=torch.zeros(3, 4)), mask_of(4, 2, 3), attention=attention)
    expected = torch.tensor([[0.5, 1.5, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    assert torch.allclose(weights("attention", given), expected)
