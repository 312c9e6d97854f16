"""What the compiler makes of the signals kernel for an H100: registers, stack, instructions per logit. Needs no GPU.

    python benchmarks/bench_kernel_code.py

Triton compiles for sm_90 and its own disassembler lists the machine code; instructions are those of the innermost loop
of each pass over the logits of a tile, special ones (exp2, log2) among them. These are counts; gpu.py measures times.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from harness import RESULTS, no_options, write_rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from monitor.signals import group_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    "mask": "*u8", "members": "*i64", "folds": "*fp32", "shares": "*fp32", "done": "*i32", "scale": "fp32",
}  # fmt: skip
CASES = [
    (dtype, group, moments, kind)
    for dtype in ("bf16", "fp32")
    for group in (2, 4, 8, 16, 32, 64)
    for moments in (False, True)
    for kind in ("group", "leave_one_out")
    if group == 8 or (moments and kind == "group")
]


def compiled(dtype: str, group: int, moments: bool, kind: str) -> tuple[bytes, int]:
    """(machine code, logits that a thread holds of a tile when it deviates), as at V = 151,936."""
    kernel, widest = group_kernel.signals_kernel, 8 if dtype == "bf16" else 4
    vec = max(1, min(widest, group_kernel.DEVIATE_VALUES // group))
    constants = {
        "G": group, "T": 32 * group_kernel.WARPS, "R": group_kernel.FOLD_VALUES // widest, "FOLD_VEC": widest,
        "FOLD_TILES": group_kernel.FOLD_TILES, "VEC": vec, "TILES": group_kernel.DEVIATE_TILES, "CHUNKS": 128 // widest,
        "MOMENTS": moments, "LEAVE_ONE_OUT": kind == "leave_one_out", "FAST": True,
    }  # fmt: skip
    names = kernel.arg_names
    pointers = TYPES | {"logits": f"*{dtype}"}
    types = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
    aligned = {"vocabulary", "row_stride", "position_stride", "logits", *TYPES.keys() - {"scale"}}
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=hints)
    options = {"num_warps": group_kernel.WARPS, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"], group * vec


def loops(listing: str) -> list[list[str]]:
    """The instructions of each loop, as mnemonics, from a disassembly."""
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)(.*)", line):
            code.append((found[1], found[2]))
    back = [
        (labels[target[0]], end)
        for end, (name, rest) in enumerate(code)
        if name.startswith("BRA")
        and (target := re.search(r"\.L_x_\d+", rest))
        and labels.get(target[0], end + 1) <= end
    ]
    return [[name for name, _ in code[start : end + 1]] for start, end in back]


def counted(cubin: bytes, deviate_values: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", path]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    row: dict[str, object] = {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "stack_bytes": int(re.findall(r"STACK:(\d+)", usage)[0]),
    }
    for name, load, values in (("fold", ".EL", group_kernel.FOLD_VALUES), ("deviate", ".EF", deviate_values)):
        inner = min((loop for loop in loops(listing) if any(load in op for op in loop if "LDG" in op)), key=len)
        kinds = collections.Counter(op.split(".")[0] for op in inner)
        row[f"{name}_instructions"] = f"{len(inner) / values:.1f}"
        row[f"{name}_special"] = f"{kinds['MUFU'] / values:.2f}"
    return row


def main() -> None:
    no_options(__doc__)
    os.environ.pop("TRITON_INTERPRET", None)
    rows = []
    for dtype, group, moments, kind in CASES:
        cubin, values = compiled(dtype, group, moments, kind)
        case = {"target": "sm_90", "dtype": dtype, "group": group, "moments": moments, "reference": kind}
        rows.append(case | counted(cubin, values))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    write_rows(RESULTS / "kernel_code.csv", rows, ("triton",))


if __name__ == "__main__":
    main()
