"""Which implementation of `token_signals` runs: the Triton kernel on a CUDA device, else the definition in PyTorch.

The choice is made once for a process. The kernel has been tried on few devices, so it must first import, compile and
agree with the definition on a small batch. RLVR_SIGNALS overrides the choice for tests and comparisons: `definition`
takes the definition everywhere; `kernel` takes the kernel without that check, also on the CPU, where Triton's
interpreter (TRITON_INTERPRET=1) runs it.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from monitor.signals import definition
from monitor.signals.definition import Reference
from monitor.signals.types import TokenSignals

CHOICES = ("auto", "kernel", "definition")


@functools.cache
def _kernel() -> tuple[ModuleType | None, str]:
    """(the kernel's module or None, the device type whose tensors it takes or "" for every type)."""
    choice = os.environ.get("RLVR_SIGNALS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"RLVR_SIGNALS is {choice!r}, expected one of {', '.join(CHOICES)}. Unset it for auto.")
    if choice == "definition" or (choice == "auto" and not torch.cuda.is_available()):
        return None, ""
    try:
        module = importlib.import_module("monitor.signals.group_kernel")
    except ImportError:  # triton is optional: it is not built for every platform
        if choice == "kernel":
            raise
        return None, ""
    if choice == "kernel":
        return module, ""
    fault = _fault(module, torch.device("cuda"))
    if fault:
        message = f"The signals kernel does not work here ({fault}): the slower definition in PyTorch takes its place."
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return (None, "") if fault else (module, "cuda")


@torch.no_grad()
def _fault(module: ModuleType, device: torch.device) -> str:
    """What is wrong with the kernel here, or "". It is tried on two ragged groups of four rows, V = 3,000, in bf16."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(8, 3, 3000, generator=generator)).bfloat16().to(device)
    token_ids = torch.randint(3000, (8, 3), generator=generator).to(device)
    mask = (torch.arange(3) < torch.tensor([3, 2, 3, 1, 3, 3, 2, 0]).unsqueeze(1)).to(device)
    ids = torch.arange(8) // 4
    expected = definition.token_signals(logits, token_ids, mask, ids, moments=True)
    try:
        options = {"temperature": 1.0, "reference": "group", "moments": True}
        found = module.kernel_signals(logits, token_ids, mask, tuple(ids.tolist()), **options)
        for name in expected.__dataclass_fields__:
            error = float((getattr(found, name) - getattr(expected, name)).abs().max())
            if not error <= 1e-4:
                return f"{name} is off by {error:.3g}"
    except Exception as error:  # whatever a compiler or driver raises, the definition still works
        return f"{type(error).__name__}: {error}"
    return ""


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

    Formulas, arguments, results and errors: `monitor.signals.definition.token_signals`. On a CUDA device
    `monitor.signals.group_kernel` computes the same from one streaming read of the logits, in their own dtype. Pass
    group_ids on the CPU: fetching them from the device costs a host sync.
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
        group_ids,
        temperature=temperature,
        reference=reference,
        moments=moments,
    )
