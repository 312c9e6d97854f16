"""Weightings by what a token's step does to the entropy: budgets let a step lose a share of it, opefo none.

How each token's own policy-gradient step changes the entropy, dH1, follows from its signals
(`monitor.signals.diagnostics.entropy_change`). L is the sum of dH1 over the tokens whose step lowers the entropy
(dH1 < 0), U the sum over all others, and L + U the net change of the unweighted step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monitor.signals.diagnostics import entropy_change
from trainer.learning.weightings.inputs import WeightInputs, random_scores

_BITS = 31  # of a float32 that is not negative


def entropy_budget(inputs: WeightInputs, *, share: float) -> Tensor:
    """Less weight for every token whose step lowers the entropy, so that the step loses only a share of the entropy.

    Formula: w = a on tokens with dH1 < 0, else 1; a = clip((share (L + U) - U) / L, 0, 1), so that sum(w dH1) is
    share (L + U), or U if that is less; dH1 as in `entropy_change`. w = 1 everywhere where L + U >= 0: only a loss of
    entropy is braked.
    Scope: the batch: L and U are sums over the tokens of a step's rollouts on all ranks, each token counted once, as
    loss.kind = "dapo" counts them.
    Denominator: all tokens (normalise = "all", here the default).
    Defaults: share = 0.3. At 1 all weights are 1; at 0 the step keeps the entropy; below 0 it raises it, at most by U.
    Source: ours. Weighing lowering against raising tokens by their contributions follows OPEFO, arXiv 2605.11491;
    dH1 is that of arXiv 2606.19236, theorem 3.1.
    """
    change, excess = _flow(inputs, share)
    lowering = change < 0
    lost = inputs.sum_over_ranks(-torch.where(lowering, change, 0.0).sum())
    return torch.where(lowering, _rest(excess, lost), inputs.mask.double()).float()


def ict_budget(inputs: WeightInputs, *, share: float) -> Tensor:
    """Leaves out the entropy-lowering tokens that deviate least from their group, until a share of the loss remains.

    Formula: w = 0 on tokens with dH1 < 0 and u < c, w = b on those with u = c, else 1; u is the deviation. The cut c
    is the smallest for which leaving out u <= c brings sum(w dH1) to share (L + U), and b in [0, 1] hits it exactly.
    Tokens of equal deviation share one weight. w = 1 everywhere where L + U >= 0; w = 0 on all tokens with dH1 < 0
    where U is less than share (L + U).
    Scope: the batch: L, U and c are those of all tokens of a step's rollouts on all ranks. c is found by 31 halvings
    of the float32 range, each with one sum over the batch, so ranks exchange sums and no tokens.
    Denominator: all tokens (normalise = "all", here the default).
    Defaults: share = 0.3, as in `entropy_budget`.
    Source: ours: ICT's ranking (arXiv 2606.19771v1, eq. 10) says which tokens to keep, the budget says how many.
    """
    return _without_lowest(inputs, inputs.signals.deviation, share)


def ict_soft_budget(inputs: WeightInputs, *, share: float) -> Tensor:
    """Less weight for entropy-lowering tokens the less they deviate from their group, until a share is left.

    Formula: w = 1 - b (1 - u / m) on tokens with dH1 < 0, else 1; u is the deviation and m its largest value on those
    tokens. b in [0, 1] brings sum(w dH1) to share (L + U). Where b = 1 does not take enough, w = a u / m with a in
    [0, 1]. w = 1 everywhere where L + U >= 0; w = 0 on all tokens with dH1 < 0 where U is less than share (L + U).
    Scope: the batch: L, U and m are those of all tokens of a step's rollouts on all ranks. m is found as the cut of
    `ict_budget` is.
    Denominator: all tokens (normalise = "all", here the default).
    Defaults: share = 0.3, as in `entropy_budget`.
    Source: ours; between `entropy_budget`, which brakes all lowering tokens alike, and `ict_budget`, which leaves out
    the least deviating ones.
    """
    change, excess = _flow(inputs, share)
    lost = torch.where(change < 0, -change, 0.0)
    deviation, key = _ordered(inputs.signals.deviation)
    total = inputs.sum_over_ranks(lost.sum())
    largest = _cut(inputs, lost, key, total).int().view(torch.float32).double()
    relative = torch.where(largest > 0, deviation / largest.clamp(min=1e-300), 1.0).clamp(max=1)
    near = inputs.sum_over_ranks((lost * relative).sum())  # what is left of the loss at b = 1
    b = torch.where(excess > 0, excess / (total - near).clamp(min=1e-300), 0.0)
    braked = torch.where(b <= 1, 1 - b * (1 - relative), _rest(excess - (total - near), near) * relative)
    return torch.where(lost > 0, braked, inputs.mask.double()).float()


def random_budget(inputs: WeightInputs, *, share: float) -> Tensor:
    """Leaves out entropy-lowering tokens in random order until a share of the loss remains: control of `ict_budget`.

    Formula: w as in `ict_budget`, with u a random number in [0, 1) for each token.
    Scope: the batch, as in `ict_budget`; each rank draws the numbers of its own tokens.
    Denominator: all tokens (normalise = "all", here the default).
    Defaults: share = 0.3, as in `entropy_budget`.
    Source: ours; the control that tells the effect of the budget from that of the ranking.
    """
    return _without_lowest(inputs, random_scores(inputs), share)


def opefo(inputs: WeightInputs) -> Tensor:
    """More weight for the smaller of the two flows of entropy, and less for the larger, so that they cancel.

    Formula: w = 2 U / (U - L) on tokens with dH1 < 0 and w = -2 L / (U - L) on tokens with dH1 > 0, so that
    sum(w dH1) = 0, and each side keeps -2 U L / (U - L), the harmonic mean of U and -L; w = 1 where dH1 = 0.
    Scope: the batch, as in `entropy_budget`.
    Denominator: all tokens (normalise = "all", here the default).
    Source: OPEFO, arXiv 2605.11491, as its abstract and summaries of it describe it: entropy-raising and
    entropy-lowering updates are rescaled by their contributions to the entropy change, with a coefficient in closed
    form from each batch, on-policy. The formula is ours, because theirs (its eqs. 7 to 9) was not at hand; so is the
    exact dH1, for which they take an approximation.
    """
    change, _ = _flow(inputs, 1.0)
    low, high = inputs.sum_over_ranks(torch.stack([change.clamp(max=0).sum(), change.clamp(min=0).sum()]))
    both = (high - low).clamp(min=1e-300)
    weights = torch.where(change < 0, 2 * high / both, -2 * low / both)
    return torch.where(change != 0, weights, inputs.mask.double()).float()


def _flow(inputs: WeightInputs, share: float) -> tuple[Tensor, Tensor]:
    """(dH1, excess): float64 [N, T], 0 outside the mask, and max(0, (share - 1) (L + U)), the loss to take back."""
    change = torch.where(inputs.mask, entropy_change(inputs.signals, inputs.advantages)[0], 0.0)
    return change, ((share - 1) * inputs.sum_over_ranks(change.sum())).clamp(min=0)


def _rest(excess: Tensor, lost: Tensor) -> Tensor:
    """Share of `lost` > 0 that remains when `excess` >= 0 is taken from it, 0-d float64 in [0, 1]; 1 if lost is 0."""
    return torch.where(lost > 0, 1 - excess / lost.clamp(min=1e-300), 1.0).clamp(min=0)


def _without_lowest(inputs: WeightInputs, score: Tensor, share: float) -> Tensor:
    """Takes tokens with dH1 < 0 out of the batch by ascending score >= 0, float32 [N, T], until the excess is gone.

    Floats that are not negative sort as their bits do. So a bisection over the bits finds the exact cut, the same on
    every rank, in a fixed number of sums. Where the last token counts in part, the weights are continuous in the
    sums, so that the order in which ranks add them changes nothing.
    """
    change, excess = _flow(inputs, share)
    lost = torch.where(change < 0, -change, 0.0)
    _, key = _ordered(score)
    cut = _cut(inputs, lost, key, excess)
    below, through = (inputs.sum_over_ranks(torch.where(key < end, lost, 0.0).sum()) for end in (cut, cut + 1))
    rest = _rest((excess - below).clamp(min=0), through - below)
    kept = torch.where(key < cut, 0.0, torch.where(key == cut, rest, 1.0))
    return torch.where(lost > 0, kept, inputs.mask.double()).float()


def _ordered(score: Tensor) -> tuple[Tensor, Tensor]:
    """(score as float64, integers that sort as the scores do) of float32 scores >= 0; -0.0 counts as 0."""
    positive = score.float().abs().contiguous()
    return positive.double(), positive.view(torch.int32).long()


def _cut(inputs: WeightInputs, lost: Tensor, key: Tensor, amount: Tensor) -> Tensor:
    """The smallest key for which the tokens up to it lose `amount` or more, summed over ranks; 0-d int64."""
    low, high = (torch.full((), end, dtype=torch.long, device=key.device) for end in (0, 2**_BITS - 1))
    for _ in range(_BITS):
        middle = (low + high) // 2
        enough = inputs.sum_over_ranks(torch.where(key <= middle, lost, 0.0).sum()) >= amount
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return low
