"""Weightings: which tokens they choose, on responses small enough to choose by hand."""

from __future__ import annotations

import pytest
import torch

from monitor.signals import TokenSignals
from trainer.config import WEIGHTINGS, WeightingConfig
from trainer.weighting import WEIGHT_FUNCTIONS, WeightInputs, ict_weights, token_weights
from trainer.weightings.entropy import stapo


def mask_of(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def signals_of(deviation: torch.Tensor, entropy: torch.Tensor | None = None) -> TokenSignals:
    entropy = deviation if entropy is None else entropy
    return TokenSignals(-entropy, entropy, entropy, deviation, torch.full(deviation.shape, 4, dtype=torch.int32))


def weights(kind: str, signals: TokenSignals, mask: torch.Tensor, keep=None, step=100, seed=0) -> torch.Tensor:
    config = WeightingConfig(kind=kind, keep=keep, warmup_steps=20)
    return token_weights(inputs(signals, mask, steps_active=step - 20, seed=seed), config)


def inputs(signals: TokenSignals, mask: torch.Tensor, advantages=None, steps_active=1, seed=0) -> WeightInputs:
    advantages = torch.linspace(-1, 1, len(mask)) if advantages is None else torch.tensor(advantages)
    return WeightInputs(signals, mask, advantages, torch.Generator().manual_seed(seed), steps_active)


def test_ict_keeps_the_ceiling_of_the_share_by_rank():
    # T = 5, keep 0.3: ceil(1.5) = 2 highest: positions 3 (0.4) and 1 (0.2). T = 3: ceil(0.9) = 1: position 0
    deviation = torch.tensor([[0.0, 0.2, 0.1, 0.4, 0.05], [0.3, 0.2, 0.1, 9.0, 9.0]])
    found = ict_weights(deviation, mask_of(5, 3), keep=0.3)
    assert found.tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]


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


def test_frequent_is_the_complement_of_ict():
    deviation, mask = torch.rand(5, 20, generator=torch.Generator().manual_seed(0)), mask_of(20, 11, 10, 9, 1)
    kept = weights("ict_frequent", signals_of(deviation), mask)  # 90 % kept
    assert torch.equal(kept + ict_weights(deviation, mask, keep=0.1), mask.float())


def test_random_keeps_the_count_and_follows_its_seed():
    signals, mask = signals_of(torch.rand(50, 40)), mask_of(*([40] * 50))
    first, again, other = (weights("random", signals, mask, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.sum(1).tolist() == [4.0] * 50
    # 50 rows keep 4 of 40: each half of the positions expects 100 of 200; sd about 6.7
    assert abs(float(first[:, :20].sum()) - 100) < 30


def test_top_entropy_ranks_over_the_whole_batch():
    # 7 tokens, keep 0.2: ceil(1.4) = 2 tokens: 0.9 of row 0 and 0.8 of row 0; row 1 keeps none
    entropy = torch.tensor([[0.1, 0.9, 0.8, 0.2], [0.3, 0.4, 0.5, 7.0]])
    found = weights("top_entropy", signals_of(torch.zeros(2, 4), entropy), mask_of(4, 3))
    assert found.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_every_weight_is_one_during_warm_up_and_zero_outside_the_mask(kind):
    deviation, mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)), mask_of(12, 7, 4)
    assert torch.equal(weights(kind, signals_of(deviation), mask, step=20), mask.float())
    acting = weights(kind, signals_of(deviation), mask, step=21)
    assert acting.dtype == torch.float32 and (acting[~mask] == 0).all()
    assert kind in ("uniform", "stapo") or acting.sum() < mask.sum()


def test_stapo_silences_rare_sure_tokens_of_good_responses():
    # entropies of the 6 response tokens: 0, 1, 2, 3, 4, 5; their 0.8-quantile is at rank 0.8 * 5 = 4: 4.
    # row 0 (advantage +1): p = 0.001 at entropies 0 and 4: 0 < 4 is silenced, 4 < 4 is not; p = 0.003 is not rare.
    # row 1 (advantage -1): p = 0.001 everywhere, kept. Row 2 (advantage 0): kept. Outside the mask: 0
    p = torch.tensor([[0.001, 0.003, 0.001], [0.001, 0.001, 0.001], [0.001, 0.001, 0.001]])
    entropy = torch.tensor([[0.0, 1.0, 4.0], [2.0, 3.0, 9.0], [5.0, 9.0, 9.0]])
    signals = TokenSignals(p.log(), entropy, entropy, entropy, torch.full(p.shape, 3, dtype=torch.int32))
    found = stapo(inputs(signals, mask_of(3, 2, 1), [1.0, -1.0, 0.0]), max_probability=0.002, entropy_quantile=0.8)
    assert found.tolist() == [[0, 1, 1], [1, 1, 0], [1, 0, 0]]


def test_stapo_takes_the_quantile_linearly_between_ranks():
    # entropies 0, 1, 2: the 0.75-quantile is at rank 1.5: 1.5, so 0 and 1 are silenced; at 0.5 it is 1, so only 0 is
    entropy = torch.tensor([[0.0, 1.0, 2.0]])
    signals = TokenSignals(torch.full((1, 3), -9.0), entropy, entropy, entropy, torch.ones(1, 3, dtype=torch.int32))
    given = inputs(signals, mask_of(3), [1.0])
    assert stapo(given, max_probability=0.002, entropy_quantile=0.75).tolist() == [[0, 0, 1]]
    assert stapo(given, max_probability=0.002, entropy_quantile=0.5).tolist() == [[0, 1, 1]]


def test_a_batch_without_response_tokens_gets_no_weight():
    entropy = torch.zeros(2, 3)
    signals = TokenSignals(entropy, entropy, entropy, entropy, torch.ones(2, 3, dtype=torch.int32))
    empty = torch.zeros(2, 3, dtype=torch.bool)
    for kind in WEIGHTINGS:
        assert (weights(kind, signals, empty) == 0).all()


def test_names_and_functions_agree():
    assert WEIGHTINGS.keys() == WEIGHT_FUNCTIONS.keys()
