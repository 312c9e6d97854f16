"""A second module over the policy's weights, for sampling: whatever a sampler switches, the trained module keeps.

Samplers set evaluation mode, change the attention implementation and cast weights. On the copy they may. On CPU it
shares all parameters; on CUDA it holds bfloat16 ones of its own, 2 bytes each, brought up to date before each use.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trainer.policy.policy import Policy


class SamplerCopy:
    """A policy's model for sampling. `model`: the copied module; `memory`: what a sampler keeps between its calls.

    cast: "linear" holds the weights of linear layers in bfloat16: under autocast it computes what the policy does, bit
    for bit on the same shapes, without casting them at each token. "all" holds every weight so, for a sampler without
    autocast; sums between layers are then bfloat16 too (benchmarks/results/rollout_bfloat16.csv). "none" shares all.
    """

    def __init__(self, policy: Policy, cast: str) -> None:
        trained = policy.model
        original = trained.get_base_model() if hasattr(trained, "get_base_model") else trained  # with its adapters
        self.model: Any = copy.deepcopy(original, {id(p): p for p in original.parameters()}).eval()
        self.memory: dict[Any, Any] = {}
        self._cast: dict[nn.Parameter, nn.Parameter] = {}  # the copy's by the policy's; buffers are never cast:
        for module in self.model.modules():  # rotary frequencies would lose positions
            if cast == "all" or (cast == "linear" and isinstance(module, nn.Linear)):
                for name, weight in list(module.named_parameters(recurse=False)):
                    if weight not in self._cast:
                        self._cast[weight] = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
                    setattr(module, name, self._cast[weight])

    @torch.no_grad()
    def refresh(self) -> SamplerCopy:
        """Takes over the policy's weights as they are now, in place."""
        for theirs, mine in self._cast.items():
            mine.copy_(theirs)
        return self

    def logits(self, **inputs: Any) -> tuple[Tensor, Any]:
        """(logits [B, V] after the last column, key-value cache)."""
        out = self.model.get_decoder()(**inputs, use_cache=True)
        return self.model.get_output_embeddings()(out.last_hidden_state[:, -1]), out.past_key_values


def sampler_copy_of(policy: Policy, cast: str) -> SamplerCopy:
    """The policy's sampler copy with its present weights, made at the first call; on CPU nothing is cast."""
    cast = cast if policy.device.type == "cuda" else "none"
    if cast not in policy.sampler_copies:
        policy.sampler_copies[cast] = SamplerCopy(policy, cast)
    found: SamplerCopy = policy.sampler_copies[cast]
    return found.refresh()
