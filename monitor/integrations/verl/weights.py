"""Weights in verl's losses: each token's advantage is multiplied while the actor is updated, and is as it was after.

verl's policy loss is linear in the advantage where that keeps its sign, so w A is w psi. Its denominators count tokens;
what a token is multiplied by makes them count weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from monitor.errors import MonitorError
from monitor.integrations.weighted import Weighting, tokens_by_weight
from monitor.signals import TokenSignals

LOSSES = ("vanilla", "cispo", "gpg")
MEANS = ("token-mean", "seq-mean-token-mean")  # those of loss_agg_mode that divide by a number of tokens
SUMS = ("token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def check_weighting(text: str, actor: Mapping[str, Any], algorithm: Mapping[str, Any]) -> None:
    """Raises MonitorError where a weight could not act. actor, algorithm: these groups of verl's configuration."""

    def refuse(what: str, expected: str) -> None:
        raise MonitorError(f"trainer.rlvr.weighting {text!r} cannot act: {what}. {expected}, or leave it out.")

    loss = (actor.get("policy_loss") or {}).get("loss_mode", "vanilla")
    mean = actor.get("loss_agg_mode", "token-mean")
    if loss not in LOSSES:
        refuse(f"actor.policy_loss.loss_mode is {loss!r}", f"Set it to one of {', '.join(LOSSES)}")
    if mean not in MEANS + SUMS:
        refuse(f"actor.loss_agg_mode is {mean!r}", f"Set it to one of {', '.join(MEANS + SUMS)}")
    if (algorithm.get("rollout_correction") or {}).get("bypass_mode"):
        refuse("in bypass mode verl scores no rollouts", "Set algorithm.rollout_correction.bypass_mode to false")


def batch_weights(tensors: Mapping[str, Tensor], weighting: Weighting, step: int) -> Tensor:
    """float32 [N, T] of a whole rollout batch. tensors: `old_log_probs`, `entropys`, `advantages`, `response_mask`.

    A response's advantage is the mean over its tokens, which is each of them unless a critic or a KL in the reward
    makes them differ. Raises ValueError where something lacks or a shape does not fit.
    """
    mask = tensors["response_mask"].bool()
    needed = ("old_log_probs", "entropys", "advantages")
    wrong = [name for name in needed if name not in tensors or tensors[name].shape != mask.shape]
    if wrong:
        raise ValueError(f"no {', '.join(wrong)} of shape {list(mask.shape)}, so the weights of step {step} are 1.")
    logprob, entropy, advantages = (torch.where(mask, tensors[name].float(), 0.0) for name in needed)
    unknown = torch.full_like(logprob, torch.nan)  # H2 and the deviation: a weighting that read them would show
    signals = TokenSignals(logprob, entropy, unknown, unknown, mask.int())
    of_response = advantages.sum(1) / mask.sum(1).clamp(min=1)
    return weighting.weights(signals, mask, of_response, step, OneProcess)


def token_advantages(advantages: Tensor, weights: Tensor, mask: Tensor, mean: str, normalise: str) -> Tensor:
    """w c A, float32 [N, T], so that verl's mean over tokens becomes a mean over weights.

    c = tokens / sum of weights: of the response for "seq-mean-token-mean", of the rollout batch for "token-mean"; 1
    for the sums, and where `normalise` is "all". With several mini-batches verl divides by the tokens of each, so c is
    then that of the whole rollout batch.
    """
    scale = torch.ones_like(weights[:, :1])
    if normalise == "selected" and mean == "seq-mean-token-mean":
        scale = tokens_by_weight(mask.sum(1, keepdim=True), weights.sum(1, keepdim=True))
    elif normalise == "selected" and mean == "token-mean":
        scale = tokens_by_weight(mask.sum(), weights.sum())
    return (advantages * weights * scale).to(advantages.dtype)


class OneProcess:
    """verl's driver, which has the whole rollout batch."""

    @staticmethod
    def sum(tensor: Tensor) -> Tensor:
        return tensor
