"""Which implementation of `token_signals` runs: the Triton kernel on a CUDA device, else the definition in PyTorch.

The choice is made once for a process. RLVR_SIGNALS overrides it for tests and comparisons: `reference` everywhere, or
`kernel` also on the CPU, where Triton's interpreter (TRITON_INTERPRET=1) runs it.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from monitor.signals import reference as definition
from monitor.signals.reference import Reference
from monitor.signals.types import TokenSignals

CHOICES = ("auto", "kernel", "reference")


@functools.cache
def _kernel() -> tuple[ModuleType | None, str]:
    """(the kernel's module or None, the device type whose tensors it takes, "" for every one)."""
    choice = os.environ.get("RLVR_SIGNALS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"RLVR_SIGNALS is {choice!r}, expected one of {', '.join(CHOICES)}. Unset it for auto.")
    if choice == "reference" or (choice == "auto" and not torch.cuda.is_available()):
        return None, ""
    try:
        return importlib.import_module("monitor.signals.group_kernel"), "" if choice == "kernel" else "cuda"
    except ImportError:  # no triton: it is no dependency, and has no build for every platform
        if choice == "kernel":
            raise
        return None, ""


@torch.no_grad()
def token_signals(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    group_ids: Tensor,
    *,
    temperature: float = 1.0,
    reference: Reference = "group",
    moments: bool = False,
) -> TokenSignals:
    """Log-probability, Shannon and Renyi-2 entropy and group deviation of each response token, without gradient.

    Formulas, arguments, results and errors: `monitor.signals.reference.token_signals`, the definition; on a CUDA device
    `monitor.signals.group_kernel` computes the same from one streaming read of the logits in the dtype they have. There
    group_ids are best given on the CPU: from the device they are fetched, which waits for it.
    """
    module, device = _kernel()
    if module is not None and device in ("", logits.device.type):
        definition._check(logits, token_ids, mask, group_ids, reference, temperature)
        ids = tuple(group_ids.tolist())
        if module.suits(logits, ids):
            found: TokenSignals = module.kernel_signals(
                logits, token_ids, mask, ids, temperature=temperature, reference=reference, moments=moments
            )
            return found
    return definition.token_signals(
        logits,
        token_ids,
        mask,
        group_ids.to(logits.device),
        temperature=temperature,
        reference=reference,
        moments=moments,
    )
