"""Several processes that train one run. Each rank has whole groups; denominators and gradients are summed over all.

`torchrun --nproc-per-node N --no-python -- rlvr train ...` or `accelerate launch` starts them. A single process is a
world of one, in which every method returns its argument. All ranks must call collectives in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_TIMEOUT = timedelta(minutes=30)  # long, so that a slow reward function on one rank does not end the others


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run. rank counts from 0."""

    rank: int = 0
    world: int = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, a new tensor of the same shape."""
        if self.world == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in the order of ranks. Every rank must pass the same number of rows."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        """True on all ranks if the flag is set on any rank, so that all of them act alike."""
        if self.world == 1:
            return flag
        answer = torch.tensor([int(flag)], device=_device())
        dist.all_reduce(answer, dist.ReduceOp.MAX)
        return bool(answer.item())

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums gradients over all ranks in place, in one collective. Sharded gradients are already summed."""
        if self.world == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None and not hasattr(p, "full_tensor")]
        if grads:
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat)
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))


def join_ranks() -> Ranks:
    """Joins the processes that torchrun or accelerate started (WORLD_SIZE, RANK, LOCAL_RANK); else world is 1."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave_ranks(ranks: Ranks) -> None:
    """Leaves what `join_ranks` joined. A process group of one process is another's: vLLM's, which it ends itself."""
    if ranks.world > 1:
        dist.destroy_process_group()


def shard(root: nn.Module, layers: nn.ModuleList, ranks: Ranks, *, half_layers: bool = False) -> None:
    """Spreads parameters, gradients and optimizer state of `root` over the ranks (FSDP2). Layers are gathered singly.

    The values are those of rank 0; those of other ranks may be on the meta device. They travel one tensor at a time, so
    a device never holds more than its part and the largest tensor. Gradients are summed, not averaged, because the
    loss's denominators are those of the whole step.

    half_layers: layers are gathered in bfloat16, for passes under autocast. Inputs are not cast, so sums between layers
    stay float32; nor is what lies outside of layers, because the head adds up its gradient over slabs.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    values = dict(root.named_parameters()) if ranks.rank == 0 else {}
    _forget_values(root)
    mesh = init_device_mesh(_device().type, (dist.get_world_size(),))
    gathered = MixedPrecisionPolicy()
    if half_layers:
        gathered = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=gathered)
    fully_shard(root, mesh=mesh)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _take_values(root, values, ranks)


def _forget_values(root: nn.Module) -> None:
    """Puts every parameter on the meta device. Tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in root.modules():
        for name, p in module.named_parameters(recurse=False):
            made.setdefault(id(p), nn.Parameter(p.detach().to("meta"), p.requires_grad))
            setattr(module, name, made[id(p)])


@torch.no_grad()
def _take_values(root: nn.Module, values: dict[str, nn.Parameter], ranks: Ranks) -> None:
    """Gives parameters and buffers of `root`, sharded and without values, those of rank 0, and empties `values`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    names = [(name, tuple(p.shape)) for name, p in root.named_parameters()]
    if names != ranks.share(names):
        raise RuntimeError("Rank 0 has read another model than the others have made: names or shapes differ.")
    device, made = _device(), dict[int, nn.Parameter]()
    for name, p in root.named_parameters():
        assert isinstance(p, DTensor)
        value = torch.empty(p.shape, dtype=p.dtype, device=device)
        if ranks.rank == 0:
            value.copy_(values.pop(name))
        made[id(p)] = nn.Parameter(distribute_tensor(value, p.device_mesh, p.placements), p.requires_grad)
    every = {name: made[id(p)] for name, p in root.named_parameters(remove_duplicate=False)}
    root.load_state_dict(every, strict=False, assign=True)
    for module in root.modules():
        for name, buffer in module.named_buffers(recurse=False):
            value = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
            if ranks.rank == 0:
                value.copy_(buffer)
            dist.broadcast(value, src=0)
            module._buffers[name] = value


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, for which all ranks must call this; any other tensor comes back as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
