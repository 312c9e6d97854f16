"""AdamW with float32 moments, or with moments of 8 bits (bitsandbytes, which only this file imports).

The 8-bit one computes an update in float32 and rounds the moments afterwards. A block of BLOCK numbers shares one
scale, the largest magnitude in it; a number is then stored as the nearest of 256 values, which lie closer together the
smaller they are (arXiv 2110.02861). Tensors of fewer than SMALLEST numbers keep float32 moments.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monitor.extras import require_extras
from trainer.config import OptimConfig

BLOCK = 256
SMALLEST = 4096
_MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}  # the 256 values of each moment: the same for all tensors and runs


def check_usable(config: OptimConfig) -> None:
    """Raises MissingPackageError, before anything is loaded, if a package of the optimizer is not installed."""
    if config.kind == "adamw_8bit":
        require_extras("optim.kind adamw_8bit", "bitsandbytes")


def make_optimizer(config: OptimConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of these parameters. Both kinds decay weights apart from the moments."""
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # it warns of kernels that are not used here
    from bitsandbytes.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return made


def moment_bytes(config: OptimConfig, numbers: int) -> int:
    """Bytes of the moments of a tensor of so many numbers.

    Example: of 5,000 numbers AdamW keeps 2 x 4 x 5,000 = 40,000 bytes, adamw_8bit 2 x (5,000 + 4 x 20) = 10,160.
    """
    if config.kind == "adamw" or numbers < SMALLEST:
        return 8 * numbers
    return 2 * (numbers + 4 * -(-numbers // BLOCK))


def moment_shapes(moment: str, parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of a moment of these parameters: their own. Scales (absmax1, absmax2): one a block, none of small ones."""
    if not moment.startswith("absmax"):
        return {name: tuple(p.shape) for name, p in parameters.items()}
    return {name: (-(-p.numel() // BLOCK),) for name, p in parameters.items() if p.numel() >= SMALLEST}


def moments_8bit(optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """The state of an 8-bit optimizer by parameter and moment, but for the maps, which are the same in all runs."""
    return {
        name: {key: torch.as_tensor(value) for key, value in optimizer.state[p].items() if key not in _MAPS}
        for name, p in trained.items()
        if p in optimizer.state
    }


def load_moments_8bit(
    optimizer: Any, trained: Mapping[str, nn.Parameter], moments: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Puts a copy of what `moments_8bit` gave in the place of the optimizer's state."""
    optimizer.state.clear()
    for name, of in moments.items():
        device = trained[name].device
        state: dict[str, Any] = {key: value.to(device, copy=True) for key, value in of.items()}
        state["step"] = int(of["step"])
        if state["state1"].dtype == torch.uint8:
            state |= {key: optimizer.name2qmap[kind].to(device) for key, kind in _MAPS.items()}
        optimizer.state[trained[name]] = state
