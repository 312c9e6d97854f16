"""What only a GPU can tell, in one call without a network: checks and times the kernels, times updates, trains a pair.

    python benchmarks/gpu.py [--minutes 9] [--parts checks,kernels,updates,pair,tune] [--out benchmarks/results]
    python benchmarks/gpu.py --small     everything at toy sizes on the CPU, under Triton's interpreter

  checks    every signal against float64 on a table of shapes: gpu_checks.csv; a wrong one ends the call with code 1
  kernels   copy bandwidth and special-function rate as measured, then the signals at 8 groups x 8 rollouts x 64
            positions x 151,936 in bf16, beside both floors and other implementations: gpu_kernels.csv
  updates   the weightings of the study against uniform on a Qwen2.5-0.5B shape with random weights: gpu_updates.csv
  pair      in the time left, runs of the demo preset: uniform, both budgets and ict, stored in <out>/gpu_pair:
            gpu_pair.csv
  tune      (not by default) the kernel's constants around their values: gpu_tune.csv

Times are medians of CUDA events. Before each timed call a buffer larger than the L2 is overwritten, which also takes
longer than the host's part of the launch. checks, kernels and tune need only torch and triton, updates also needs
pydantic and transformers, and pair needs all of this project's requirements. A part whose packages are missing is named
and left out. `pytest -m gpu` runs finer checks on a GPU. Where the files are a copy without their repository,
RLVR_COMMIT names the commit for the rows.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SMALL = "--small" in sys.argv
if SMALL:  # both are read when the kernels are imported
    os.environ |= {"TRITON_INTERPRET": "1", "RLVR_SIGNALS": "kernel"}
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from harness import RESULTS, write_rows  # noqa: E402
from torch import Tensor  # noqa: E402

KINDS = ("uniform", "ict", "ict_undecided", "random_undecided", "top_entropy", "entropy_budget", "ict_budget",
         "ict_soft_budget", "random_budget", "opefo")  # fmt: skip
PAIR = ("uniform", "ict_budget", "entropy_budget", "ict")
DEVICE = torch.device("cpu" if SMALL else "cuda")
L2_FLUSH = 1 << (10 if SMALL else 30)  # bytes overwritten between timed calls


def milliseconds(call: Callable[[], object], rounds: int = 2 if SMALL else 25) -> float:
    """The median time of a call on the device with a cold L2, after two warm-up calls."""
    flush = torch.empty(L2_FLUSH, dtype=torch.uint8, device=DEVICE)
    times = []
    for step in range(rounds + (0 if SMALL else 2)):
        flush.fill_(step)
        if SMALL:
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[-rounds:])


def drawn(n: int, t: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits of standard deviation 3, ids, mask, ids of groups of 8)."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.empty(n, t, v, dtype=dtype, device=DEVICE).normal_(0.0, 3.0, generator=generator)
    ids = torch.randint(v, (n, t), generator=generator, device=DEVICE)
    return logits, ids, torch.ones(n, t, dtype=torch.bool, device=DEVICE), torch.arange(n) // 8


def float64_signals(logits: Tensor, ids: Tensor, mask: Tensor, groups: Tensor, kind: str) -> dict[str, Tensor]:
    """The definitions in float64."""
    logp = torch.log_softmax(logits.double(), -1)
    p, member = logp.exp(), (groups[:, None] == groups[None, :]).double().to(logits.device)
    alive_p = torch.where(mask.unsqueeze(-1), p, 0.0)
    alive = member @ mask.double()
    total = torch.einsum("ij,jtv->itv", member, alive_p)
    others = float(kind == "leave_one_out")  # rows left out of the mean
    mean = (total - others * alive_p) / (alive - others).clamp(min=1).unsqueeze(-1)
    mean = torch.where((alive > 1).unsqueeze(-1), mean, p)
    js = 0.5 * (torch.xlogy(p, p) + torch.xlogy(mean, mean)) - torch.xlogy((p + mean) / 2, (p + mean) / 2)
    found = {
        "logprob": logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1),
        "entropy": -(p * logp).sum(-1),
        "renyi2": -(p * p).sum(-1).log(),
        "deviation": js.sum(-1),
        "alive": alive,
        "sum_p3": (p**3).sum(-1),
        "sum_p2_logp": (p * p * logp).sum(-1),
    }
    return {name: torch.where(mask, value, 0.0) for name, value in found.items()}


def checks(out: Path, until: float) -> list[str]:
    from monitor.signals import token_signals

    shapes = [(v, size) for v in (151_936, 49_152, 401) for size in (1, 2, 7, 8, 16)]
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    shapes, dtypes = ([(3_001, 2), (401, 3)], dtypes[:1]) if SMALL else (shapes, dtypes)
    rows, wrong = [], []
    for (v, size), dtype, kind in [(s, d, k) for s in shapes for d in dtypes for k in ("group", "leave_one_out")]:
        logits, ids, mask, _ = drawn(size + 1, 2 if SMALL else 5, v, dtype)
        lengths = torch.arange(size + 1, device=DEVICE).unsqueeze(1) % mask.shape[1] + 1
        mask, groups = torch.arange(mask.shape[1], device=DEVICE) < lengths, torch.tensor([7] + [3] * size)
        found = token_signals(logits, ids, mask, groups, reference=kind, moments=True)  # type: ignore[arg-type]
        exact = float64_signals(logits, ids, mask, groups, kind)
        errors = {key: float((getattr(found, key) - value).abs().max()) for key, value in exact.items()}
        equal = token_signals(logits[:1].expand(size + 1, -1, -1), ids, mask, groups, reference=kind)  # type: ignore[arg-type]
        row = {"vocabulary": v, "group": size, "dtype": str(dtype).removeprefix("torch."), "reference": kind}
        row |= {f"error_{key}": f"{value:.1e}" for key, value in errors.items()}
        row["equal_rows_deviation"] = f"{float(equal.deviation.max()):.1e}"
        rows.append(row)
        if not (max(errors.values()) <= 1e-4 and float(equal.deviation.max()) == 0):
            wrong.append(f"checks: {row}")
    write(out / "gpu_checks.csv", rows)
    return wrong


def ceilings() -> tuple[float, float]:
    """(bytes per second of a large copy, read plus written; special operations per second), both measured."""
    from gpu_kernels import special_kernel

    size = 1 << (12 if SMALL else 31)
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE).fill_(value) for value in (1, 2))
    bandwidth = 2 * size / milliseconds(lambda: target.copy_(source)) * 1e3
    programs, repeats, width = (2, 2, 128) if SMALL else (4096, 256, 1024)
    values = torch.rand(programs * width, device=DEVICE)

    def rate(times: int) -> float:
        return milliseconds(lambda: special_kernel[(programs,)](values, times, width))

    operations = programs * width * 2 * repeats * 4  # four a repeat; the difference leaves out the launch
    return bandwidth, operations / max(rate(3 * repeats) - rate(repeats), 1e-9) * 1e3


def kernels(out: Path, until: float) -> list[str]:
    from gpu_kernels import logprob_entropy

    from monitor.signals import definition, group_kernel, token_signals

    n, t, v = (8, 2, 401) if SMALL else (64, 64, 151_936)
    logits, ids, mask, groups = drawn(n, t, v, torch.bfloat16)
    bandwidth, special = ceilings()
    read = logits.numel() * 2 / bandwidth * 1e3
    lag = group_kernel._lag

    def unordered() -> object:
        group_kernel._lag = lambda device, programs, items: items
        try:
            return token_signals(logits, ids, mask, groups)
        finally:
            group_kernel._lag = lag

    calls: dict[str, tuple[float, Callable[[], object]]] = {  # name -> special operations a logit, call
        "signals": (3.125, lambda: token_signals(logits, ids, mask, groups)),
        "signals with moments": (3.125, lambda: token_signals(logits, ids, mask, groups, moments=True)),
        "signals, leave_one_out": (4.0, lambda: token_signals(logits, ids, mask, groups, reference="leave_one_out")),
        "signals, all folds first": (3.125, unordered),
        "logprob and entropy alone, ours": (1.0, lambda: logprob_entropy(logits, ids)),
        "plain PyTorch": (0.0, lambda: definition.token_signals(logits, ids, mask, groups)),
    }
    try:
        theirs = importlib.import_module("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
        if not SMALL:
            calls["logprob and entropy alone, TRL"] = (1.0, lambda: theirs(logits, ids))
    except ImportError:
        print("TRL is not installed: its kernel is not timed")
    calls["signals, again"] = calls["signals"]  # the difference to the first is noise
    rows = []
    for name, (operations, call) in calls.items():
        ms, extra = milliseconds(call), peak_bytes(call)
        rows.append(
            {"call": name, "rows": n, "positions": t, "vocabulary": v, "ms": f"{ms:.4f}"}
            | {"one_read_ms": f"{read:.4f}", "times_one_read": f"{ms / read:.3f}"}
            | {"special_ms": f"{operations * logits.numel() / special * 1e3:.4f}", "extra_mib": f"{extra / 2**20:.1f}"}
            | {"copy_tb_s": f"{bandwidth / 1e12:.3f}", "special_t_s": f"{special / 1e12:.3f}"}
        )
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    write(out / "gpu_kernels.csv", rows)
    return []


def tune(out: Path, until: float) -> list[str]:
    from monitor.signals import group_kernel, token_signals

    n, t, v = (8, 1, 401) if SMALL else (64, 64, 151_936)
    logits, ids, mask, groups = drawn(n, t, v, torch.bfloat16)
    tried: dict[str, tuple[int, ...]] = {
        "WARPS": (4, 2, 8), "FOLD_TILES": (1, 4), "FOLD_VALUES": (32,), "DEVIATE_TILES": (2, 8),
        "DEVIATE_VALUES": (16, 64), "PROGRAMS": (1, 2, 8, 16),
    }  # fmt: skip
    rows = []
    for name, value in [(name, value) for name, values in tried.items() for value in values][: 2 if SMALL else None]:
        kept = getattr(group_kernel, name)
        setattr(group_kernel, name, value)
        ms = milliseconds(lambda: token_signals(logits, ids, mask, groups, moments=True))
        setattr(group_kernel, name, kept)
        rows.append({"constant": name, "value": value, "usual": kept, "ms": f"{ms:.4f}"})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    write(out / "gpu_tune.csv", rows)
    return []


def updates(out: Path, until: float) -> list[str]:
    import updates as work

    size = work.SMALL if SMALL else work.ON_GPU
    rows = [
        work.measured(kind, DEVICE, size) for kind in (*KINDS, *KINDS[::-1])
    ]  # each twice, far from and near to uniform
    uniform = min(float(row["update_ms"]) for row in rows if row["weighting"] == "uniform")
    for row in rows:
        row["times_uniform"] = f"{float(row['update_ms']) / uniform:.3f}"
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    write(out / "gpu_updates.csv", rows)
    return []


def pair(out: Path, until: float) -> list[str]:
    for name in ("duckdb", "pydantic", "tyro"):
        importlib.import_module(name)
    from updates import pair_row

    store, rows, wrong = out / "gpu_pair", [], []
    for index, kind in enumerate(PAIR):
        seconds = max(30.0, (until - time.monotonic()) / (len(PAIR) - index))
        command = [sys.executable, "-m", "monitor.cli", "train", "demo", "--weighting.kind", kind, "--run", kind]
        command += ["--store", str(store), *(["--steps", "2", "--eval.every", "0"] if SMALL else [])]
        run = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "RLVR_SIGNALS": "auto"})
        try:
            code = run.wait(seconds)
        except subprocess.TimeoutExpired:
            run.terminate()  # a stopped run is whole up to its last step
            code = run.wait(60)
        wrong += [f"pair: {kind} ended with code {code}"] if code not in (0, -15, 143, 130) else []
        rows.append(pair_row(store, kind))
    write(out / "gpu_pair.csv", rows)
    return wrong


def peak_bytes(call: Callable[[], object]) -> int:
    """Device memory that a call takes beyond what is there before it, results included."""
    if SMALL:
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows with the GPU and its driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    device = {"gpu": "none, interpreted", "driver": ""}
    if not SMALL:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
        device = {"gpu": torch.cuda.get_device_name(), "driver": driver[0] if driver else ""}
    write_rows(path, [row | device for row in rows], ("torch", "triton"))


PARTS = {"checks": checks, "kernels": kernels, "updates": updates, "pair": pair, "tune": tune}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; the pair takes what is left")
    parser.add_argument("--parts", default="checks,kernels,updates,pair", help=f"of {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="folder of the CSV files")
    parser.add_argument("--small", action="store_true", help="dry run on the CPU, into a temporary folder")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    if not SMALL and not torch.cuda.is_available():
        print("No CUDA device: nothing was measured. Use --small for a dry run on the CPU.", file=sys.stderr)
        return 2
    out = options.out or (Path(tempfile.mkdtemp(prefix="gpu_small_")) if SMALL else RESULTS)
    wrong: list[str] = []
    for name in options.parts.split(","):
        begin = time.monotonic()
        try:
            wrong += PARTS[name](out, until)
        except ModuleNotFoundError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
            continue
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    print("\n".join(wrong) or "all checks passed")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
