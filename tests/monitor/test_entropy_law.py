"""The entropy-reward law against known answers and numpy's own least squares."""

from __future__ import annotations

import numpy as np
import pytest

from monitor.stats.entropy_law import EntropyLaw, fit_entropy_law


def test_an_exact_law_is_found_with_its_ceiling_and_no_band():
    entropy = np.linspace(0.05, 1.2, 30)
    law = fit_entropy_law(entropy, 1.0 - 0.2 * np.exp(entropy))
    assert (law.a, law.b, law.r2) == pytest.approx((0.2, 1.0, 1.0))
    assert law.ceiling == pytest.approx(0.8)
    mean, low, high = law.forecast(np.array([0.0, np.log(2.0)]))
    assert mean == pytest.approx([0.8, 0.6]) and low == pytest.approx(mean) and high == pytest.approx(mean)


def test_four_points_by_hand():
    # x = exp(H) = 1, 2, 3, 4; R = 3, 2, 2, 1: slope -0.6, mean x 2.5, mean R 2, so a = 0.6, b = 3.5, ceiling 2.9
    # residuals 0.1, -0.3, 0.3, -0.1: SSE 0.2 of SST 2, so R^2 = 0.9 and the spread sqrt(0.2 / 2)
    law = fit_entropy_law(np.log([1.0, 2.0, 3.0, 4.0]), np.array([3.0, 2.0, 2.0, 1.0]))
    assert (law.a, law.b, law.ceiling) == pytest.approx((0.6, 3.5, 2.9))
    assert (law.r2, law.spread, law.sxx) == pytest.approx((0.9, 0.1**0.5, 5.0))


def test_the_band_holds_as_many_new_points_as_it_says():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(2000):
        entropy = rng.uniform(0.1, 1.0, 13)
        reward = 0.9 - 0.3 * np.exp(entropy) + rng.normal(0, 0.05, 13)
        _, low, high = fit_entropy_law(entropy[:-1], reward[:-1]).forecast(entropy[-1:])
        inside.append(low[0] <= reward[-1] <= high[0])
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)  # three standard errors of 2000 draws


def test_the_fit_is_numpys_least_squares_and_leaves_gaps_out():
    rng = np.random.default_rng(1)
    entropy, reward = rng.uniform(0.1, 1.0, 40), rng.normal(0.5, 0.1, 40)
    entropy[3], reward[9] = np.nan, np.inf
    keep = np.isfinite(entropy) & np.isfinite(reward)
    slope, intercept = np.polyfit(np.exp(entropy[keep]), reward[keep], 1)
    law = fit_entropy_law(entropy, reward)
    assert (law.a, law.b, law.n) == pytest.approx((-slope, intercept, 38))


def test_too_little_to_fit_is_refused():
    with pytest.raises(ValueError, match="got 3 finite points, expected at least 4"):
        fit_entropy_law(np.array([0.1, 0.2, 0.3, np.nan]), np.ones(4))
    with pytest.raises(ValueError, match=r"All 5 entropies are 0\.3"):
        fit_entropy_law(np.full(5, 0.3), np.arange(5.0))


@pytest.mark.parametrize(  # tables of Student's t
    ("freedom", "expected"), [(2, 4.3027), (3, 3.1824), (4, 2.7764), (10, 2.2281)]
)
def test_the_band_is_a_students_t(freedom, expected):
    # at the mean of exp(H) the leverage is 1 + 1/n, so the half width is t spread sqrt(1 + 1/n)
    n = freedom + 2
    law = EntropyLaw(a=0.2, b=1.0, r2=0.5, spread=0.1, n=n, mean_x=2.0, sxx=1.0)
    mean, low, high = law.forecast(np.log([2.0]))
    assert mean[0] == pytest.approx(0.6)
    assert (high[0] - low[0]) / 2 == pytest.approx(expected * 0.1 * (1 + 1 / n) ** 0.5, rel=2e-5)
