"""token_signals: error against float64, and time against plain log-softmax plus entropy on the same slab.

    python benchmarks/bench_signals.py

It runs on the CPU, with float32 logits of standard deviation 3 and ragged groups of 8. Times are medians of interleaved
calls, in CPU time of one thread, which other work on the machine changes less than wall time. `plain` is log-softmax
plus entropy. Ratios of times:
- ratio: ours / plain on the whole slab.
- ratio_chunked_plain: ours / plain on as few positions at a time as ours takes, in memory that is used again.
- definition_ratio: the definitions written down one by one, in float32 on the whole slab / plain.
- moments_ratio: a call that also returns sum p^3 and sum p^2 ln p / one that does not.
`signals_operations.csv` has the cost of single operations over 8 and over 512 rows of 32,000 values (1 and 64 MiB). It
explains why `definition.py` is written as it is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from harness import RESULTS, no_options, write_rows
from torch import Tensor

from monitor.signals import definition, token_signals

CASES = {"chain": (64, 28, 19), "32 k": (8, 64, 32_000), "SmolLM2": (8, 64, 49_152), "Qwen2.5": (8, 16, 151_936)}


def in_float64(logits: Tensor, ids: Tensor, mask: Tensor, group: int) -> dict[str, Tensor]:
    """The definitions, in the logits' dtype; rows of a group are contiguous."""
    logp = torch.log_softmax(logits, -1)
    p = torch.where(mask.unsqueeze(-1), logp.exp(), 0.0)
    n, t, v = p.shape
    alive = mask.view(-1, group, t).sum(1, keepdim=True).expand(-1, group, -1).reshape(n, t)
    mean = p.view(-1, group, t, v).sum(1, keepdim=True).expand(-1, group, -1, -1).reshape(n, t, v)
    mean = mean / alive.clamp(min=1).unsqueeze(-1)

    def entropy(q: Tensor) -> Tensor:
        return -torch.xlogy(q, q).sum(-1)

    return {
        "logprob": logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1) * mask,
        "entropy": entropy(p),
        "renyi2": torch.where(mask, -(p * p).sum(-1).log(), 0.0),
        "deviation": entropy((p + mean) / 2) * mask - entropy(p) / 2 - entropy(mean) / 2 * mask,
    }


def plain(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a trainer computes anyway: log-probability and entropy."""
    logp = torch.log_softmax(logits, -1)
    return logp.gather(-1, ids.unsqueeze(-1)), -(logp.exp() * logp).sum(-1)


def plain_in_chunks(logits: Tensor, ids: Tensor) -> None:
    """`plain` on chunks of the size that `token_signals` works in."""
    n, t, v = logits.shape
    rows = min(n, max(8, definition.CHUNK_ELEMENTS // v))
    span = max(1, definition.CHUNK_ELEMENTS // (rows * v))
    for row in range(0, n, rows):
        for start in range(0, t, span):
            plain(logits[row : row + rows, start : start + span], ids[row : row + rows, start : start + span])


def seconds(*calls: Callable[[], object], rounds: int = 7) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            begin = time.process_time()
            call()
            found.append(time.process_time() - begin)
    return [statistics.median(found) for found in times]


def operation_rows() -> list[dict[str, object]]:
    """ns a value of single operations, on a chunk and on a whole slab."""
    rows: list[dict[str, object]] = []
    for n in (8, 512):
        x, out, keep = torch.rand(n, 32_000), torch.empty(n, 32_000), torch.rand(n, 1) > 0.5
        masked, bits = x.clone(), keep.int().neg()
        operations: dict[str, Callable[[], object]] = {
            "exp": lambda x=x: torch.exp(x),
            "exp into memory in use": lambda x=x, out=out: torch.exp(x, out=out),
            "log into memory in use": lambda x=x, out=out: torch.log(x, out=out),
            "xlogy": lambda x=x: torch.xlogy(x, x),
            "product": lambda x=x: x * x,
            "product into memory in use": lambda x=x, out=out: torch.mul(x, x, out=out),
            "where": lambda x=x, keep=keep: torch.where(keep, x, 0.0),
            "bitwise and in place": lambda x=masked, bits=bits: x.view(torch.int32).bitwise_and_(bits),
            "sum": lambda x=x: x.sum(-1),
            "sum in float64": lambda x=x: x.sum(-1, dtype=torch.float64),
            "log_softmax": lambda x=x: torch.log_softmax(x, -1),
        }
        times = seconds(*operations.values(), rounds=200 if n == 8 else 7)
        for name, found in zip(operations, times, strict=True):
            rows.append({"operation": name, "values": x.numel(), "ns_per_value": round(found / x.numel() * 1e9, 2)})
    return rows


def main() -> None:
    no_options(__doc__)
    torch.set_num_threads(1)
    write_rows(RESULTS / "signals_operations.csv", operation_rows(), ("torch",))
    rows = []
    for name, (n, t, v) in CASES.items():
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(n, t, v, generator=generator) * 3
        ids = torch.randint(v, (n, t), generator=generator)
        mask = torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=generator)
        groups = torch.arange(n) // 8
        found = token_signals(logits, ids, mask, groups)
        exact = in_float64(logits.double(), ids, mask, 8)
        errors = {key: float((getattr(found, key).double() - value).abs().max()) for key, value in exact.items()}
        ours, base, chunked, naive, more = seconds(
            lambda z=logits, i=ids, m=mask, g=groups: token_signals(z, i, m, g),
            lambda z=logits, i=ids: plain(z, i),
            lambda z=logits, i=ids: plain_in_chunks(z, i),
            lambda z=logits, i=ids, m=mask: in_float64(z, i, m, 8),
            lambda z=logits, i=ids, m=mask, g=groups: token_signals(z, i, m, g, moments=True),
            rounds=7 if v > 1000 else 301,
        )
        rows.append(
            {"case": name, "rows": n, "positions": t, "vocabulary": v}
            | {f"error_{key}": f"{value:.2e}" for key, value in errors.items()}
            | {"signals_s": f"{ours:.4f}", "plain_s": f"{base:.4f}", "ratio": f"{ours / base:.2f}"}
            | {"ratio_chunked_plain": f"{ours / chunked:.2f}", "definition_ratio": f"{naive / base:.2f}"}
            | {"moments_ratio": f"{more / ours:.3f}"}
            | {"threads": torch.get_num_threads()}
        )
    write_rows(RESULTS / "signals.csv", rows, ("torch",))


if __name__ == "__main__":
    main()
