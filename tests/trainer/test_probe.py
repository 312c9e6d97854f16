"""The probe on a real update: it measures what the optimizer did, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from test_update import batch_of, config_of
from tiny import tiny_policy

from trainer.learning.probe import POSITIONS, finish_probe, spread, take_probe
from trainer.policy import policy as policy_module
from trainer.update import Updater


def renyi2_64(logits):
    return -torch.logsumexp(2 * torch.log_softmax(logits.double(), -1), -1)


def test_positions_are_spread_over_the_response_tokens():
    mask = torch.tensor([[True, True, True, False], [True, False, False, False], [True, True, False, False]])
    rows, columns = spread(mask, 3)  # tokens 1, 3 and 5 of six
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 0), (0, 2), (2, 0)]
    rows, columns = spread(mask, 6)
    assert mask[rows, columns].all() and len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == 6
    rows, columns = spread(mask, 60)  # more than there are: all of them, repeated, and none outside the mask
    assert mask[rows, columns].all() and len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == 6


def test_the_true_change_is_that_of_the_policys_own_logits():
    config = config_of(rollout={"temperature": 0.8})
    policy = tiny_policy()
    batch = batch_of(policy, config)
    probe = take_probe(policy, batch, 0.8)

    def renyi2():
        with torch.no_grad():
            return renyi2_64(policy.project(policy.hidden(batch))[::2][probe.rows, probe.columns] / 0.8)

    before = renyi2()
    Updater(policy, None, config).update(batch, step=1)
    _, true = finish_probe(policy, probe)
    after = renyi2()
    assert torch.equal(probe.batch.input_ids, batch.input_ids[::2]) and len(true) == POSITIONS
    torch.testing.assert_close(true, after - before, atol=2e-6, rtol=1e-4)
    assert true.abs().max() > 1e-3


def test_small_steps_are_predicted_and_the_error_is_of_second_order():
    errors = {}
    for lr in (1e-5, 1e-4):
        config = config_of(optim={"lr": lr}, record={"probe_every": 1})
        policy = tiny_policy()
        predicted, true = Updater(policy, None, config).update(batch_of(policy, config), step=1).probe
        errors[lr] = float((predicted - true).abs().mean())
        assert float(torch.corrcoef(torch.stack([predicted, true]))[0, 1]) > 0.995
    # Adam's first step is lr * sign(gradient): ten times the step, a hundred times the error
    assert errors[1e-4] / errors[1e-5] == pytest.approx(100, rel=0.3)


def test_probed_steps_are_every_nth_and_change_no_weight():
    found = []
    for every in (0, 2):
        config = config_of(record={"probe_every": every})
        policy = tiny_policy()
        updater = Updater(policy, None, config)
        updates = [updater.update(batch_of(policy, config, seed=step), step) for step in (1, 2, 3)]
        found.append((updates, [p.detach().clone() for p in policy.model.parameters()]))
    (never, plain), (probed, same) = found
    assert [u.probe is not None for u in never + probed] == [False] * 3 + [False, True, False]
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))


def test_a_large_vocabulary_has_fewer_positions(monkeypatch):
    policy, config = tiny_policy(), config_of()
    monkeypatch.setattr(policy_module, "SLAB_ELEMENTS", 4 * 10 * policy.vocabulary)
    assert take_probe(policy, batch_of(policy, config), 1.0).logits.shape == (10, policy.vocabulary)
