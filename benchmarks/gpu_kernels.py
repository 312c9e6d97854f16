"""What benchmarks/gpu.py compares with: the rate of special functions, and log-probability and entropy alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def special_kernel(values, repeats, WIDTH: tl.constexpr):
    """exp2 four times for each repeat and value, in registers: what the special-function units can do."""
    at = values + tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    x = tl.load(at)
    for _ in range(repeats):
        x = tl.exp2(tl.exp2(tl.exp2(tl.exp2(-x))) * -0.25)
    tl.store(at, x)


@triton.jit
def _row_kernel(logits, ids, out, rows, vocabulary, stride, BLOCK: tl.constexpr):
    """Online softmax of one row: the usual kernel, one program and one pass for each row."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    peak, total, weighted = -1e30, 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + lanes < vocabulary
        x = tl.load(logits + row * stride + start + lanes, mask=inside, other=-1e30).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, axis=0))
        factor = tl.exp(peak - higher)
        e = tl.exp(x - higher)
        weighted = factor * weighted + tl.sum(e * x, axis=0)
        total = factor * total + tl.sum(e, axis=0)
        peak = higher
    log_total = peak + tl.log(total)
    x = tl.load(logits + row * stride + tl.load(ids + row)).to(tl.float32)
    tl.store(out + row, x - log_total)
    tl.store(out + rows + row, log_total - weighted / total)


def logprob_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of ids, entropy), both [N, T], of contiguous logits [N, T, V]."""
    rows = ids.numel()
    out = torch.empty(2, *ids.shape, device=logits.device)
    _row_kernel[(rows,)](logits, ids, out, rows, logits.shape[-1], logits.shape[-1], 4096, num_warps=8)
    return out[0], out[1]
