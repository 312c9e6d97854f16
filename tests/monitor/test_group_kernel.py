"""The Triton kernel of the signals: its checks under the interpreter and on a GPU, and the choice of implementation."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="monitor.signals needs torch")

import torch

ROOT = Path(__file__).parents[2]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run(*command: str, **environment: str) -> str:
    found = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=found, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux")
def test_the_kernel_under_the_interpreter():
    checks = str(Path(__file__).with_name("kernel_checks.py"))
    report = run("-m", "pytest", "-q", checks, TRITON_INTERPRET="1", RLVR_SIGNALS="kernel")
    assert "passed" in report and "failed" not in report


@gpu
@pytest.mark.gpu
def test_the_kernel_on_a_gpu():
    report = run("-m", "pytest", "-q", str(Path(__file__).with_name("kernel_checks.py")), RLVR_SIGNALS="kernel")
    assert "passed" in report and "skipped" not in report


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux")
def test_the_kernels_compile_for_an_h100_with_wide_loads_and_ordered_counts():
    """No GPU is needed to compile. 64 bf16 logits of a fold are 8 loads of 16 bytes; 32 of a deviation 8 loads of 8."""
    program = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from monitor.signals import group_kernel

POINTERS = dict(
    logits="*bf16", mask="*u8", members="*i64", folds="*fp32", shares="*fp32", done="*i32", token_ids="*i64",
    group_of_row="*i64", out="*fp32", alive_out="*i32", scale="fp32",
)

def ptx(kernel, **constants):
    names = kernel.arg_names
    types = {name: POINTERS.get(name, "constexpr" if name in constants else "i32") for name in names}
    aligned = {"vocabulary", "row_stride", "position_stride"} | {name for name in names if types[name][0] == "*"}
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in aligned}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=hints)
    options = {"num_warps": group_kernel.WARPS, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

print(ptx(
    group_kernel.signals_kernel, G=8, T=128, R=8, FOLD_VEC=8, FOLD_TILES=2, VEC=4, TILES=4, CHUNKS=16, MOMENTS=True,
    LEAVE_ONE_OUT=False, FAST=True,
))
ptx(group_kernel.finish_kernel, G=8, CHUNKS=16, SHARES=128, BLOCK=16, MOMENTS=True, RESOLUTION=1e-6)
"""
    text = run("-c", program)
    assert len(re.findall(r"ld\.global\.L1::evict_last\S*\.v4\.b32", text)) == 8
    assert len(re.findall(r"ld\.global\.L1::evict_first\S*\.v2\.b32", text)) == 8
    assert text.count("lg2.approx.ftz.f32") == 32 + 4  # of each middle, and of the mean once for 8 rows
    assert re.search(r"(atom|red)\.global\.gpu\.release\.add", text) and "ld.global.gpu.acquire" in text


def test_importing_the_signals_leaves_triton_alone():
    """Triton is no dependency: the public function works where it is missing."""
    program = """
import sys, torch
sys.modules["triton"] = None  # an import of it raises ImportError
torch.cuda.is_available = lambda: True  # so that auto looks for the kernel
from monitor.signals import token_signals
ones = torch.ones(1, 1, dtype=torch.bool)
print(token_signals(torch.zeros(1, 1, 4), ones.long(), ones, torch.zeros(1)).entropy.item())
"""
    assert float(run("-c", program, RLVR_SIGNALS="auto")) == pytest.approx(1.3862944, abs=1e-6)  # ln 4


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux")
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        ("", ""),
        ("module.LN2 = module.tl.constexpr(0.7)", "logprob is off by 0."),  # nats that are 1 % too long
        ("del module.finish_kernel", "NameError: name 'finish_kernel' is not defined"),
    ],
)
def test_auto_takes_a_kernel_only_if_it_agrees_with_the_definition(break_it, message):
    program = f"""
import torch
from monitor.signals import dispatch, group_kernel as module
{break_it}
print("fault:", dispatch._fault(module, torch.device("cpu")))
"""
    report = run("-c", program, TRITON_INTERPRET="1")
    assert report.strip() == "fault:" if not message else f"fault: {message}" in report


@pytest.mark.parametrize(
    ("choice", "message"),
    [("kernel", "ModuleNotFoundError"), ("fast", "RLVR_SIGNALS is 'fast', expected one of auto, kernel, definition")],
)
def test_a_choice_that_cannot_be_met_is_refused(choice, message):
    program = """
import sys, torch
sys.modules["triton"] = None
from monitor.signals import token_signals
try:
    token_signals(torch.zeros(1, 1, 4), torch.zeros(1, 1).long(), torch.ones(1, 1).bool(), torch.zeros(1))
except Exception as error:
    print(type(error).__name__, error)
"""
    assert message in run("-c", program, RLVR_SIGNALS=choice)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux")
def test_the_gpu_benchmark_runs_small_and_says_that_it_saw_no_gpu(tmp_path):
    report = run("benchmarks/gpu.py", "--small", "--parts", "checks,kernels", "--out", str(tmp_path))
    assert report.endswith("all checks passed\n")
    with open(tmp_path / "gpu_checks.csv", newline="") as file:
        for row in csv.DictReader(file):
            assert row["gpu"] == "none, interpreted" and float(row["equal_rows_deviation"]) == 0
            assert max(float(value) for key, value in row.items() if key.startswith("error_")) < 1e-5
    with open(tmp_path / "gpu_kernels.csv", newline="") as file:
        calls = {row["call"]: float(row["ms"]) for row in csv.DictReader(file)}
    assert {"signals", "signals, again", "plain PyTorch", "logprob and entropy alone, ours"} <= calls.keys()
    assert min(calls.values()) > 0


def test_the_gpu_benchmark_without_a_gpu_ends_with_code_2():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "No CUDA device: nothing was measured. Use --small" in done.stderr
