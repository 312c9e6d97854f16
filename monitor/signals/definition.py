"""The definition of the per-token signals in plain PyTorch, and the CPU path.

All logarithms are natural. Everything is computed in float32 whatever the logits' dtype, because bfloat16 is too coarse
for a Jensen-Shannon divergence: its gradient was reported 15 % off.

What makes it fast on a CPU: it takes whole groups at a few positions at a time. Every chunk overwrites the same three
scratch tensors, because fresh memory costs more than most operations. It uses only operations that PyTorch vectorises,
so neither xlogy nor torch.where; benchmarks/results/signals_operations.csv has the cost of each. On one machine with
one number of threads, a token's signals have the same bits however the batch is cut into chunks and whatever other
groups it holds. The one exception is a single row of more than 32,768 values, which several threads sum in parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from monitor.signals.types import TokenSignals

Reference = Literal["group", "leave_one_out"]
CHUNK_ELEMENTS = 1 << 18  # float32 values of a [rows, positions, V] chunk per CPU thread; the scratch fits the cache
CHUNK_ELEMENTS_GPU = 1 << 24  # larger, for fewer launches; each scratch tensor takes 64 MiB
SMALLEST = 1e-30  # added to a mean probability, so that its logarithm is finite; changes nothing else in float32
RESOLUTION = 1e-6  # deviations below this are rounding of float32 logits and are reported as 0


def deviation_cap(alive: Tensor | int) -> Tensor:
    """Largest possible deviation with n = `alive` rollouts, nats. One-hot rows disjoint from all others reach it.

    cap(n) = 1/2 ln(2 / (1 + 1/n)) + 1/2 [ (1/n) ln((1/n) / ((1 + 1/n) / 2)) + (1 - 1/n) ln 2 ]
    float32, same shape as `alive`: 0 (n = 1), 0.2158 (2), 0.3183 (3), 0.4969 (8), -> ln 2. There is a cap below ln 2
    because the mean contains the row itself. Source: derived here from eqs. 24-26 of arXiv 2606.19771.
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
    out = torch.zeros(7 if moments else 5, n, t, device=logits.device)
    token_ids = (token_ids * mask).long()
    keep = mask.int().neg()  # all bits set or none
    most = CHUNK_ELEMENTS_GPU if logits.is_cuda else CHUNK_ELEMENTS * torch.get_num_threads()
    for rows, n_rows, size in _row_blocks(group_ids.tolist(), max(1, most // max(1, v))):
        span = min(t, max(1, most // max(1, n_rows * v)))
        scratch = torch.empty(3, n_rows * span * v, device=logits.device)
        for start in range(0, t, span):
            part = (rows, slice(start, start + span))
            z, ids, kept = (values[part].unflatten(0, (-1, size)) for values in (logits, token_ids, keep))
            out[:, *part] = _signals(z.float(), ids, kept, scratch, temperature, reference, moments).flatten(1, 2)
    out.view(torch.int32).bitwise_and_(keep)
    logprob, entropy, renyi2, deviation, alive, *powers = out.unbind(0)
    return TokenSignals(logprob, entropy, renyi2, deviation, alive.int(), *powers)


def _row_blocks(group_ids: list[float], most: int) -> Iterator[tuple[slice | Tensor, int, int]]:
    """Blocks of whole groups of one size, as (rows, their number, group size): at most `most` rows, or one group.

    Within a block the rows of a group follow each other. `rows` is a slice, which needs no copy, where the block's rows
    are contiguous in the batch.
    """
    members: dict[float, list[int]] = {}
    for row, group in enumerate(group_ids):
        members.setdefault(group, []).append(row)
    sizes: dict[int, list[list[int]]] = {}
    for group_rows in members.values():
        sizes.setdefault(len(group_rows), []).append(group_rows)
    for size, groups in sizes.items():
        count = max(1, most // size)
        for start in range(0, len(groups), count):
            block = [row for group_rows in groups[start : start + count] for row in group_rows]
            in_order = block == list(range(block[0], block[0] + len(block)))
            rows = slice(block[0], block[-1] + 1) if in_order else torch.tensor(block)
            yield rows, len(block), size


def _signals(
    z: Tensor, ids: Tensor, keep: Tensor, scratch: Tensor, tau: float, reference: str, moments: bool
) -> Tensor:
    """The five or seven signals [5 | 7, B, G, C] of B groups of G rows at C positions; meaningless where keep is 0.

    z float32 [B, G, C, V]; ids int64 and keep int32 (-1 on response tokens, else 0) [B, G, C]; scratch float32
    [3, at least B G C V], overwritten.
    """
    logp, p, spare = scratch[:, : z.numel()].view(3, *z.shape).unbind()
    _softmax(z, tau, logp, p)
    logprob = logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    p.view(torch.int32).bitwise_and_(keep.unsqueeze(-1))  # ended rows have p = 0, also where their logits are NaN
    p_logp = logp.clamp_(min=-104).mul_(p)  # e^-104 is 0 in float32, and 0 * -inf would be NaN
    squares = torch.mul(p, p, out=spare)
    sum_p2, entropy = squares.sum(-1), p_logp.sum(-1).neg_()
    powers = [squares.mul_(p).sum(-1), torch.mul(p, p_logp, out=spare).sum(-1)] if moments else []

    total = p[:, 0].clone()
    for row in p.unbind(1)[1:]:  # row after row, because the order in which .sum(1) adds depends on the memory address
        total += row
    total = total.unsqueeze(1)
    alive = keep.sum(1, keepdim=True, dtype=torch.float32).neg_()
    if reference == "group":
        mean = total.div_(alive.clamp(min=1).unsqueeze(-1))
        deviation = _js(p, p_logp, mean, spare)
    else:
        mean = (total - p).clamp_(min=0).div_((alive - 1).clamp(min=1).unsqueeze(-1))
        deviation = torch.where(alive > 1, _js(p, p_logp, mean, spare), 0.0)
    deviation = torch.threshold(deviation, RESOLUTION, 0.0)  # a NaN stays
    renyi2 = sum_p2.clamp_(min=SMALLEST).log_().neg_()
    return torch.stack([logprob, entropy, renyi2, deviation, alive.expand_as(deviation), *powers])


def _softmax(z: Tensor, tau: float, logp: Tensor, p: Tensor) -> None:
    """Writes ln softmax(z / tau) and softmax(z / tau) over the last axis to logp and p.

    torch.log_softmax sums in float32. Over a large vocabulary that is off by 1e-5, and a decided token (p > 1 - 1e-7)
    gets ln p = 0. Summing this one quantity in float64 avoids both errors.
    """
    torch.sub(z, z.amax(-1, keepdim=True), out=logp)
    if tau != 1:
        logp.div_(tau)
    normaliser = torch.exp(logp, out=p).sum(-1, keepdim=True, dtype=torch.float64)
    logp.sub_(normaliser.log().float())
    p.div_(normaliser.float())


def _js(p: Tensor, p_logp: Tensor, q: Tensor, spare: Tensor) -> Tensor:
    """Jensen-Shannon divergence over the last axis, nats: sum_v [p ln p + q ln q - 2 m ln m] / 2, m = (p + q) / 2.

    The terms are combined for each element before they are summed, so that the rounding of equal rows cancels; a
    difference of three summed entropies would leave about 1e-6. p and p_logp [B, G, C, V] and spare are overwritten,
    q is [B, G or 1, C, V].
    """
    q.add_(SMALLEST)
    middle = torch.add(p, q, out=spare).mul_(0.5)
    p_logp.add_(q.log().mul_(q))
    m_log_m = torch.log(middle, out=p).mul_(middle)
    return p_logp.sub_(m_log_m, alpha=2).sum(-1).mul_(0.5)
