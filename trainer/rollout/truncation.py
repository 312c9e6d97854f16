"""Sampling from a part of the distribution: top_k, top_p, min_p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import RolloutConfig


@dataclass(frozen=True, slots=True)
class Truncation:
    """Which tokens may be drawn; by default all. In this order, each on what the one before left, as transformers does.

    top_k: the k likeliest tokens, and those as likely as the last of them; 0: all. top_p: the fewest likeliest tokens
    whose probabilities add up to more than top_p; 1: all. min_p: those at least min_p times as likely as the likeliest.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def of(cls, rollout: RolloutConfig) -> Truncation:
        return cls(rollout.top_k, rollout.top_p, rollout.min_p)

    @property
    def leaves_all(self) -> bool:
        return not self.top_k and self.top_p == 1 and not self.min_p

    def __call__(self, logp: Tensor) -> Tensor:
        """ln q [B, V] of what is sampled from, of ln p [B, V], nats: q = p / Z on the tokens kept, 0 (-inf) elsewhere.

        Z is the probability that p gives to the tokens kept, so ln q - ln p = -ln Z is the same for all of them.
        Example: p = (.5, .3, .2), top_p = .7: the first two are kept, Z = .8, q = (.625, .375, 0).
        Source: top_p is nucleus sampling, arXiv 1904.09751; min_p is arXiv 2407.01082.
        """
        if self.leaves_all:
            return logp
        if 0 < self.top_k < logp.shape[-1]:
            least = logp.topk(self.top_k, dim=-1).values[:, -1:]
            logp = torch.log_softmax(logp.masked_fill(logp < least, -torch.inf), dim=-1)
        if self.top_p < 1:
            ordered, places = logp.sort(dim=-1)  # the unlikely first: their small probabilities add up exactly
            drop = ordered.exp().cumsum(-1) <= 1 - self.top_p
            drop[:, -1] = False
            logp = logp.masked_fill(drop.scatter(1, places, drop), -torch.inf)
        if self.min_p:
            logp = logp.masked_fill(logp < logp.amax(-1, keepdim=True) + torch.tensor(self.min_p).log(), -torch.inf)
        return torch.log_softmax(logp, dim=-1)
