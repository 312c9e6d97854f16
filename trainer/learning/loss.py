"""The policy losses: weighted, clipped, with every denominator fixed on the whole batch before it is split.

A loss is a row of `LOSSES`: a per-token term psi, whether its ratio is of a token or of a response, and the denominator
D of `sum(weight * psi) / D`. To add a loss, write its row here (and a psi or a denominator if no existing one fits),
its name in `LossConfig.kind`, and a known-answer test. `python -m docs.make_method` writes the rows and docstrings into
docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trainer.config import LossConfig
from trainer.flow import LossTerms

Normalise = Literal["selected", "all"]
TINY = 1e-8  # keeps a response without selected tokens (0 / 0) at 0


@dataclass(frozen=True, slots=True, eq=False)
class LossTotals:
    """Denominators of the whole batch of one optimizer update; the three sums add over micro-batches and ranks.

    Example: of two responses with 3 tokens and 1 token, one token each is selected. Then responses is 2, weight is 2
    ("selected") or 4 ("all"), tokens is 4, and max_length is the configured longest response.
    """

    responses: Tensor  # 0-d float: responses with a token in the mask
    weight: Tensor  # 0-d float: sum of weights ("selected") or number of tokens ("all")
    tokens: Tensor  # 0-d float: number of tokens in the mask
    max_length: int


def loss_totals(mask: Tensor, weights: Tensor, normalise: Normalise, max_length: int | None = None) -> LossTotals:
    """Totals of a batch: mask bool [N, T], weights float [N, T].

    max_length: the constant of dr_grpo, tokens; by default the batch's own width T.
    """
    tokens = mask.float().sum()
    weight = _counted(mask, weights, normalise).sum()
    return LossTotals(mask.any(1).float().sum(), weight, tokens, max_length or mask.shape[1])


def clipped_psi(ratio: Tensor, advantage: Tensor, logprobs: Tensor, config: LossConfig) -> Tensor:
    """psi = -min(min(r, delta) A, clip(r, 1 - clip_low, 1 + clip_high) A).

    delta is clip_delta, or no bound if that is None. It is needed because clipping alone leaves r unbounded where
    A < 0 (TRL's delta, arXiv 2505.07291). clip_high > clip_low is DAPO's clip-higher (arXiv 2503.14476).
    ratio float [N, T] or [N, 1], advantage float [N, 1].
    """
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    bounded = ratio if config.clip_delta is None else ratio.clamp(max=config.clip_delta)
    return -torch.minimum(bounded * advantage, clipped * advantage)


def cispo_psi(ratio: Tensor, advantage: Tensor, logprobs: Tensor, config: LossConfig) -> Tensor:
    """psi = -stop_gradient(min(r, 1 + clip_high)) A logprob.

    The capped ratio is a constant factor, so no token loses its gradient. There is no lower bound.
    TRL's epsilon_high is the cap itself: its 5.0 (arXiv 2510.13786) is clip_high = 4 here.
    """
    return -ratio.clamp(max=1 + config.clip_high).detach() * advantage * logprobs


def sequence_log_ratio(log_ratio: Tensor, weights: Tensor) -> Tensor:
    """ln r of gspo: sum_t w (logprob - old_logprob) / sum_t w of the response, [N, 1].

    With equal weights this is the mean over all tokens, as published. With sparse weights the ratio is that of the
    selected tokens alone: a ratio of all tokens would carry gradient into tokens that the weighting left out.
    """
    return (weights * log_ratio).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=TINY)


def over_responses(per_token: Tensor, counted: Tensor, mask: Tensor, totals: LossTotals) -> Tensor:
    """D: each response's own count, then the mean over responses.

    sum_i (sum_t w psi / count_i) / responses, where `responses` counts those of the whole batch with a token in the
    mask. TRL also counts responses that truncation masking emptied.
    """
    return (per_token.sum(1) / counted.sum(1).clamp(min=TINY)).sum() / totals.responses.clamp(min=1)


def over_tokens(per_token: Tensor, counted: Tensor, mask: Tensor, totals: LossTotals) -> Tensor:
    """D: the count of the optimizer update's whole batch, summed over micro-batches and ranks."""
    return per_token.sum() / totals.weight.clamp(min=TINY)


def over_constant(per_token: Tensor, counted: Tensor, mask: Tensor, totals: LossTotals) -> Tensor:
    """D: responses * max_length (rollout.max_new_tokens). It holds no count, so `normalise` changes nothing."""
    return per_token.sum() / (totals.responses.clamp(min=1) * totals.max_length)


def over_local_tokens(per_token: Tensor, counted: Tensor, mask: Tensor, totals: LossTotals) -> Tensor:
    """D: the count of this micro-batch; micro-batches are then averaged by their shares of the responses.

    This is the only denominator of a part of the batch. With it the gradient depends on optim.micro_batch, as in TRL.
    """
    share = mask.any(1).float().sum() / totals.responses.clamp(min=1)
    return per_token.sum() / counted.sum().clamp(min=TINY) * share


@dataclass(frozen=True, slots=True)
class LossKind:
    """One loss: its parts, and the summary and source that docs/method.md shows."""

    summary: str
    psi: Callable[[Tensor, Tensor, Tensor, LossConfig], Tensor]
    denominator: Callable[[Tensor, Tensor, Tensor, LossTotals], Tensor]
    source: str
    ratio: Literal["token", "sequence"] = "token"


LOSSES: dict[str, LossKind] = {
    "grpo": LossKind("mean over responses of their token means", clipped_psi, over_responses, "arXiv 2402.03300"),
    "bnpo": LossKind("mean over the tokens of each micro-batch", clipped_psi, over_local_tokens, "TRL 1.16"),
    "dapo": LossKind("mean over all tokens of the batch", clipped_psi, over_tokens, "arXiv 2503.14476"),
    "dr_grpo": LossKind(
        "sum over tokens divided by a constant (published with loss.scale_by_std = false)", clipped_psi, over_constant,
        "arXiv 2503.20783",
    ),
    "cispo": LossKind("capped ratio as a constant factor of the log-probability", cispo_psi, over_tokens,
                      "arXiv 2506.13585"),
    "gspo": LossKind(
        "one ratio for a response: the geometric mean of its tokens' (published clip: 3e-4 and 4e-4)", clipped_psi,
        over_responses, "arXiv 2507.18071", ratio="sequence",
    ),
}  # fmt: skip


def kl_estimate(gap: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate of KL(policy || reference) at sampled tokens, nats, any shape; gap = ref_logprob - logprob.

        k1 = -gap;  k2 = gap^2 / 2;  k3 = exp(gap) - gap - 1
    As values, on tokens that the policy itself sampled: k1 and k3 are unbiased, k3 is >= 0 and spreads less, k2 is
    biased. As losses: the mean gradient of k2 is that of the reverse KL(policy || reference), of k3 that of the forward
    KL(reference || policy), of k1 zero. `loss.kl_bias_correction` multiplies the estimate k by r, the ratio p / q of
    the token's probabilities under the policy p and the policy q that sampled it, at the same prefix. There
        E_q[r k] = sum_y q(y) p(y) / q(y) k(y) = sum_y p(y) k(y) = E_p[k] = KL(p || reference) for k1 and k3,
    for every p. So value and gradient are those of the reverse KL, on- and off-policy, at the prefixes that q visits.
    The ratio of a whole response would not cancel q(y): gspo takes the token's own ratio here too.
    Sources: Schulman 2020 (joschu.net/blog/kl-approx.html); k3 in GRPO, arXiv 2402.03300; the correction,
    arXiv 2512.02556 (TRL's use_bias_correction_kl, there on by default; for gspo TRL takes the response's ratio).
    """
    if estimator == "k1":
        return -gap
    if estimator == "k2":
        return gap.square() / 2
    return gap.exp() - gap - 1


def sampler_correction(old_logprobs: Tensor, sampler_logprobs: Tensor, largest: float) -> Tensor:
    """min(p_old / p_sampler, largest) of each sampled token, float [N, T], without gradient: `loss.sampler_ratio_max`.

    Tokens are drawn from what the sampler computes, p_sampler, and the loss is meant for p_old, what the trainer
    computes from the same weights. The factor turns a mean over the first into one over the second; the bound keeps a
    few tokens from deciding the gradient. Both log-probabilities [N, T] in nats; where their difference is NaN it is 1.
    Source: truncated importance sampling for rollouts, Yao et al. 2025 (fengyao.notion.site/off-policy-rl); it is TRL's
    vllm_importance_sampling_mode "token_truncate".
    Example: p_old = .3, .1 and p_sampler = .1, .2 with largest 2: factors 2 (3 is cut) and .5.
    """
    gap = (old_logprobs - sampler_logprobs).detach().nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    return gap.clamp(max=math.log(largest)).exp()


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    config: LossConfig,
    *,
    ref_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    entropy_coef: float | None = None,
    penalty: Tensor | None = None,
    correction: Tensor | None = None,
    totals: LossTotals | None = None,
    normalise: Normalise = "selected",
) -> LossTerms:
    """sum(weight * psi) / D + kl_term - entropy_coef * entropy_term, with psi and D of `LOSSES[config.kind]`.

        r = exp(logprob - old_logprob), or for gspo exp(sum_t w (logprob - old_logprob) / sum_t w) of the response
    Counts in D are sums of weights (normalise="selected") or numbers of tokens ("all").

    Args:
        logprobs, old_logprobs, ref_logprobs, entropies: float [N, T], nats. advantages: float [N].
        mask: bool [N, T], tokens that the loss may use. weights: float [N, T], >= 0.
        entropy_coef: takes the place of config.entropy_coef.
        penalty: float [N, T]; adds weight * penalty * |logprob - old_logprob| to weight * psi (arXiv 2505.22617).
        correction: float [N, T], constant; multiplies weight * psi and the penalty (`sampler_correction`).
        totals: denominators of the whole batch, if this call sees only some of its responses.
    Returns: LossTerms. Gradients flow only through logprobs and entropies, and only at tokens with a weight other than
        0 (with kl_outside_mask: at all tokens in the mask). Values at other tokens are never used, whatever they hold.
    Sources: `LOSSES`; weights as in ICT, arXiv 2606.19771; checked against TRL 1.16.
    """
    kind, totals = LOSSES[config.kind], totals or loss_totals(mask, weights, normalise)
    weights = torch.where(mask, weights, 0.0)
    counted, selected, advantage = _counted(mask, weights, normalise), weights != 0, advantages.unsqueeze(1)
    used = mask if config.kl_outside_mask else selected
    log_ratio = torch.where(used, logprobs - old_logprobs, 0.0)
    ratio = (sequence_log_ratio(log_ratio, weights) if kind.ratio == "sequence" else log_ratio).exp()
    psi = kind.psi(ratio, advantage, torch.where(used, logprobs, 0.0), config)
    psi = psi if penalty is None else psi + penalty * log_ratio.abs()
    psi = psi if correction is None else psi * correction
    loss = kind.denominator(weights * psi, counted, mask, totals)
    kl = torch.zeros_like(log_ratio)
    if ref_logprobs is not None:
        kl = kl_estimate(torch.where(used, ref_logprobs - logprobs, 0.0), config.kl_estimator)
        loss = loss + kl_term(kl, log_ratio.exp(), mask, weights, counted, totals, config)
    if entropies is not None and (coefficient := config.entropy_coef if entropy_coef is None else entropy_coef):
        loss = loss - coefficient * entropy_term(entropies, mask, weights, counted, totals, config)
    return LossTerms(
        loss=loss,
        log_ratio=log_ratio.detach(),
        clipped_low=(ratio < 1 - config.clip_low) & (advantage < 0) & selected & (kind.psi is clipped_psi),
        clipped_high=(ratio > 1 + config.clip_high) & (advantage > 0) & selected,
        kl=kl.detach(),
    )


def kl_term(
    kl: Tensor, ratio: Tensor, mask: Tensor, weights: Tensor, counted: Tensor, totals: LossTotals, config: LossConfig
) -> Tensor:
    """kl_coef * sum(w KL) / D, 0-d, nats; kl_bias_correction multiplies KL by each token's own ratio [N, T] first.

    With kl_outside_mask every token in the mask has w = 1 here, and counts are numbers of tokens.
    """
    kl = kl * ratio if config.kl_bias_correction else kl
    if config.kl_outside_mask:
        weights = counted = mask.float()
        totals = replace(totals, weight=totals.tokens)
    return config.kl_coef * LOSSES[config.kind].denominator(weights * kl, counted, mask, totals)


def entropy_term(
    entropies: Tensor, mask: Tensor, weights: Tensor, counted: Tensor, totals: LossTotals, config: LossConfig
) -> Tensor:
    """sum(w entropy) / count of the whole batch (bnpo: of the micro-batch), 0-d, nats, as in TRL.

    Every kind divides by the same count, so entropy_coef means the same for each kind.
    """
    bonus = torch.where(weights != 0, weights * entropies, 0.0)
    divide = over_local_tokens if config.kind == "bnpo" else over_tokens
    return divide(bonus, counted, mask, totals)


def _counted(mask: Tensor, weights: Tensor, normalise: Normalise) -> Tensor:
    """float [N, T]: what denominators sum."""
    return torch.where(mask, weights if normalise == "selected" else 1.0, 0.0)
