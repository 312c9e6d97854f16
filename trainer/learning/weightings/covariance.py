"""Holding back the tokens that drive entropy down fastest: Clip-Cov and KL-Cov."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.learning.weightings.inputs import WeightInputs, mean_of_batch, random_scores, top_of_batch


def token_covariance(inputs: WeightInputs) -> Tensor:
    """c = (logprob - mean logprob) * (A - mean A), float32 [N, T], nats; means are over all tokens in the mask.

    The mean of c is the covariance of log-probability and advantage. Where that is positive, a policy-gradient step
    lowers the entropy. Source: arXiv 2505.22617.
    """
    advantage = inputs.advantages.unsqueeze(1).expand(inputs.mask.shape)
    first = inputs.signals.logprob - mean_of_batch(inputs.signals.logprob, inputs.mask)
    return first * (advantage - mean_of_batch(advantage, inputs.mask))


def _count(inputs: WeightInputs, share: float) -> Tensor:
    """max(1, floor(share * tokens)), int64 [1]. Adding 1e-9 undoes rounding such as 0.29 * 100 = 28.999999999999996."""
    return torch.floor(inputs.mask.sum().double() * share + 1e-9).long().clamp(min=1).reshape(1)


def clip_cov(inputs: WeightInputs, *, share: float, low: float, high: float) -> Tensor:
    """All tokens but a few of high covariance between log-probability and advantage (Clip-Cov).

    Formula: w = 0 on max(1, floor(share * tokens)) tokens drawn at random from those with low < c < high, else 1;
    c = (logprob - mean logprob) * (A - mean A).
    Scope: the whole rollout batch, with the old policy's logprob. In verl it is the micro-batch, with the current
    policy's logprob, and tokens that PPO clips are never drawn (before the first update none are clipped).
    Denominator: all tokens of the batch (normalise = "all" with loss.kind = "dapo").
    Defaults: share = 0.0002, low = 1.0, high = 5.0.
    Source: arXiv 2505.22617, numbers as in verl, whose recipe sets the ratio clip so wide that it hardly ever acts.
    """
    c = token_covariance(inputs)
    candidates = inputs.mask & (c > low) & (c < high)
    return inputs.mask.float() - top_of_batch(random_scores(inputs), candidates, _count(inputs, share))


def kl_cov(inputs: WeightInputs, *, share: float, penalty: float) -> Tensor:
    """Every token counts alike, and the few of highest covariance pay a penalty for leaving the old policy (KL-Cov).

    Formula: w = 1, and penalty * |logprob - old logprob| is added to psi of the max(1, floor(share * tokens))
    tokens of largest c = (logprob - mean logprob) * (A - mean A) by rank (`kl_cov_penalty`).
    Scope: the mini-batch, with the old policy's logprob (verl: the micro-batch, with the current policy's logprob).
    Denominator: all tokens of the batch (loss.kind = "dapo").
    Defaults: share = 0.0002, penalty = 1.0.
    Source: arXiv 2505.22617, numbers as in verl (the authors take share 0.002 for 7B). verl's form has no ratio clip;
    here the loss keeps its clip. The penalty has no gradient on-policy, where |log-ratio| is 0, so optim.epochs or
    optim.mini_batches above 1 is required.
    """
    return inputs.mask.float()


def kl_cov_penalty(inputs: WeightInputs, *, share: float, penalty: float) -> Tensor:
    """float32 [N, T]: `penalty` on the tokens that `kl_cov` chooses (ties: the earlier token), else 0."""
    return penalty * top_of_batch(token_covariance(inputs), inputs.mask, _count(inputs, share))
