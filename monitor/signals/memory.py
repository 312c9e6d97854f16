"""How much memory a run has taken."""

from __future__ import annotations

import resource

import torch


def peak_memory_gib() -> float:
    """Peak memory in GiB: of the device on CUDA, else the process's largest resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
