"""Device statistics against numpy on the same tokens, and that they add over micro-batches."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="monitor.signals needs torch")

import torch

from monitor.metrics import inner_edges
from monitor.signals import TokenSignals
from monitor.signals.histograms import device_histograms
from monitor.signals.stats import loss_statistics, signal_statistics, step_record, to_host


def batch(n=6, t=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=g)
    entropy = torch.where(mask, torch.rand(n, t, generator=g) ** 6 * 3, 0.0)
    signals = TokenSignals(
        logprob=torch.where(mask, -torch.rand(n, t, generator=g) * 4, 0.0),
        entropy=entropy,
        renyi2=entropy * 0.7,
        deviation=torch.where(mask, torch.rand(n, t, generator=g) ** 9 * 0.5, 0.0),
        alive=mask.int() * 3,
    )
    weights = mask.float() * (torch.rand(n, t, generator=g) < 0.4)
    correct = torch.rand(n, generator=g) < 0.5
    return signals, mask, weights, correct


def record_of(signals, mask, weights, correct, loss_stats=None):
    stats = signal_statistics(signals, mask, weights, correct)
    return step_record(3, signals, torch.ones_like(mask).int(), mask, weights, stats, loss_stats, scalars={"lr": 0.5})


def test_histograms_equal_numpys_on_every_split():
    signals, mask, weights, correct = batch()
    record, tokens = record_of(signals, mask, weights, correct)
    found = {(h.metric, h.split): h for h in record.histograms}
    rows = correct.numpy()[tokens.sample]
    for split, chosen in {
        "all": np.ones(len(tokens), bool), "selected": tokens.weight > 0, "correct": rows, "incorrect": ~rows
    }.items():  # fmt: skip
        values = tokens.entropy[chosen]
        cells = np.searchsorted(inner_edges("nats96"), values, side="right")
        assert np.array_equal(found["entropy", split].counts, np.bincount(cells, minlength=98)), split
        assert found["entropy", split].n == chosen.sum()
        assert found["entropy", split].sum == pytest.approx(values.sum(dtype=np.float64), rel=1e-12)
        assert found["entropy", split].max == values.max()


def test_joint_counts_sum_to_the_tokens_and_their_margin_is_the_entropy():
    signals, mask, weights, correct = batch()
    record, tokens = record_of(signals, mask, weights, correct)
    joint = next(h for h in record.histograms if h.metric == "entropy*deviation" and h.split == "all")
    table = joint.counts.reshape(26, 26)
    cells = np.searchsorted(inner_edges("nats24"), tokens.entropy, side="right")
    assert np.array_equal(table.sum(1), np.bincount(cells, minlength=26))


def test_scalars_follow_from_the_tokens():
    signals, mask, weights, correct = batch()
    record, tokens = record_of(signals, mask, weights, correct)
    s, selected = record.scalars, tokens.weight > 0
    assert s["entropy"] == pytest.approx(tokens.entropy.mean(dtype=np.float64))
    assert s["entropy_selected"] == pytest.approx(tokens.entropy[selected].mean(dtype=np.float64))
    assert s["selected_share"] == pytest.approx(selected.mean())
    assert s["decided_share"] == pytest.approx((tokens.entropy < 0.05).mean())
    assert s["selected_decided_share"] == pytest.approx((tokens.entropy[selected] < 0.05).mean())
    # weights are 0 or 1, so (sum w)^2 / (n sum w^2) is the selected share itself
    assert s["effective_sample_share"] == pytest.approx(selected.mean())
    assert s["tokens"] == len(tokens) == int(mask.sum()) and s["lr"] == 0.5


def test_loss_statistics_add_over_micro_batches_bit_for_bit():
    signals, mask, weights, correct = batch(n=8)
    log_ratio, kl = signals.logprob * 0.1, signals.entropy
    parts = (mask, weights, correct, log_ratio, log_ratio < -0.2, log_ratio > 0.2, kl)
    whole = loss_statistics(*parts)
    halves = loss_statistics(*(x[:3] for x in parts)) + loss_statistics(*(x[3:] for x in parts))
    for name in ("counts", "n", "low", "high"):
        assert torch.equal(getattr(whole.histograms["log_ratio"], name), getattr(halves.histograms["log_ratio"], name))
    assert float(whole.sums["kl"]) == pytest.approx(float(halves.sums["kl"]), rel=1e-12)
    record, tokens = record_of(signals, mask, weights, correct, whole)
    used = tokens.weight > 0
    assert record.scalars["kl"] == pytest.approx(tokens.entropy[used].mean(dtype=np.float64))
    assert record.scalars["clip_share_low"] == pytest.approx((tokens.logprob[used] * np.float32(0.1) < -0.2).mean())


def test_values_on_an_edge_go_up_and_non_finite_ones_apart():
    edges = inner_edges("nats96")
    values = torch.tensor([0.0, float(edges[0]), float(edges[-1]), 50.0, torch.nan, torch.inf])
    found = device_histograms(values, torch.ones(1, 6, dtype=torch.bool), "nats96")
    counts = found.counts[0]
    assert counts[0] == 1 and counts[1] == 1 and counts[97] == 2 and counts.sum() == 4
    assert found.n_nonfinite.tolist() == [2] and float(found.total[0]) == pytest.approx(50 + edges[0] + edges[-1])


def test_zero_and_one_have_weight_cells_of_their_own():
    found = device_histograms(torch.tensor([0.0, 0.0, 1.0, 0.5, 1.05]), torch.ones(1, 5, dtype=torch.bool), "weight")
    edges = inner_edges("weight")
    zero, one = int(np.searchsorted(edges, 0.0, "right")), int(np.searchsorted(edges, 1.0, "right"))
    assert found.counts[0, zero] == 2 and found.counts[0, one] == 1 and found.counts[0, one + 1] == 1


def test_one_copy_keeps_dtypes_and_shapes():
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor(0.25, dtype=torch.float64), "c": torch.ones(2) > 0}
    host = to_host(tensors)
    for key, tensor in tensors.items():
        assert np.array_equal(host[key], tensor.numpy()) and host[key].dtype == tensor.numpy().dtype
