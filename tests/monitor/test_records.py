from __future__ import annotations

import numpy as np
import pytest
from store_data import histogram

from monitor.metrics import cell_bounds, n_cells
from monitor.records import Histogram, TokenTable, quantiles_from_counts


def skewed(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.lognormal(-1.5, 1.5, n) * (rng.random(n) < 0.8)).astype(np.float32)


def test_addition_is_bit_equal_to_the_joined_data() -> None:
    values = (skewed(5000) * 1024).round() / 1024  # sums of these are exact in float64, in any order
    parts = [histogram(part) for part in np.split(values, [1, 700, 3200])]
    joined, added = histogram(values), parts[0] + parts[1] + parts[2] + parts[3]
    assert np.array_equal(added.counts, joined.counts) and added.counts.dtype == np.int64
    for name in ("n", "n_nonfinite", "sum", "sumsq", "min", "max"):
        assert getattr(added, name) == getattr(joined, name), name
    assert added.counts.sum() == added.n == 5000


def test_addition_with_nothing_changes_nothing() -> None:
    some, none = histogram(skewed(100)), histogram(np.empty(0))
    both = some + none
    assert (both.min, both.max, both.n) == (some.min, some.max, some.n)
    assert np.isnan(none.mean) and np.isnan(none.quantiles([0.5])).all()


def test_addition_of_different_splits_is_refused() -> None:
    with pytest.raises(ValueError, match="different"):
        histogram(skewed(9)) + histogram(skewed(9), split="correct")


@pytest.mark.parametrize("seed", range(5))
def test_quantiles_are_within_one_cell_of_numpy(seed: int) -> None:
    values = skewed(20_000, seed)
    qs = np.array([0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0])
    got, exact = histogram(values).quantiles(qs), np.quantile(values.astype(np.float64), qs)
    lows, highs = cell_bounds("nats96")
    for quantile, truth in zip(got, exact, strict=True):
        cell = np.searchsorted(highs, truth, side="right")
        width = min(highs[cell], values.max()) - max(lows[cell], values.min())
        assert abs(quantile - truth) <= width + 1e-9, (quantile, truth)
    assert got[0] == values.min() and got[-1] == values.max()
    assert np.all(np.diff(got) >= 0)


def test_quantile_of_one_full_cell_is_linear_in_it() -> None:
    counts = np.zeros(n_cells("probability20"), np.int64)
    counts[10] = 4  # [0.5, 0.55)
    got = quantiles_from_counts(counts, "probability20", [0.0, 0.5, 1.0], low=0.0, high=1.0)
    np.testing.assert_allclose(got, [0.5, 0.525, 0.55], rtol=1e-6)


def test_wrong_number_of_cells_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(98,\)"):
        Histogram("entropy", "all", "nats96", np.zeros(3, np.int64), 0)


def test_columns_of_different_length_are_refused() -> None:
    column = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"TokenTable.weight has 2 rows, expected 3"):
        TokenTable(column, column, column, column, column, column, column, column, weight=column[:2])
