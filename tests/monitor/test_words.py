"""Words behind a difference: known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from monitor.stats.words import entropy_parts, log_odds


def test_log_odds_by_hand() -> None:
    # counts (6, 2) and (2, 6), prior of 8 tokens: a = 8 * 8 / 16 = 4 for each word.
    # word 1: ln((6 + 4) / (8 + 8 - 10)) - ln((2 + 4) / (16 - 6)) = ln(10/6) - ln(6/10) = 2 ln(5/3)
    # standard error: sqrt(1/10 + 1/6)
    z = 2 * math.log(5 / 3) / math.sqrt(1 / 10 + 1 / 6)
    np.testing.assert_allclose(log_odds(np.array([6, 2]), np.array([2, 6]), prior_tokens=8), [z, -z], rtol=1e-12)


def test_equal_shares_have_no_odds_and_rare_words_weigh_less() -> None:
    np.testing.assert_allclose(log_odds(np.array([10, 30]), np.array([20, 60])), 0, atol=1e-12)
    # a word seen once in a set of 100 says less than one seen 20 times as often as in the other set
    z = log_odds(np.array([1, 20, 79]), np.array([0, 1, 99]))
    assert 0 < z[0] < z[1]


def test_words_that_are_nowhere_and_one_word_alone_have_none() -> None:
    assert log_odds(np.array([0, 5, 5]), np.array([0, 3, 7]))[0] == 0
    assert log_odds(np.array([4]), np.array([9])).tolist() == [0]


@pytest.mark.parametrize(
    ("first", "second"), [([0, 0], [1, 2]), ([1, 2], [0, 0]), ([-1, 2], [1, 1]), ([1], [1, 2]), ([[1]], [[2]])]
)
def test_counts_that_make_no_sense_are_refused(first: list, second: list) -> None:
    with pytest.raises(ValueError, match="Expected counts"):
        log_odds(np.array(first), np.array(second))


def test_the_parts_of_all_words_add_up_to_the_change_of_the_mean() -> None:
    then = {"text": np.array(["a", "b"], object), "n": np.array([2, 2]), "entropy": np.array([1.0, 0.6])}
    now = {"text": np.array(["b", "c"], object), "n": np.array([1, 4]), "entropy": np.array([0.1, 0.4])}
    parts = entropy_parts(then, now)
    # then: a 1.0 / 4 = .25, b .6 / 4 = .15, mean .4; now: b .1 / 5 = .02, c .4 / 5 = .08, mean .1
    assert parts["text"].tolist() == ["a", "b", "c"]
    np.testing.assert_allclose(parts["then"], [0.25, 0.15, 0])
    np.testing.assert_allclose(parts["now"], [0, 0.02, 0.08])
    np.testing.assert_allclose(parts["lost"], [0.25, 0.13, -0.08])
    np.testing.assert_allclose(parts["lost"].sum(), 0.4 - 0.1)
    np.testing.assert_allclose(parts["share_now"], [0, 0.2, 0.8])
    assert entropy_parts({}, now) == {} and entropy_parts(then, {}) == {}
