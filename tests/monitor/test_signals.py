"""token_signals against a float64 oracle written from the definitions, one (row, position) at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torch", reason="monitor.signals needs torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import LARGEST, rounding

from monitor.signals import definition, token_signals
from monitor.signals.definition import deviation_cap

LN2 = math.log(2.0)


def entropy64(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def oracle(logits, token_ids, mask, group_ids, temperature=1.0, leave_one_out=False):
    """The definitions of METHOD section 2 in float64, as loops. Returns arrays [7, N, T] in the order of the fields."""
    z = logits.double().numpy() / temperature
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    n, t, _ = z.shape
    out = np.zeros((7, n, t))
    for i in range(n):
        for j in range(t):
            if not mask[i, j]:
                continue
            alive = [k for k in range(n) if group_ids[k] == group_ids[i] and mask[k, j]]
            others = [k for k in alive if k != i] if leave_one_out else alive
            q = p[others, j].mean(0) if others else p[i, j]
            row = p[i, j]
            js = entropy64((row + q) / 2) - entropy64(row) / 2 - entropy64(q) / 2
            out[:5, i, j] = np.log(row[token_ids[i, j]]), entropy64(row), -np.log((row**2).sum()), js, len(alive)
            out[5:, i, j] = (row**3).sum(), (row[row > 0] ** 2 * np.log(row[row > 0])).sum()
    return out


def ragged(lengths, groups, vocabulary, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    n, t = len(lengths), max(lengths)
    logits = torch.randn(n, t, vocabulary, generator=generator) * scale
    ids = torch.randint(vocabulary, (n, t), generator=generator)
    mask = torch.arange(t) < torch.tensor(lengths).unsqueeze(1)
    return logits, ids, mask, torch.tensor(groups)


def assert_matches(found, expected, scale):
    """scale: of the logits over the temperature, from which the largest and the normaliser's logarithm are taken."""
    atol = LARGEST * rounding(torch.float32, 2, float(scale))
    for value, name in zip(expected[:5], ("logprob", "entropy", "renyi2", "deviation", "alive"), strict=True):
        np.testing.assert_allclose(getattr(found, name).double().numpy(), value, atol=atol, err_msg=name)


CASES = {  # name: lengths, groups, vocabulary
    "one rollout alive at the end": ([3, 7, 2, 5], [0, 0, 0, 0], 11),
    "groups interleaved, any ids": ([4, 6, 1, 6, 3], [9, -2, 9, -2, 9], 17),
    "group of one": ([5, 4, 4], [0, 1, 1], 19),
    "sixteen rollouts": (list(range(1, 17)), [3] * 16, 401),
    "large vocabulary": ([2, 3], [0, 0], 49_152),
}


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("kind", ["group", "leave_one_out"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_signals_match_the_float64_oracle(case, kind, temperature):
    logits, ids, mask, groups = ragged(*CASES[case])
    found = token_signals(logits, ids, mask, groups, temperature=temperature, reference=kind)
    expected = oracle(logits, ids, mask, groups, temperature, kind == "leave_one_out")
    assert_matches(found, expected, logits.abs().max() / temperature)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_moments_match_the_float64_oracle_to_1e_5_and_leave_the_signals_alone(case):
    logits, ids, mask, groups = ragged(*CASES[case])
    found, plain = token_signals(logits, ids, mask, groups, moments=True), token_signals(logits, ids, mask, groups)
    for value, name in zip(oracle(logits, ids, mask, groups)[5:], ("sum_p3", "sum_p2_logp"), strict=True):
        np.testing.assert_allclose(getattr(found, name).double().numpy(), value, rtol=1e-5, err_msg=name)
        assert getattr(plain, name) is None
    assert torch.equal(found.entropy, plain.entropy) and torch.equal(found.deviation, plain.deviation)


def test_moments_of_forbidden_tokens_and_decided_ones_are_finite():
    # p = (1/2, 1/2, 0): sum p^3 = 1/4, sum p^2 ln p = -ln 2 / 2; one-hot: 1 and 0
    logits = torch.stack([torch.tensor([0.0, 0.0, -torch.inf]), one_hot(1, 3)]).unsqueeze(0)
    found = token_signals(
        logits, torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1), moments=True
    )
    assert found.sum_p3[0].tolist() == pytest.approx([0.25, 1.0], abs=1e-6)
    assert found.sum_p2_logp[0].tolist() == pytest.approx([-LN2 / 2, 0.0], abs=1e-6)


def test_a_decided_token_keeps_its_digits():
    # p = (1 - 2e, e, e), e = e^-25 = 1.39e-11: ln p = -2e, H = 2e (1 + 25), sum p^2 ln p = -2e, all to order e^2
    e = math.exp(-25)
    logits = torch.tensor([[[25.0, 0.0, 0.0]]])
    ids, mask = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    found = token_signals(logits, ids, mask, torch.zeros(1), moments=True)
    for name, value in (("logprob", -2 * e), ("entropy", 52 * e), ("sum_p2_logp", -2 * e)):
        assert float(getattr(found, name)) == pytest.approx(value, rel=1e-5), name


def test_bf16_logits_are_taken_as_exact_inputs():
    logits, ids, mask, groups = ragged([6, 4, 5], [0, 0, 0], 151)
    logits = logits.bfloat16()
    found, expected = token_signals(logits, ids, mask, groups), oracle(logits.float(), ids, mask, groups)
    assert_matches(found, expected, logits.abs().max())


def assert_same_bits(a, b, rows=slice(None)):
    for name in a.__dataclass_fields__:
        assert torch.equal(getattr(a, name)[rows], getattr(b, name)), name


@pytest.mark.parametrize("kind", ["group", "leave_one_out"])
@pytest.mark.parametrize("vocabulary", [23, 1500])
def test_chunks_of_rows_and_positions_change_nothing(monkeypatch, vocabulary, kind):
    # groups of 2, 5 and 1 rows, out of order; chunks from one group at one position to everything
    inputs = ragged([9, 5, 7, 9, 3, 8, 2, 6], [0, 1, 0, 1, 1, 7, 1, 1], vocabulary)
    whole = token_signals(*inputs, reference=kind, moments=True)
    for elements in (1, 3 * 5 * vocabulary, 7 * 2 * vocabulary + 1):
        monkeypatch.setattr(definition, "CHUNK_ELEMENTS", elements)
        assert_same_bits(whole, token_signals(*inputs, reference=kind, moments=True))


@pytest.mark.parametrize("vocabulary", [23, 1500])
def test_signals_of_a_group_do_not_depend_on_other_groups(vocabulary):
    logits, ids, mask, groups = ragged([4, 9, 7, 9, 3, 8, 2, 6, 5], [4, 4, 4, 0, 0, 0, 2, 2, 2], vocabulary)
    whole = token_signals(logits, ids, mask, groups, moments=True)
    for rows in (slice(0, 3), slice(3, 9)):
        assert_same_bits(whole, token_signals(logits[rows], ids[rows], mask[rows], groups[rows], moments=True), rows)


def test_a_nan_shows_in_its_own_group_and_nowhere_else():
    logits, ids, mask, groups = ragged([3, 3, 3, 3], [0, 0, 1, 1], 7)
    logits[0, 1, 2] = torch.nan
    found = token_signals(logits, ids, mask, groups)
    clean = token_signals(logits[2:], ids[2:], mask[2:], groups[2:])
    for name in ("logprob", "entropy", "renyi2", "deviation"):
        assert getattr(found, name)[0].isnan().tolist() == [False, True, False], name
    assert found.deviation[1].isnan().tolist() == [False, True, False]
    assert torch.isfinite(found.entropy[1]).all()
    assert torch.equal(found.deviation[2:], clean.deviation) and torch.isfinite(clean.deviation).all()


def test_identical_rollouts_deviate_by_exactly_zero():
    row = torch.randn(1, 6, 31, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 6, dtype=torch.bool)
    found = token_signals(row.expand(3, 6, 31), torch.zeros(3, 6, dtype=torch.long), mask, torch.zeros(3))
    assert torch.equal(found.deviation, torch.zeros(3, 6))


def one_hot(token: int, vocabulary: int) -> torch.Tensor:
    return torch.where(torch.arange(vocabulary) == token, 0.0, -torch.inf)


def test_two_disjoint_one_hot_rollouts_reach_the_cap_of_two():
    # P = (1/2, 1/2), m = (3/4, 1/4): H(m) - H(P)/2 = 0.56234 - 0.34657 = 0.21576 = cap(2)
    logits = torch.stack([one_hot(0, 5), one_hot(1, 5)]).unsqueeze(1)
    ids = torch.tensor([[0], [1]])
    found = token_signals(logits, ids, torch.ones(2, 1, dtype=torch.bool), torch.zeros(2))
    torch.testing.assert_close(found.deviation, torch.full((2, 1), 0.215762), atol=1e-6, rtol=0)
    assert torch.equal(found.entropy, torch.zeros(2, 1)) and torch.equal(found.logprob, torch.zeros(2, 1))


def test_one_outlier_among_eight_reaches_the_cap_of_eight():
    logits = torch.stack([one_hot(1, 5)] + [one_hot(0, 5)] * 7).unsqueeze(1)
    found = token_signals(
        logits, torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1, dtype=torch.bool), torch.zeros(8)
    )
    assert found.deviation[0, 0].item() == pytest.approx(0.4969, abs=5e-5)
    assert found.alive[0, 0].item() == 8


def test_uniform_logits_have_entropy_and_renyi_of_ln_v():
    found = token_signals(
        torch.zeros(1, 2, 64), torch.zeros(1, 2, dtype=torch.long), torch.tensor([[True, False]]), torch.zeros(1)
    )
    assert found.entropy[0].tolist() == pytest.approx([math.log(64), 0.0], abs=1e-6)
    assert found.renyi2[0].tolist() == pytest.approx([math.log(64), 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("n", "cap"), [(1, 0.0), (2, 0.2158), (3, 0.3183), (4, 0.3804), (8, 0.4969), (16, 0.5743), (10**6, LN2)]
)
def test_deviation_cap(n, cap):
    assert float(deviation_cap(n)) == pytest.approx(cap, abs=6e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 9), scale=st.floats(0.01, 60))
def test_deviation_lies_between_zero_and_its_cap_and_renyi_below_shannon(seed, n, scale):
    logits, ids, mask, groups = ragged([1 + (seed + i) % 4 for i in range(n)], [0] * n, 13, seed, scale)
    found = token_signals(logits, ids, mask, groups)
    assert (found.deviation >= 0).all()
    assert (found.deviation <= deviation_cap(found.alive) + 1e-6).all()
    assert (found.renyi2 <= found.entropy + 1e-5).all()


def test_masked_positions_do_not_matter():
    logits, ids, mask, groups = ragged([2, 5, 3], [0, 0, 0], 9)
    poisoned = torch.where(mask.unsqueeze(-1), logits, torch.nan)
    a, b = (token_signals(z, ids, mask, groups, moments=True) for z in (logits, poisoned))
    for name in a.__dataclass_fields__:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3)}, r"logits have shape \(2, 3\), expected \[N, T, V\]"),
        ({"mask": torch.ones(2, 3)}, "mask has dtype torch.float32, expected torch.bool"),
        ({"token_ids": torch.zeros(2, 4, dtype=torch.long)}, r"token_ids has shape \(2, 4\), expected \(2, 3\)"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a finite number > 0"),
        ({"reference": "grup"}, "Unknown deviation reference 'grup'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "logits": torch.zeros(2, 3, 4),
        "token_ids": torch.zeros(2, 3, dtype=torch.long),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "group_ids": torch.zeros(2),
    } | change
    with pytest.raises(ValueError, match=message):
        token_signals(**arguments)
