from __future__ import annotations

import numpy as np
import pytest

from monitor.errors import nearest
from monitor.metrics import EDGES_IDS, METRICS, cell_bounds, inner_edges, metric, n_cells


@pytest.mark.parametrize("edges_id", EDGES_IDS)
def test_cells_cover_the_line_without_gap_or_overlap(edges_id: str) -> None:
    lows, highs = cell_bounds(edges_id)
    assert lows[0] == -np.inf and highs[-1] == np.inf
    assert np.array_equal(lows[1:], highs[:-1])
    assert np.all(lows < highs)
    assert len(lows) == n_cells(edges_id)
    assert inner_edges(edges_id).dtype == np.float32


def test_weight_has_cells_of_its_own_for_zero_and_one() -> None:
    cell = np.searchsorted(inner_edges("weight"), np.array([0.0, 1e-3, 1.0, 1.5, -1.0], np.float32), side="right")
    lows, highs = cell_bounds("weight")
    assert (lows[cell[0]], highs[cell[0]]) == (0.0, pytest.approx(1e-6))
    assert lows[cell[2]] == 1.0 and highs[cell[2]] == pytest.approx(1.0, abs=2e-6)
    assert len(set(cell.tolist())) == 5


def test_joint_edges_multiply() -> None:
    assert n_cells("nats24*deviation24") == n_cells("nats24") * n_cells("deviation24") == 26 * 26


def test_eval_keys_are_templates() -> None:
    assert metric("eval/heldout/pass@8").label == "pass@8, heldout"
    assert metric("eval/ood/distinct").unit == "answers"


@pytest.mark.parametrize(
    "key", ["entropi", "eval/heldout/pass@", "eval/heldout/pass@x", "eval/heldout/nothing", "eval/heldout"]
)
def test_unknown_metric_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="Unknown metric"):
        metric(key)


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'entropy'"):
        metric("entrpy")
    assert nearest("zzz", METRICS) == ""


def test_unknown_edges_list_the_known() -> None:
    with pytest.raises(ValueError, match="Known: nats96"):
        inner_edges("nats97")
