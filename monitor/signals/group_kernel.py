"""The per-token signals in one streaming read of the logits: a Triton kernel over (group, position).

It has to agree with `definition.py`. Two passes are needed, because the mean distribution of a group needs each
row's normaliser; both run in ONE launch, ordered so that the second finds its rows in the L2 cache:

    work on an item = the rows of one group at one position, split over the vocabulary
      fold     (row, chunk of FOLD_TILES tiles)   sums of e = exp(z - peak), e ln e, e^2 [, e^3, e^2 ln e]  -> `folds`
      deviate  (chunk, all rows of the group)     p of every row, their mean, the row's share of the JS     -> `shares`
    order of the programs, items 0, 1, 2, ..., with a lag of L items (here 2):
      fold 0 | fold 1 | fold 2, deviate 0 | fold 3, deviate 1 | ... | deviate last
    a second, small kernel adds up the chunks of each row and writes the results.

A program that deviates waits until its item's folds are counted in `done`. It waits only for programs of smaller
number, which the hardware starts first, so the wait always ends; a serial interpreter never waits. Half of the programs
that run at a time are folds, and the lag is as long as these take, so the folds that are waited for are about finished.
Between the two reads of a logit some 20 to 25 MB are read at 151,936 bf16 logits, which fits the L2 of an H100 (50 MB).

Cost for each logit, bf16, groups of 8:
    memory      2 bytes, read once from memory and once from L2
    special     exp2 in each pass and log2 of the middle, with log2 of the mean 3 + 1/8 (leave_one_out: 4)
    rest        about 10 instructions in the first pass (13 with moments), 17 in the second: multiply-adds, conversions
At 8 groups x 8 rollouts x 64 positions x 151,936: 1.24 GB; 1.9e9 special operations, 0.5 ms of an H100's (132
multiprocessors x 16 each clock); 1.7e10 instructions, 0.6 ms (x 128 each clock): in balance, and none may be wasted.

Sums are float32 but never long: a thread adds at most FOLD_TILES x 64 values, threads and chunks are added as a tree.
Exponents are taken to the base 2 (p = 2^t), which is what the hardware has.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from monitor.signals.definition import RESOLUTION
from monitor.signals.types import TokenSignals

WARPS = 4  # programs are small, so that four on a multiprocessor (128 registers a thread) hide each other's latencies
FOLD_TILES = 2  # tiles in a fold: 16,384 bf16 logits, 32 KB
FOLD_VALUES = 64  # logits of a tile held by a thread: eight loads of 16 bytes in flight
DEVIATE_TILES = 4  # tiles in a deviation: 2,048 tokens of 8 rows, 32 KB
DEVIATE_VALUES = 32  # logits of a tile held by a thread, over all rows: p and t of each stay in registers
MAX_GROUP = 64  # rows of a group in one program's registers; token_signals uses the definition beyond
PROGRAMS = 4  # programs that a multiprocessor runs at a time, for the lag
PATIENCE = tl.constexpr(1 << 22)  # looks at `done`, seconds; then NaN: a broken promise of order must not hang a GPU
LOWEST = tl.constexpr(-1e30)  # stands for -inf, so that differences stay finite
FLOOR = tl.constexpr(-1e29)  # below every peak, and so far above LOWEST that 2^(LOWEST - FLOOR) is 0
TINY = tl.constexpr(1e-37)  # keeps log2 finite at 0; normal in float32, and below every p that counts
LN2 = tl.constexpr(math.log(2.0))
NAN_TOO = tl.constexpr(tl.PropagateNan.ALL)  # maxima that keep NaN: a broken row must be seen, not repaired


@triton.jit
def _log2(x, FAST: tl.constexpr):
    """log2 of normal numbers, 2^-22 absolute near 1, else two units in the last place: one instruction, not 28."""
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.log2(x)


@triton.jit
def _sum_lanes(values):
    """[R, T, VEC] -> [T]: sums within each thread, so that no thread waits for another."""
    return tl.sum(tl.sum(values, axis=2), axis=0)


@triton.jit
def _log2_total(total):
    """log2 of a row's total; NaN for a row that holds only -inf, because it is not a distribution."""
    return tl.where(total == 0.0, float("nan"), tl.log2(total))


@triton.jit
def _fold(row, into, stride, start, vocabulary, scale, R: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr,
          TILES: tl.constexpr, MOMENTS: tl.constexpr):  # fmt: skip
    """Sums over one chunk of one row, relative to its largest logit; each thread folds alone until the end."""
    lanes = tl.max_contiguous(tl.arange(0, T * VEC), VEC)
    columns = tl.arange(0, R)[:, None] * (T * VEC) + lanes[None, :]
    peak = tl.full([T], 1.0, tl.float32) * (FLOOR * scale)
    total = tl.zeros([T], tl.float32)
    total_t, squares, cubes, squares_t = total, total, total, total
    for tile in range(start, min(start + TILES * R * T * VEC, vocabulary), R * T * VEC):
        inside = tile + columns < vocabulary
        x = tl.load(row + tile + columns, mask=inside, other=-float("inf"), eviction_policy="evict_last").to(tl.float32)
        x = tl.maximum(x, LOWEST, propagate_nan=NAN_TOO)
        higher = tl.maximum(peak, tl.max(tl.max(tl.reshape(x, (R, T, VEC)), axis=2), axis=0) * scale)
        shift = peak - higher
        peak = higher
        t = tl.fma(tl.reshape(x, (R, T, VEC)), scale, -peak[None, :, None])
        e = tl.exp2(t)
        square = e * e
        factor = tl.exp2(shift)
        if MOMENTS:
            squares_t = factor * factor * (squares_t + shift * squares) + _sum_lanes(square * t)
            cubes = factor * factor * factor * cubes + _sum_lanes(square * e)
        squares = factor * factor * squares + _sum_lanes(square)
        total_t = factor * (total_t + shift * total) + _sum_lanes(e * t)
        total = factor * total + _sum_lanes(e)
    highest = tl.max(peak, axis=0)
    shift = peak - highest
    factor = tl.exp2(shift)
    tl.store(into, highest)
    tl.store(into + stride, tl.sum(factor * total, axis=0))
    tl.store(into + 2 * stride, tl.sum(factor * (total_t + shift * total), axis=0))
    tl.store(into + 3 * stride, tl.sum(factor * factor * squares, axis=0))
    if MOMENTS:
        tl.store(into + 4 * stride, tl.sum(factor * factor * factor * cubes, axis=0))
        tl.store(into + 5 * stride, tl.sum(factor * factor * (squares_t + shift * squares), axis=0))


@triton.jit
def _normalisers(folds, stride, chunks, at, alive, CHUNKS: tl.constexpr):
    """(peak, log2 of the total relative to it) of the rows at `at` [G]. Kept apart, so large logits lose no digits."""
    chunk = tl.arange(0, CHUNKS)
    there = alive[:, None] & (chunk < chunks)[None, :]
    source = folds + at[:, None] * chunks + chunk[None, :]
    peaks = tl.load(source, mask=there, other=-3e38, cache_modifier=".cg")
    totals = tl.load(source + stride, mask=there, other=0.0, cache_modifier=".cg")
    peak = tl.max(peaks, axis=1)
    total = tl.sum(tl.exp2(peaks - peak[:, None]) * totals, axis=1)
    return tl.where(alive, peak, 0.0), _log2_total(tl.where(alive, total, 1.0))


@triton.jit
def _deviate(rows, alive, n, peak, log_total, start, vocabulary, scale, G: tl.constexpr, T: tl.constexpr,
             VEC: tl.constexpr, TILES: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Each row's share of JS(p, mean) in one chunk, nats [G]: sum of [p ln(p / m) + q ln(q / m)] / 2.

    Logarithms are subtracted before anything else, so that equal rows cancel: log m and log p then differ only in the
    last bit.
    """
    columns = tl.max_contiguous(tl.arange(0, T * VEC), VEC)[None, :]
    found = tl.zeros([G, T], tl.float32)
    for tile in range(start, min(start + TILES * T * VEC, vocabulary), T * VEC):
        inside = alive[:, None] & (tile + columns < vocabulary)
        x = tl.load(rows[:, None] + tile + columns, mask=inside, other=-float("inf"), eviction_policy="evict_first")
        x = tl.maximum(x.to(tl.float32), LOWEST, propagate_nan=NAN_TOO)  # -inf times p = 0 would be NaN
        t = tl.fma(x, scale, -peak[:, None]) - log_total[:, None]
        p = tl.exp2(t)
        group_sum = tl.sum(p, axis=0)[None, :]
        if LEAVE_ONE_OUT:
            q = tl.maximum(group_sum - p, 0.0, propagate_nan=NAN_TOO) * (1.0 / (n - 1))
        else:
            q = group_sum * (1.0 / n)
        log_q = _log2(q + TINY, FAST)
        log_m = _log2(0.5 * p + (0.5 * q + TINY), FAST)
        found += tl.sum(tl.reshape(p * (t - log_m) + q * (log_q - log_m), (G, T, VEC)), axis=2)
    return (0.5 * LN2) * tl.sum(found, axis=1)


@triton.jit(do_not_specialize=["positions", "items", "lag"])
def signals_kernel(logits, mask, members, folds, shares, done, positions, items, vocabulary, row_stride,
                   position_stride, mask_stride, mask_step, fold_stride, fold_chunks, chunks, scale, lag,
                   G: tl.constexpr, T: tl.constexpr, R: tl.constexpr, FOLD_VEC: tl.constexpr,
                   FOLD_TILES: tl.constexpr, VEC: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr,
                   MOMENTS: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Program `slot` of step k folds a (row, chunk) of item k or deviates a chunk of item k - lag."""
    step = tl.program_id(0) // (G * fold_chunks + chunks)
    slot = tl.program_id(0) % (G * fold_chunks + chunks)
    if slot < G * fold_chunks:
        if step < items:
            position = step % positions
            row = tl.load(members + (step // positions) * G + slot // fold_chunks)
            lives = tl.load(mask + row * mask_stride + position * mask_step, mask=row >= 0, other=0)
            if lives != 0:
                chunk = slot % fold_chunks
                into = folds + (row * positions + position) * fold_chunks + chunk
                source = logits + row * row_stride + position.to(tl.int64) * position_stride
                _fold(source, into, fold_stride, chunk * (FOLD_TILES * R * T * FOLD_VEC), vocabulary, scale,
                      R, T, FOLD_VEC, FOLD_TILES, MOMENTS)  # fmt: skip
                tl.debug_barrier()  # the sums of all threads are stored before one of them counts the fold
                tl.atomic_add(done + step, 1, sem="release")
    elif step >= lag:
        item = step - lag
        position = item % positions
        chunk = slot - G * fold_chunks
        member = tl.load(members + (item // positions) * G + tl.arange(0, G))
        lives = tl.load(mask + member * mask_stride + position * mask_step, mask=member >= 0, other=0)
        alive = lives != 0
        n = tl.sum(alive.to(tl.int32), axis=0)
        if n > 1:
            looks = 0
            counted = tl.atomic_add(done + item, 0, sem="acquire")
            while (counted < n * fold_chunks) & (looks < PATIENCE):
                counted = tl.atomic_add(done + item, 0, sem="acquire")
                looks += 1
            at = member * positions + position
            peak, log_total = _normalisers(folds, fold_stride, fold_chunks, at, alive, CHUNKS)
            rows = logits + member * row_stride + position.to(tl.int64) * position_stride
            share = _deviate(rows, alive, n, peak, log_total, chunk * (TILES * T * VEC), vocabulary, scale,
                             G, T, VEC, TILES, LEAVE_ONE_OUT, FAST)  # fmt: skip
            share = tl.where(counted < n * fold_chunks, float("nan"), share)
            tl.store(shares + at * chunks + chunk, share, mask=alive)


@triton.jit(do_not_specialize=["positions"])
def finish_kernel(logits, token_ids, mask, members, group_of_row, folds, shares, out, alive_out, positions,
                  row_stride, position_stride, id_stride, id_step, mask_stride, mask_step, fold_stride, out_stride,
                  vocabulary, fold_chunks, chunks, scale, G: tl.constexpr, CHUNKS: tl.constexpr, SHARES: tl.constexpr,
                  BLOCK: tl.constexpr, MOMENTS: tl.constexpr, RESOLUTION: tl.constexpr):  # fmt: skip
    """Adds up the chunks of one row at BLOCK positions and writes its signals, 0 where the mask is False."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = position < positions
    keep = tl.load(mask + row * mask_stride + position * mask_step, mask=inside, other=0) != 0
    member = tl.load(members + tl.load(group_of_row + row) * G + tl.arange(0, G))
    there = (member >= 0)[:, None] & inside[None, :]
    lives = tl.load(mask + member[:, None] * mask_stride + position[None, :] * mask_step, mask=there, other=0)
    n = tl.sum((lives != 0).to(tl.int32), axis=0)

    at = row * positions + position
    chunk = tl.arange(0, CHUNKS)
    there = keep[:, None] & (chunk < fold_chunks)[None, :]
    source = folds + at[:, None] * fold_chunks + chunk[None, :]
    peaks = tl.load(source, mask=there, other=-3e38)
    peak = tl.max(peaks, axis=1)
    shift = tl.where(there, peaks - peak[:, None], 0.0)
    factor = tl.exp2(shift)
    totals = tl.load(source + fold_stride, mask=there, other=0.0)
    squares = tl.load(source + 3 * fold_stride, mask=there, other=0.0)
    total = tl.where(keep, tl.sum(factor * totals, axis=1), 1.0)
    total_t = tl.sum(factor * (tl.load(source + 2 * fold_stride, mask=there, other=0.0) + shift * totals), axis=1)
    square = tl.where(keep, tl.sum(factor * factor * squares, axis=1), 1.0)
    log_total = _log2_total(total)

    token = tl.load(token_ids + row * id_stride + position * id_step, mask=keep, other=0)
    known = keep & (token >= 0) & (token < vocabulary)  # NaN for an unknown token: never read beyond the row
    source_z = logits + row * row_stride + position.to(tl.int64) * position_stride + token
    z = tl.load(source_z, mask=known, other=float("nan"))
    logprob = tl.fma(z.to(tl.float32), scale, -peak) - log_total
    tl.store(out + at, tl.where(keep, LN2 * logprob, 0.0), mask=inside)
    tl.store(out + out_stride + at, tl.where(keep, LN2 * (log_total - total_t / total), 0.0), mask=inside)
    renyi2 = 2 * log_total - tl.log2(square)
    tl.store(out + 2 * out_stride + at, tl.where(keep, LN2 * renyi2, 0.0), mask=inside)

    chunk = tl.arange(0, SHARES)
    held = (keep & (n > 1))[:, None] & (chunk < chunks)[None, :]
    deviation = tl.sum(tl.load(shares + at[:, None] * chunks + chunk[None, :], mask=held, other=0.0), axis=1)
    deviation = tl.where(deviation < RESOLUTION, 0.0, deviation)
    tl.store(out + 3 * out_stride + at, tl.where(keep, deviation, 0.0), mask=inside)
    tl.store(alive_out + at, tl.where(keep, n, 0), mask=inside)
    if MOMENTS:
        cubes = tl.load(source + 4 * fold_stride, mask=there, other=0.0)
        squares_t = tl.load(source + 5 * fold_stride, mask=there, other=0.0)
        cube = tl.sum(factor * factor * factor * cubes, axis=1)
        square_t = tl.sum(factor * factor * (squares_t + shift * squares), axis=1)
        tl.store(out + 4 * out_stride + at, tl.where(keep, cube / (total * total * total), 0.0), mask=inside)
        moment = LN2 * (square_t - log_total * square) / (total * total)
        tl.store(out + 5 * out_stride + at, tl.where(keep, moment, 0.0), mask=inside)


@functools.lru_cache(maxsize=64)
def _members(ids: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of each group, int64 [groups, largest size as a power of two] with -1 beyond it; group of each row [N]."""
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(ids):
        rows.setdefault(group, []).append(row)
    width = triton.next_power_of_2(max(map(len, rows.values())))
    members = torch.tensor([found + [-1] * (width - len(found)) for found in rows.values()], device=device)
    return members, torch.tensor([list(rows).index(group) for group in ids], device=device)


def suits(logits: Tensor, ids: tuple[int, ...]) -> bool:
    """Whether the kernel takes such logits and groups: it knows bf16, fp16 and fp32, and groups of MAX_GROUP."""
    usual = logits.dtype in (torch.bfloat16, torch.float16, torch.float32) and logits.stride(-1) == 1
    return usual and logits.numel() > 0 and _members(ids, logits.device)[0].shape[1] <= MAX_GROUP


def _vector(logits: Tensor, at_most: int) -> int:
    """How many neighbouring logits a thread loads at once: up to 16 bytes, if all rows are aligned to that."""
    widest = 16 // logits.element_size()
    aligned = math.gcd(widest, logits.stride(0), logits.stride(1), logits.data_ptr() // logits.element_size())
    return max(1, min(aligned, triton.next_power_of_2(at_most + 1) // 2))


def _lag(device: torch.device, programs_per_item: int, items: int) -> int:
    """Items between a fold and its deviation: as many as are folded at a time, so that programs hardly wait."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return min(items, 1 + processors * PROGRAMS // (2 * programs_per_item))


def kernel_signals(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    ids: tuple[int, ...],
    *,
    temperature: float,
    reference: str,
    moments: bool,
) -> TokenSignals:
    """`token_signals` of checked arguments that `suits`; ids: the groups of the rows, on the host.

    Extra memory for each row and position, besides its results, in groups of 8 in bf16:
    4 bytes x [fields x ceil(V / 16,384) + ceil(V / 2,048)], with 4 fields, or 6 with moments. At V = 151,936 these are
    460 or 540 bytes, while the logits take 303,872.
    """
    n, width, vocabulary = logits.shape
    members, group_of_row = _members(ids, logits.device)
    groups, size = members.shape
    threads, fields = 32 * WARPS, 6 if moments else 4
    fold_vec, vec = _vector(logits, FOLD_VALUES), _vector(logits, DEVIATE_VALUES // size)
    across = min(FOLD_VALUES // fold_vec, triton.next_power_of_2(triton.cdiv(vocabulary, threads * fold_vec)))
    fold_chunks = triton.cdiv(vocabulary, FOLD_TILES * across * threads * fold_vec)
    chunks = triton.cdiv(vocabulary, DEVIATE_TILES * threads * vec)
    new = functools.partial(torch.empty, device=logits.device)
    folds, shares, out = new(fields, n, width, fold_chunks), new(n, width, chunks), new(fields, n, width)
    alive, items, programs = new(n, width, dtype=torch.int32), groups * width, size * fold_chunks + chunks
    done = torch.zeros(items, dtype=torch.int32, device=logits.device)
    lag, scale = _lag(logits.device, programs, items), 1.0 / (temperature * math.log(2.0))
    mask, strides, many = mask.view(torch.uint8), (*logits.stride()[:2],), triton.next_power_of_2(fold_chunks)
    with torch.cuda.device_of(logits):
        signals_kernel[((items + lag) * programs,)](
            logits, mask, members, folds, shares, done, width, items, vocabulary, *strides, *mask.stride(),
            folds.stride(0), fold_chunks, chunks, scale, lag, size, threads, across, fold_vec, FOLD_TILES, vec,
            DEVIATE_TILES, many, moments, reference == "leave_one_out", logits.is_cuda, num_warps=WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
        finish_kernel[(n, triton.cdiv(width, 16))](
            logits, token_ids, mask, members, group_of_row, folds, shares, out, alive, width, *strides,
            *token_ids.stride(), *mask.stride(), folds.stride(0), out.stride(0), vocabulary, fold_chunks, chunks, scale,
            size, many, triton.next_power_of_2(chunks), 16, moments, RESOLUTION, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return TokenSignals(out[0], out[1], out[2], out[3], alive, *(out[4:] if moments else ()))
