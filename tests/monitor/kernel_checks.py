"""The checks of the Triton kernel, which test_group_kernel.py runs in a process of their own.

With TRITON_INTERPRET=1, which Triton reads when it is imported, they run on the CPU, otherwise on the CUDA device.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from monitor.signals import TokenSignals, definition, group_kernel, token_signals

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
NAMES = ("logprob", "entropy", "renyi2", "deviation", "alive", "sum_p3", "sum_p2_logp")
LN2 = math.log(2.0)


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch):
    """Speeds Triton's interpreter up, which spends half its time on patching its language at each call in a kernel."""
    patched: set[bool] = set()

    def call(self, *args, **kwargs):
        outer = "tl" in self.fn.__globals__  # our own functions see the module that the launch has patched
        if not outer and outer not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(outer)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Fills new tensors with NaN, or an absurd number of rollouts, so that values the kernel does not write show."""

    def poisoned(*size: int, dtype: torch.dtype = torch.float32, **options) -> Tensor:
        return torch.full(size, float("nan") if dtype.is_floating_point else -77, dtype=dtype, **options)

    monkeypatch.setattr(group_kernel.torch, "empty", poisoned)


@pytest.fixture
def wide(monkeypatch):
    """Programs of 1,024 threads: large vocabularies in a few programs, for an interpreter that runs one at a time."""
    if INTERPRETED:
        monkeypatch.setattr(group_kernel, "WARPS", 32)


def oracle(logits, ids, mask, groups, temperature=1.0, leave_one_out=False) -> np.ndarray:
    """The definitions in float64, [7, N, T] in the order of NAMES; the logits are taken as exact."""
    logp = torch.log_softmax(logits.double() / temperature, -1)
    p = logp.exp()
    n, width = mask.shape
    out = torch.zeros(7, n, width, dtype=torch.float64)
    for t in range(width):
        for group in set(groups.tolist()):
            rows = torch.nonzero((groups == group) & mask[:, t]).flatten()
            if not len(rows):
                continue
            q, lq, count = p[rows, t], torch.nan_to_num(logp[rows, t], neginf=0.0), len(rows)
            mean = q.sum(0).expand_as(q)
            mean = (mean - q) / max(count - 1, 1) if leave_one_out else mean / count
            mean = q if count == 1 else mean
            middle = (q + mean) / 2
            js = (torch.xlogy(q, q) + torch.xlogy(mean, mean)).sum(-1) / 2 - torch.xlogy(middle, middle).sum(-1)
            values = (logp[rows, t].gather(1, ids[rows, t, None]).squeeze(1), -(q * lq).sum(-1), -(q * q).sum(-1).log())
            moments = ((q**3).sum(-1), (q * q * lq).sum(-1))
            for field, value in enumerate((*values, js, torch.full_like(js, count), *moments)):
                out[field, rows, t] = value
    return out.numpy()


def drawn(lengths, vocabulary, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    n, t = len(lengths), max(lengths)
    logits = (torch.randn(n, t, vocabulary, generator=generator) * scale).to(dtype)
    ids = torch.randint(vocabulary, (n, t), generator=generator)
    return logits, ids, torch.arange(t) < torch.tensor(lengths).unsqueeze(1)


def kernel(logits, ids, mask, groups, **options) -> TokenSignals:
    """The public function, which must take the kernel: the definition is forbidden."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(definition, "token_signals", None)
        found = token_signals(logits.to(DEVICE), ids.to(DEVICE), mask.to(DEVICE), groups, **options)
    assert found.alive.dtype == torch.int32 and found.deviation.dtype == torch.float32
    return found


def assert_matches(found: TokenSignals, expected: np.ndarray, atol: float = 1e-5) -> None:
    for name, value in zip(NAMES, expected, strict=True):
        if (signal := getattr(found, name)) is not None:
            relative = 1e-5 if name.startswith("sum") else 1e-7  # a float32 result cannot be closer
            np.testing.assert_allclose(signal.cpu().double().numpy(), value, relative, atol, err_msg=name)


CASES = {  # name: vocabulary, dtype, lengths, groups, options
    "Qwen2.5, as a multiprocessor runs it": (151_936, torch.float32, [1, 1], [0, 0], {}),
    "Qwen2.5, eight": (151_936, torch.bfloat16, [1, 2, 1, 2, 1, 1, 1, 1], [0] * 8, {"moments": True}),
    "Qwen2.5, sixteen": (151_936, torch.bfloat16, [1] * 16, [3] * 16, {"moments": True}),
    "SmolLM2, seven and one": (49_152, torch.float16, [1, 2, 1, 2, 2, 1, 2, 1], [4, 4, -9, 4, 4, 4, 4, 4], {}),
    "SmolLM2, hot": (49_152, torch.bfloat16, [2, 1, 2], [1, 1, 1], {"temperature": 1.7, "reference": "leave_one_out"}),
    "long and ragged": (401, torch.float32, [300, 3, 1], [0, 0, 0], {"moments": True}),
    "interleaved groups": (401, torch.bfloat16, [3, 1, 2, 4, 4], [9, -2, 9, -2, 9], {"temperature": 0.6}),
    "others only": (401, torch.float32, [2] * 7, [0] * 7, {"reference": "leave_one_out", "moments": True}),
    "every size": (401, torch.float16, [1] * 34, [1] + [2] * 2 + [7] * 7 + [8] * 8 + [16] * 16, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_signals_match_float64(case, request):
    vocabulary, dtype, lengths, groups, options = CASES[case]
    if vocabulary > 401 and "multiprocessor" not in case:
        request.getfixturevalue("wide")
    logits, ids, mask = drawn(lengths, vocabulary, dtype)
    found = kernel(logits, ids, mask, torch.tensor(groups), **options)
    others = options.get("reference") == "leave_one_out"
    assert_matches(found, oracle(logits, ids, mask, torch.tensor(groups), options.get("temperature", 1.0), others))
    assert (found.sum_p3 is not None) == options.get("moments", False)


@pytest.mark.parametrize("lag", [0, 1, 5])
def test_the_order_of_the_work_changes_nothing(lag, monkeypatch):
    logits, ids, mask = drawn([3, 2, 3], 401)
    whole = kernel(logits, ids, mask, torch.tensor([0, 0, 1]))
    monkeypatch.setattr(group_kernel, "_lag", lambda *_: lag)
    found = kernel(logits, ids, mask, torch.tensor([0, 0, 1]))
    assert all(torch.equal(getattr(whole, name), getattr(found, name)) for name in NAMES[:5])


def test_many_chunks_add_up(monkeypatch):
    """401 tokens in tiles of 128: 4 folds of a row and 2 deviations, the last of each only part full."""
    monkeypatch.setattr(group_kernel, "FOLD_VALUES", 1)
    monkeypatch.setattr(group_kernel, "FOLD_TILES", 1)
    monkeypatch.setattr(group_kernel, "DEVIATE_TILES", 2)
    logits, ids, mask = drawn([2, 2, 1], 401)
    groups = torch.zeros(3, dtype=torch.long)
    assert_matches(kernel(logits, ids, mask, groups, moments=True), oracle(logits, ids, mask, groups))


def test_slabs_cut_out_of_larger_tensors():
    """Columns, every other row, and a vocabulary of 401 out of 404: no two strides are what a whole tensor has."""
    logits, ids, mask = drawn([6, 4, 5, 6], 404, torch.bfloat16)
    slab, groups = (slice(None, None, 2), slice(2, 5)), torch.tensor([0, 0])
    cut, ids = logits[slab][..., 3:], ids[slab] % 401
    assert cut.stride(-1) == 1 and not cut.is_contiguous() and not mask[slab].is_contiguous()
    on_device = logits.to(DEVICE)[slab][..., 3:], ids.to(DEVICE), mask.to(DEVICE)[slab]
    assert_matches(token_signals(*on_device, groups, moments=True), oracle(cut, ids, mask[slab], groups))


def test_masked_positions_may_hold_anything():
    logits, ids, mask = drawn([2, 4, 3], 401)
    groups = torch.zeros(3, dtype=torch.long)
    clean = kernel(logits, ids, mask, groups, moments=True)
    noise = torch.where(torch.arange(401) % 2 == 0, torch.nan, torch.inf)
    dirty = torch.where(mask.unsqueeze(-1), logits, noise), torch.where(mask, ids, -(10**12))
    found = kernel(*dirty, mask, groups, moments=True)
    assert all(torch.equal(getattr(clean, name), getattr(found, name)) for name in NAMES)
    assert (found.entropy[0, 2:] == 0).all() and (found.alive[0, 2:] == 0).all()


def test_extreme_logits():
    """Logits of +-60, of +-10,000 with decided rows, at an offset of 5,000, and a temperature of 0.01."""
    groups = torch.zeros(3, dtype=torch.long)
    for scale, offset, temperature in (
        (20.0, 0.0, 1.0),
        (3e3, 0.0, 1.0),
        (3.0, 5e3, 1.0),
        (1.0, 0.0, 0.01),
    ):
        logits, ids, mask = drawn([2, 2, 2], 401, scale=scale)
        logits = logits + offset
        expected = oracle(logits, ids, mask, groups, temperature)
        assert_matches(kernel(logits, ids, mask, groups, temperature=temperature, moments=True), expected)


def one_hot(token: int, vocabulary: int = 401) -> Tensor:
    return torch.where(torch.arange(vocabulary) == token, 0.0, -torch.inf)


def test_forbidden_tokens():
    # p = (1/2, 1/2, 0, ...): H1 = H2 = ln 2, sum p^3 = 1/4, sum p^2 ln p = -ln 2 / 2; one-hot: 0, 0, 1, 0
    # P = (3/4, 1/4), m = (5/8, 3/8) and (7/8, 1/8): JS = H(m) - H(p) / 2 - H(P) / 2 = 0.033822 and 0.095602
    half = torch.full((401,), -torch.inf)
    half[[0, 400]] = 0.0
    logits = torch.stack([half, one_hot(0)]).unsqueeze(1)
    ids = torch.tensor([[400], [400]])
    found = kernel(logits, ids, torch.ones(2, 1, dtype=torch.bool), torch.zeros(2), moments=True)
    values = torch.stack([getattr(found, name)[:, 0].float().cpu() for name in NAMES])
    expected = [[-LN2, LN2, LN2, 0.033822, 2, 0.25, -LN2 / 2], [-torch.inf, 0, 0, 0.095602, 2, 1, 0]]
    torch.testing.assert_close(values, torch.tensor(expected).T, atol=1e-6, rtol=1e-6)


def test_caps_are_reached():
    """Disjoint one-hot rows: cap(2) = 0.215762; the mean of the others is disjoint too: ln 2."""
    logits, mask = torch.stack([one_hot(0), one_hot(1)]).unsqueeze(1), torch.ones(2, 1, dtype=torch.bool)
    for kind, cap in (("group", 0.215762), ("leave_one_out", LN2)):
        found = kernel(logits, torch.tensor([[0], [1]]), mask, torch.zeros(2), reference=kind)
        assert found.deviation.flatten().tolist() == pytest.approx([cap, cap], abs=1e-6)


@pytest.mark.parametrize("count", [2, 3, 7, 8])
def test_equal_rows_do_not_deviate_at_all(count):
    """What the first position of every group is: exactly 0, also for a uniform row, where each token errs alike."""
    rows = torch.stack([torch.randn(401, generator=torch.Generator().manual_seed(1)) * 4, torch.zeros(401)])
    ids, mask = torch.zeros(count, 2, dtype=torch.long), torch.ones(count, 2, dtype=torch.bool)
    for kind in ("group", "leave_one_out"):
        found = kernel(rows.expand(count, 2, 401), ids, mask, torch.zeros(count), reference=kind)
        assert torch.equal(found.deviation, torch.zeros(count, 2, device=DEVICE))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter
def test_broken_rows_are_seen():
    """A NaN or +inf logit, or nothing but -inf, makes its row NaN, and its group's deviations; others are untouched."""
    logits, ids, mask = drawn([1] * 8, 401)
    logits[0, 0, 7], logits[2, 0, 9], logits[4] = torch.nan, torch.inf, -torch.inf
    found = kernel(logits, ids, mask, torch.arange(8) // 2, moments=True)
    for name in ("logprob", "entropy", "renyi2", "sum_p3", "sum_p2_logp"):
        assert getattr(found, name).flatten().isnan().tolist() == [True, False] * 3 + [False] * 2, name
    assert found.deviation.flatten().isnan().tolist() == [True] * 6 + [False] * 2


def test_an_unknown_token_is_nan_and_reads_nothing():
    logits, ids, mask = drawn([1, 1, 1], 401)
    ids[0, 0], ids[1, 0] = 401, -1
    assert kernel(logits, ids, mask, torch.zeros(3)).logprob.flatten().isnan().tolist() == [True, True, False]


def test_what_the_kernel_does_not_take_goes_to_the_definition(monkeypatch):
    monkeypatch.setattr(group_kernel, "kernel_signals", None)
    monkeypatch.setattr(group_kernel, "MAX_GROUP", 2)
    logits, ids, mask = (x.to(DEVICE) for x in drawn([2, 2, 2], 11))
    for z, groups in ((logits.double(), [0, 1, 2]), (logits, [0, 0, 0]), (logits.mT.contiguous().mT, [0, 1, 2])):
        expected = definition.token_signals(logits, ids, mask, torch.tensor(groups, device=DEVICE))
        found = token_signals(z, ids, mask, torch.tensor(groups))
        torch.testing.assert_close(found.entropy, expected.entropy)
        torch.testing.assert_close(found.deviation, expected.deviation)


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels keep their constants")
def test_a_fold_that_is_never_counted_ends_as_nan(monkeypatch):
    """The wait is bounded: if programs start in another order than that of their numbers, the result is NaN."""
    logits, ids, mask = drawn([1, 1], 401)
    monkeypatch.setattr(group_kernel, "PATIENCE", group_kernel.tl.constexpr(3))
    monkeypatch.setattr(group_kernel.torch, "empty", torch.zeros)  # so that the NaN is the kernel's
    monkeypatch.setattr(group_kernel.torch, "zeros", lambda *size, **options: torch.full(size, -9, **options))
    found = kernel(logits, ids, mask, torch.zeros(2, dtype=torch.long))
    assert found.deviation.isnan().all() and torch.isfinite(found.entropy).all()


@pytest.mark.skipif(INTERPRETED, reason="needs more logits than 2^31, 4 GiB")
def test_offsets_beyond_2_to_the_31():
    n, t, v = 8, 1_800, 151_936
    logits = torch.zeros(n, t, v, dtype=torch.bfloat16, device=DEVICE)
    logits[:, :, 5] = 20.0
    ids, mask = torch.full((n, t), 5, device=DEVICE), torch.ones(n, t, dtype=torch.bool, device=DEVICE)
    found = token_signals(logits, ids, mask, torch.zeros(n))
    exact = -math.log1p((v - 1) * math.exp(-20.0))
    assert (found.logprob - exact).abs().max() < 1e-5 and (found.deviation == 0).all()
