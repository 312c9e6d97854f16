"""The definition of the per-token signals in plain PyTorch, and the CPU path.

All logarithms are natural. Everything is computed in float32 whatever the logits' dtype: a bfloat16 Jensen-Shannon
divergence was reported 15 % off in its gradient. Positions are processed in slabs, so at most a bounded number of
probabilities exists at a time.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from monitor.signals.types import TokenSignals

Reference = Literal["group", "leave_one_out"]
SLAB_ELEMENTS = 1 << 24  # float32 values in one [N, positions, V] slab: 64 MiB each, about five alive at a time
RESOLUTION = 1e-6  # deviations below this are rounding of float32 logits and are reported as 0


def deviation_cap(alive: Tensor | int) -> Tensor:
    """Largest possible deviation with `alive` rollouts, reached by one-hot rows disjoint from all others.

    cap(n) = 1/2 ln(2 / (1 + 1/n)) + 1/2 [ (1/n) ln((1/n) / ((1 + 1/n) / 2)) + (1 - 1/n) ln 2 ]
    float32, same shape as `alive`: 0 (n = 1), 0.2158 (2), 0.3183 (3), 0.4969 (8), -> ln 2. The mean contains the row
    itself, hence the cap. Source: eqs. 24-26 of arXiv 2606.19771, the bound derived here.
    """
    n = torch.as_tensor(alive, dtype=torch.float64).clamp(min=1)
    share = 1.0 / n
    half_row = 0.5 * torch.log(2.0 / (1.0 + share))
    half_mean = 0.5 * (share * torch.log(share / ((1.0 + share) / 2.0)) + (1.0 - share) * math.log(2.0))
    return (half_row + half_mean).float()


def _check(logits: Tensor, token_ids: Tensor, mask: Tensor, group_ids: Tensor, reference: str, tau: float) -> None:
    if logits.ndim != 3:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected [N, T, V].")
    n, t, _ = logits.shape
    for name, tensor, shape in (
        ("token_ids", token_ids, (n, t)),
        ("mask", mask, (n, t)),
        ("group_ids", group_ids, (n,)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} for logits {(n, t)} + [V].")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}, expected torch.bool. Use mask.bool().")
    if reference not in ("group", "leave_one_out"):
        raise ValueError(f"Unknown deviation reference {reference!r}, expected 'group' or 'leave_one_out'.")
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"temperature is {tau}, expected a finite number > 0.")


@torch.no_grad()
def token_signals(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    group_ids: Tensor,
    *,
    temperature: float = 1.0,
    reference: Reference = "group",
    moments: bool = False,
) -> TokenSignals:
    """Log-probability, Shannon and Renyi-2 entropy and group deviation of each response token, without gradient.

    With p_it = softmax(z_it / temperature), V_t the rows of i's group with mask True at position t, n = |V_t| and
    P_t = 1/n sum_{j in V_t} p_jt:
        logprob = ln p_it[o_it]        entropy = -sum_v p ln p        renyi2 = -ln sum_v p^2
        deviation = JS(p_it || P_t),   JS(p, q) = H((p + q) / 2) - H(p) / 2 - H(q) / 2
    reference="leave_one_out" takes P_t over the other alive rows (cap ln 2; 0 if there are none).

    Args:
        logits: [N, T, V] of any floating dtype; may hold -inf for forbidden tokens.
        token_ids: int [N, T], the sampled tokens. Values where mask is False are ignored.
        mask: bool [N, T], True on response tokens; column t is absolute response position t in every row.
        group_ids: int [N], equal for rollouts of one prompt; any integers in any order.
        temperature: the sampling temperature tau > 0.
        moments: also sum_v p^3 and sum_v p^2 ln p, relative error below 1e-5.
    Returns: TokenSignals, nats, float32 [N, T], 0 where mask is False; deviations below 1e-6 are returned as 0.
    Raises: ValueError for wrong shapes, dtypes or options.
    Source: arXiv 2606.19771v1, eqs. 5 and 24-26; the temperature is our reading (the paper states none).
    """
    _check(logits, token_ids, mask, group_ids, reference, temperature)
    n, t, v = logits.shape
    groups, group_of_row = torch.unique(group_ids, return_inverse=True)
    span = max(1, SLAB_ELEMENTS // max(1, n * v))
    slabs = [
        _slab_signals(
            logits[:, start : start + span],
            token_ids[:, start : start + span],
            mask[:, start : start + span],
            group_of_row,
            len(groups),
            temperature,
            reference,
            moments,
        )
        for start in range(0, t, span)
    ]
    if not slabs:
        empty = torch.zeros(n, 0, device=logits.device)
        return TokenSignals(empty, empty, empty, empty, empty.int(), *(empty, empty) * moments)
    return TokenSignals.concat(slabs, dim=1)


def _slab_signals(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    row_group: Tensor,
    n_groups: int,
    tau: float,
    reference: str,
    moments: bool,
) -> TokenSignals:
    """Signals of one slab: logits [N, C, V], ids and mask [N, C], row_group [N] in 0..n_groups-1."""
    logp = torch.log_softmax(logits.float() / tau, dim=-1)
    p = logp.exp()
    zero = torch.zeros((), device=logits.device)
    # float32 normalisers of a large vocabulary are off by 1e-5; the float64 sum of p tells by how much
    log_total = p.sum(-1, dtype=torch.float64).log()
    safe_ids = torch.where(mask, ids, 0).long()
    logprob = (logp.gather(-1, safe_ids.unsqueeze(-1)).squeeze(-1) - log_total).float()
    entropy, renyi2, *powers = _entropies(p, logp, log_total, moments)

    alive_p = torch.where(mask.unsqueeze(-1), p, zero)
    group_sum = alive_p.new_zeros(n_groups, *p.shape[1:]).index_add_(0, row_group, alive_p)[row_group]
    group_alive = mask.float().new_zeros(n_groups, mask.shape[1]).index_add_(0, row_group, mask.float())
    alive = group_alive[row_group]
    if reference == "group":
        mean_p = group_sum / alive.clamp(min=1).unsqueeze(-1)
    else:
        others = (alive - 1).unsqueeze(-1)
        mean_p = torch.where(others > 0, (group_sum - alive_p).clamp(min=0) / others.clamp(min=1), p)
    deviation = _js(p, mean_p)
    deviation = torch.where(deviation < RESOLUTION, zero, deviation)

    def kept(values: Tensor) -> Tensor:
        return torch.where(mask, values, zero)

    extra = [kept(power) for power in powers]
    return TokenSignals(kept(logprob), kept(entropy), kept(renyi2), kept(deviation), kept(alive).int(), *extra)


def _entropies(p: Tensor, logp: Tensor, log_total: Tensor, moments: bool) -> tuple[Tensor, ...]:
    """(entropy, renyi2), with `moments` also (sum p^3, sum p^2 ln p), of p and logp [N, C, V], p e^-log_total exact."""
    p_logp = torch.where(p > 0, p * logp, 0.0)
    entropy = log_total - p_logp.sum(-1, dtype=torch.float64) * torch.exp(-log_total)
    squares = p * p
    sum_p2 = squares.sum(-1, dtype=torch.float64)
    renyi2 = 2 * log_total - torch.log(sum_p2)
    if not moments:
        return entropy.float(), renyi2.float()
    # terms of one sign: float32 sums are good to 4e-7 and cost a twentieth of float64 ones; in place for memory
    sum_p3 = squares.mul_(p).sum(-1) * torch.exp(-3 * log_total)
    sum_p2_logp = (p_logp.mul_(p).sum(-1) - log_total * sum_p2) * torch.exp(-2 * log_total)
    return entropy.float(), renyi2.float(), sum_p3.float(), sum_p2_logp.float()


def _js(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence over the last axis, nats: sum_v [p ln p + q ln q - (p + q) ln m] / 2, m = (p + q) / 2.

    Element by element before the sum, so that equal rows cancel exactly; a difference of three summed entropies
    leaves about 1e-6.
    """
    middle = 0.5 * (p + q)
    log_middle = torch.where(middle > 0, middle, 1.0).log()
    return 0.5 * (torch.xlogy(p, p) + torch.xlogy(q, q) - (p + q) * log_middle).sum(-1)
