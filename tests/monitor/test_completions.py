"""Repetition and equal texts against plain Python on the same tokens."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="monitor.signals needs torch")

import torch

from monitor.signals.completions import repetition, same_text


def plain_repetition(ids: list[int], n: int) -> float:
    runs = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return sum(run in runs[:i] for i, run in enumerate(runs)) / max(len(runs), 1)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_repetition_is_the_share_of_runs_that_stood_there_before(n: int) -> None:
    rng = np.random.default_rng(n)
    lengths = rng.integers(0, 30, 64)
    ids = rng.integers(0, 4, (64, 29))  # few tokens, so that much repeats
    mask = np.arange(29) < lengths[:, None]
    found = repetition(torch.tensor(ids), torch.tensor(mask), n)
    expected = [plain_repetition(row[:length].tolist(), n) for row, length in zip(ids, lengths, strict=True)]
    assert found.tolist() == pytest.approx(expected)


def test_repetition_by_hand() -> None:
    # 1 2 1 2 1 has the runs 12 21 12 21, of which two stood there before; five tokens have no run of six
    ids = torch.tensor([[1, 2, 1, 2, 1]])
    assert repetition(ids, torch.ones(1, 5).bool(), 2).tolist() == [0.5]
    assert repetition(ids, torch.ones(1, 5).bool(), 6).tolist() == [0.0]


def test_same_text_counts_equal_responses_of_the_own_group_alone() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 4, 96)
    ids, groups = rng.integers(0, 2, (96, 3)), np.arange(96) // 8
    mask = np.arange(3) < lengths[:, None]
    texts = [(group, *row[:length]) for group, row, length in zip(groups, ids.tolist(), lengths, strict=True)]
    found = same_text(torch.tensor(ids), torch.tensor(mask), torch.tensor(groups))
    assert found.tolist() == [texts.count(text) - 1 for text in texts]
    assert max(found) >= 2  # the case is not empty


def test_what_stands_behind_a_response_does_not_matter() -> None:
    ids = torch.tensor([[5, 6, 1], [5, 6, 2], [5, 6, 2]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool()
    assert same_text(ids, mask, torch.zeros(3)).tolist() == [1.0, 1.0, 0.0]
