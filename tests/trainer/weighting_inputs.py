"""Inputs of weightings small enough to work out by hand."""

from __future__ import annotations

import torch

from monitor.signals import TokenSignals
from trainer.config import WEIGHTINGS, WeightingConfig, make_weighting
from trainer.learning.weightings import WeightInputs, token_weights

REQUIRED = {"rsi": {"low": -1.0, "high": 0.5}}  # settings without which a kind does not start


def mask_of(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def signals_of(*, deviation=None, entropy=None, logprob=None, alive=4, moments=None) -> TokenSignals:
    """Signals of what is given, [N, T] nested lists or tensors; the rest is 0 (logprob: minus the entropy).

    moments: (renyi2, sum_p3, sum_p2_logp), or None for signals without moments, whose renyi2 is the entropy.
    """
    given = next(x for x in (deviation, entropy, logprob) if x is not None)
    zero = torch.zeros_like(torch.as_tensor(given, dtype=torch.float32))
    deviation, entropy = (zero if x is None else torch.as_tensor(x, dtype=torch.float32) for x in (deviation, entropy))
    logprob = -entropy if logprob is None else torch.as_tensor(logprob, dtype=torch.float32)
    alive = torch.as_tensor(alive, dtype=torch.int32).expand(zero.shape)
    renyi2, *powers = (entropy,) if moments is None else moments
    return TokenSignals(logprob, entropy, renyi2, deviation, alive, *powers)


def signals_of_changes(changes, deviation=None) -> TokenSignals:
    """Signals whose dH1 is `changes` [N, T] at advantage 1: with p = 1 and H = 0, dH1 = A sum p^2 ln p."""
    changes = torch.as_tensor(changes, dtype=torch.float32)
    zero = torch.zeros_like(changes)
    return signals_of(deviation=deviation, entropy=zero, moments=(zero, zero, changes))


def inputs_of(signals: TokenSignals, mask: torch.Tensor, advantages=None, *, seed=0, **others) -> WeightInputs:
    """Advantages from -1 to 1 over the rows unless given."""
    advantages = torch.linspace(-1, 1, len(mask)) if advantages is None else torch.tensor(advantages)
    return WeightInputs(signals, mask, advantages, torch.Generator().manual_seed(seed), **others)


def random_inputs(n=8, width=20, seed=0, **others) -> WeightInputs:
    """Random but consistent signals of two groups, lengths 1 to `width`, one silent response (row 0)."""
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, width, 7, generator=draw)
    logp = torch.log_softmax(logits, -1)
    lengths = [width, width, 1, *torch.randint(2, width, (n - 3,), generator=draw).tolist()]
    mask = mask_of(*lengths)
    deviation = torch.rand(n, width, generator=draw) * 0.3
    deviation[0] = 0
    entropy = -(logp.exp() * logp).sum(-1)
    moments = (
        -(2 * logp).logsumexp(-1) * mask,
        (3 * logp).exp().sum(-1) * mask,
        ((2 * logp).exp() * logp).sum(-1) * mask,
    )
    signals = signals_of(
        deviation=deviation * mask, entropy=entropy * mask, logprob=logp[..., 0] * mask, moments=moments
    )
    current = (logp[..., 0] + 0.3 * torch.randn(n, width, generator=draw)) * mask
    attention = torch.rand(n, width, generator=draw) * mask
    others = {"current_logprobs": current, "attention": attention, "steps_active": 1000} | others
    return inputs_of(signals, mask, torch.randn(n, generator=draw).tolist(), **others)


def config_of(kind: str, **settings) -> WeightingConfig:
    return make_weighting({"kind": kind, **REQUIRED.get(kind, {}), **settings})


def weights(kind: str, inputs: WeightInputs, **settings) -> torch.Tensor:
    return token_weights(inputs, config_of(kind, **settings))


KINDS = list(WEIGHTINGS)
