"""The attention that response tokens receive, for the weighting `attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.flow import TokenBatch
from trainer.policy import policy as policy_module
from trainer.policy.policy import Policy


@torch.no_grad()
def attention_received(policy: Policy, batch: TokenBatch, micro_batch: int) -> Tensor:
    """Attention that each response token gets from the later tokens of its response, float32 [N, T], in [0, 1].

    a_t = 1 / (T_i - t) sum_{q > t} mean_h alpha_h[q, t], with alpha_h the last layer's attention; 0 for the last token.
    This takes a forward pass of its own with eager attention, in chunks of at most `micro_batch` rows. The attention
    [rows, heads, P + T, P + T] exists for one layer at a time. Raises ValueError for a model that returns no attention.
    """
    implementation = policy.model.config._attn_implementation
    layer = [m for m in policy.model.modules() if type(m).__name__.endswith("Attention")][-1]
    heads = policy.model.config.get_text_config().num_attention_heads
    seen: list[Tensor | None] = []
    hook = layer.register_forward_hook(
        lambda module, inputs, output: seen.append(output[1] if isinstance(output, tuple) else None)
    )
    policy.model.set_attn_implementation("eager")
    size = max(1, min(micro_batch, policy_module.SLAB_ELEMENTS // (heads * batch.input_ids.shape[1] ** 2)))
    found = []
    try:
        for start in range(0, len(batch), size):
            rows = batch.rows(start, start + size)
            with policy.autocast():
                policy.padded_hidden(rows.input_ids, rows.attention_mask, rows.mask.shape[1])
            found.append(_received(seen.pop(), rows.mask))
    finally:
        policy.model.set_attn_implementation(implementation)
        hook.remove()
    return torch.cat(found)


def _received(attention: Tensor | None, mask: Tensor) -> Tensor:
    """attention [n, heads, L, L] and mask [n, T] -> [n, T]: what each response token gets, averaged as above."""
    if attention is None:
        raise ValueError("The model returns no attention, which weighting.kind attention needs. Choose another kind.")
    width = mask.shape[1]
    paid = attention[:, :, -width:, -width:].float().mean(1).tril(-1) * mask.unsqueeze(2)
    later = (mask.sum(1, keepdim=True) - mask.long().cumsum(1)).clamp(min=1)
    return torch.where(mask, paid.sum(1) / later, 0.0)
