"""The processes that train together, as accelerate started them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Ranks:
    """This process among those of the trainer. All must call the methods in the same order; one alone needs none."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.rank, self.world = int(accelerator.process_index), int(accelerator.num_processes)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks."""
        return tensor if self.world == 1 else self._accelerator.reduce(tensor, reduction="sum")

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in the order of ranks. Every rank must pass the same shape."""
        return rows if self.world == 1 else self._accelerator.gather(rows.contiguous())

    def largest(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.world == 1:
            return value
        return int(self.gather(torch.tensor([value], device=self._accelerator.device)).max())

    def all(self, flag: bool) -> bool:
        """True on all ranks if the flag is set on every rank, so that all of them act alike."""
        return flag if self.world == 1 else self.largest(int(not flag)) == 0

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        from accelerate.utils import broadcast_object_list

        box = [value]
        broadcast_object_list(box, from_process=0)
        return box[0]
