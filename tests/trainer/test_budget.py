"""Budget weightings against a plain float64 loop over tokens, and what holds for any batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from weighting_inputs import config_of, inputs_of, mask_of, random_inputs, signals_of_changes, weights

from monitor.signals import token_signals
from monitor.signals.diagnostics import diagnostic_scalars, entropy_change, update_sums
from trainer.config import ConfigError
from trainer.learning.weightings import WeightInputs
from trainer.learning.weightings.inputs import random_scores

BUDGETS = ("entropy_budget", "ict_budget", "ict_soft_budget", "random_budget")


def sampled_inputs(seed: int, n: int = 8, t: int = 12, v: int = 9):
    """Inputs of two groups of sampled tokens that lose entropy, and what an oracle needs: logits float64, token ids.

    Responses have advantages of both signs, each the sign with which its tokens together lower the entropy.
    """
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, t, v, generator=draw)
    ids = torch.distributions.Categorical(logits=logits).sample()
    mask = mask_of(t, *torch.randint(1, t + 1, (n - 1,), generator=draw).tolist())
    signals = token_signals(logits, ids, mask, torch.arange(n) // 4, moments=True)
    flow = entropy_change(signals, torch.ones(n))[0].sum(1)
    advantages = -flow.sign() * (0.5 + torch.rand(n, generator=draw))
    signals = replace(signals, deviation=signals.deviation + 1e-3 * torch.rand(n, t, generator=draw))  # no ties
    return inputs_of(signals, mask, advantages.tolist(), seed=seed), logits.double(), ids


def plain_change(z, token: int, advantage: float) -> float:
    """dH1 = sum_v dH/dz_v A (1[v = o] - p_v), with dH/dz_v = -p_v (ln p_v + H)."""
    p = [float(x) for x in torch.softmax(z, 0)]
    logs = [float(x) for x in torch.log_softmax(z, 0)]
    entropy = -sum(a * b for a, b in zip(p, logs, strict=True))
    step = [advantage * ((v == token) - p[v]) for v in range(len(p))]
    return sum(-p[v] * (logs[v] + entropy) * step[v] for v in range(len(p)))


def plain_budget(kind: str, inputs: WeightInputs, logits, ids, share: float, order) -> list[list[float]]:
    """The rule as its docstring says it, token by token; `order` [N, T] is what tokens are sorted by."""
    n, t = inputs.mask.shape
    change = {
        (i, j): plain_change(logits[i, j], int(ids[i, j]), float(inputs.advantages[i]))
        for i in range(n) for j in range(t) if inputs.mask[i, j]
    }  # fmt: skip
    weight = dict.fromkeys(change, 1.0)
    lowering = [at for at, dh in change.items() if dh < 0]
    low = sum(change[at] for at in lowering)
    net = sum(change.values())
    if net < 0 and kind == "entropy_budget":
        a = min(max((share * net - (net - low)) / low, 0.0), 1.0)
        weight |= dict.fromkeys(lowering, a)
    elif net < 0 and kind == "ict_soft_budget":
        most = max(float(order[at]) for at in lowering)
        relative = {at: float(order[at]) / most for at in lowering}
        missing = share * net - net
        b = missing / sum(-change[at] * (1 - relative[at]) for at in lowering)
        for at in lowering:
            weight[at] = 1 - b * (1 - relative[at])
        if b > 1:
            full = sum(-change[at] * relative[at] for at in lowering)
            a = max((-low - missing) / full, 0.0)
            weight |= {at: a * relative[at] for at in lowering}
    elif net < 0:
        for at in sorted(lowering, key=lambda at: float(order[at])):
            missing = share * net - sum(weight[x] * dh for x, dh in change.items())
            weight[at] = 1 - min(max(missing / -change[at], 0.0), 1.0)
    return [[weight.get((i, j), 0.0) for j in range(t)] for i in range(n)]


@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("share", [0.3, 0.0, -0.4, 0.95])
@pytest.mark.parametrize("seed", [0, 1])
def test_weights_are_those_of_a_plain_loop(kind, share, seed):
    inputs, logits, ids = sampled_inputs(seed)
    order = inputs.signals.deviation
    if kind == "random_budget":
        order = random_scores(replace(inputs, generator=torch.Generator().manual_seed(seed)))
    found, expected = weights(kind, inputs, share=share), plain_budget(kind, inputs, logits, ids, share, order)
    decided = entropy_change(inputs.signals, inputs.advantages)[0].abs() < 1e-6  # the sign is rounding
    np.testing.assert_allclose(found[~decided], torch.tensor(expected)[~decided], atol=1e-4)
    assert (decided & inputs.mask).sum() <= 2 and (found < 0.99)[inputs.mask].any()


@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("share", [-1.0, -0.1, 0.0, 0.3, 1.0])
def test_the_net_is_the_share_of_the_unweighted_net(kind, share):
    braked = 0
    for seed in range(20):
        given = random_inputs(seed=seed)
        change = entropy_change(given.signals, given.advantages)[0] * given.mask
        found, net = weights(kind, given, share=share).double(), float(change.sum())
        assert (found[(change >= 0) & given.mask] == 1).all() and (found <= 1).all()
        if net >= 0 or share == 1:
            assert torch.equal(found, given.mask.double())
        else:
            reached = min(share * net, float(change.clamp(min=0).sum()))  # all that raising tokens can give
            assert float((found * change).sum()) == pytest.approx(reached, rel=1e-6, abs=1e-6)
            braked += 1
        if kind in ("ict_budget", "random_budget"):
            assert ((found > 0) & (found < 1)).sum() <= given.mask.sum(1).max()  # row 0 of equal deviations at most
    assert braked > 5 or share == 1


@pytest.mark.parametrize("kind", ["ict_budget", "random_budget"])
def test_what_is_left_out_deviates_less_than_what_is_kept(kind):
    given = random_inputs(seed=1)
    order = given.signals.deviation
    if kind == "random_budget":
        order = random_scores(replace(given, generator=torch.Generator().manual_seed(1)))
    found = weights(kind, replace(given, generator=torch.Generator().manual_seed(1)))
    lowering = (entropy_change(given.signals, given.advantages)[0] < 0) & given.mask
    assert order[lowering & (found == 0)].max() <= order[lowering & (found == 1)].min()


@pytest.mark.parametrize("kind", BUDGETS)
def test_the_recorded_flow_of_the_weighted_update_is_the_share(kind):
    given = random_inputs()
    found = weights(kind, given, share=0.3)
    told = diagnostic_scalars(
        {k: float(v) for k, v in update_sums(given.signals, given.mask, found, given.advantages).items()}
    )
    mean = float(found[given.mask].double().mean())
    weighted = told["predicted_entropy_lowering_weighted"] + told["predicted_entropy_raising_weighted"]
    assert weighted * mean == pytest.approx(0.3 * told["predicted_entropy_change"], rel=1e-5)
    assert told["predicted_entropy_raising_weighted"] * mean == pytest.approx(told["predicted_entropy_raising"])


def test_opefo_is_a_plain_loop_and_leaves_no_net():
    for seed in range(3):
        given, logits, ids = sampled_inputs(seed)
        places = given.mask.nonzero().tolist()
        change = [plain_change(logits[i, j], int(ids[i, j]), float(given.advantages[i])) for i, j in places]
        low, high = sum(dh for dh in change if dh < 0), sum(dh for dh in change if dh > 0)
        expected = [2 * (high if dh < 0 else -low) / (high - low) for dh in change]
        found = weights("opefo", given)[given.mask].double()
        clear = [abs(dh) > 1e-6 for dh in change]  # of the others the sign is rounding
        np.testing.assert_allclose(found[clear], np.array(expected)[clear], rtol=1e-4)
        assert abs(float((found * torch.tensor(change)).sum())) < 1e-5 * (high - low)


@pytest.mark.parametrize("kind", BUDGETS)
def test_tokens_without_an_advantage_neither_raise_nor_lower(kind):
    given = replace(random_inputs(), advantages=torch.zeros(8))
    assert torch.equal(weights(kind, given), given.mask.float())


def test_an_exact_cut_among_neighbouring_deviations():
    """Deviations one float32 apart, from the smallest to a large one, are told apart."""
    for first in (0.0, 1e-6, 0.1, 0.6):
        second = torch.nextafter(torch.tensor(first), torch.tensor(1.0))
        given = inputs_of(signals_of_changes([[-1.0, -1.0]], [[float(second), first]]), mask_of(2), [1.0])
        assert weights("ict_budget", given, share=0.5).tolist() == [[1, 0]]


def test_the_flow_of_all_ranks_decides():
    # here L = -2, U = 0; the other rank adds 6 to the sums of changes: the run gains entropy, so nothing is braked
    given = inputs_of(signals_of_changes([[-2.0]]), mask_of(1), [1.0], sum_over_ranks=lambda own: own + 6)
    assert weights("entropy_budget", given).tolist() == [[1]]


@pytest.mark.parametrize("kind", BUDGETS)
def test_settings_of_a_budget(kind):
    config = config_of(kind)
    assert config.normalise == "all" and config.parameters == {"share": 0.3}
    with pytest.raises(ConfigError, match=r"share is 1\.5: input should be less than or equal to 1"):
        config_of(kind, share=1.5)
    with pytest.raises(ValueError, match="moments"):
        weights(kind, inputs_of(replace(random_inputs().signals, sum_p3=None), random_inputs().mask))
