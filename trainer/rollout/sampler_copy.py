"""A copy of the policy's module for sampling, so that samplers change nothing in the module that is trained.

Samplers set evaluation mode, change the attention implementation and cast weights. On CPU the copy shares all
parameters. On CUDA it has bfloat16 parameters of its own, 2 bytes each, which are filled before each use. Between uses
they hold no memory, so that the update can have it. Only the storage goes: compiled steps know the tensors themselves.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trainer.policy.policy import Policy


class SamplerCopy:
    """A policy's model for sampling. `model`: the copied module; `memory`: what a sampler keeps between its calls.

    cast: which weights the copy holds in bfloat16.
        "linear": those of linear layers. Under autocast the copy computes what the policy does, bit for bit on the same
            shapes, without casting weights at each token.
        "all": every weight, for a sampler without autocast. Sums between layers are then bfloat16 too
            (benchmarks/results/rollout_bfloat16.csv).
        "none": no weight; all are shared with the policy.
    """

    def __init__(self, policy: Policy, cast: str) -> None:
        trained = policy.model
        original = trained.get_base_model() if hasattr(trained, "get_base_model") else trained  # with its adapters
        self.model: Any = copy.deepcopy(original, {id(p): p for p in original.parameters()}).eval()
        self.memory: dict[Any, Any] = {}
        self._cast: dict[nn.Parameter, nn.Parameter] = {}  # the policy's parameter -> the copy's
        for module in self.model.modules():  # buffers are never cast: rounded rotary frequencies confuse positions
            if cast == "all" or (cast == "linear" and isinstance(module, nn.Linear)):
                for name, weight in list(module.named_parameters(recurse=False)):
                    if weight not in self._cast:
                        self._cast[weight] = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
                    setattr(module, name, self._cast[weight])

    @torch.no_grad()
    def refresh(self) -> SamplerCopy:
        """Copies the policy's present weights into the copy, in place."""
        for theirs, mine in self._cast.items():
            hold_storage(mine)
            mine.copy_(theirs)
        return self

    def release(self) -> None:
        """Gives back the memory of the cast weights and of the caches, until `refresh` and the caches' next start."""
        for mine in self._cast.values():
            mine.untyped_storage().resize_(0)
        for kept in self.memory.values():
            kept.release()

    def logits(self, **inputs: Any) -> tuple[Tensor, Any]:
        """(logits [B, V] after the last column, key-value cache)."""
        out = self.model.get_decoder()(**inputs, use_cache=True)
        return self.model.get_output_embeddings()(out.last_hidden_state[:, -1]), out.past_key_values


def hold_storage(tensor: Tensor) -> bool:
    """Gives a tensor its memory back after `untyped_storage().resize_(0)`. False if it has it; values are undefined."""
    storage, needed = tensor.untyped_storage(), tensor.numel() * tensor.element_size()
    if storage.size() >= needed:
        return False
    storage.resize_(needed)
    return True


def release_samplers(policy: Policy) -> None:
    """Called when sampling ends: nothing of it takes memory from the update."""
    for copied in policy.sampler_copies.values():
        copied.release()


def sampler_copy_of(policy: Policy, cast: str) -> SamplerCopy:
    """The policy's sampler copy with its present weights. The first call makes it. On CPU nothing is cast."""
    cast = cast if policy.device.type == "cuda" else "none"
    if cast not in policy.sampler_copies:
        policy.sampler_copies[cast] = SamplerCopy(policy, cast)
    found: SamplerCopy = policy.sampler_copies[cast]
    return found.refresh()
