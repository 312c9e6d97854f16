"""What a run was made with: commit, package versions, hardware."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("rlvr-monitor", "torch", "transformers", "duckdb", "numpy", "wandb")


def environment() -> dict[str, Any]:
    """Commit, package versions and hardware, for the run's metadata."""
    folder = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=False)
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "commit": git.stdout.strip() or None,
        "uncommitted_changes": bool(dirty.stdout.strip()),
        "python": platform.python_version(),
        "packages": versions,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "device_count": torch.cuda.device_count() if cuda else 1,
        "threads": torch.get_num_threads(),
    }
