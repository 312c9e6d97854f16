"""Sampling: groups of responses from the policy, reproducible from a generator, by one of three backends.

`generate` (generate.py) draws a token for all rows at a time; `paged` (paged.py) is transformers' continuous batching;
`vllm` (vllm_engine.py) is an engine of vLLM.

The same seed gives the same tokens on the same machine, with the same number of threads, backend, dtype and shapes.
More is not promised. Attention sums in an order that depends on how many queries and keys it is given. So the sampler's
log-probabilities differ from the trainer's by rounding (float32 about 1e-6 nats, bfloat16 about 1e-2), and another
backend or batch draws another token wherever a random number falls into that gap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.flow import Rollouts
from trainer.policy.policy import Policy
from trainer.rollout.generate import Drawn, generate
from trainer.rollout.paged import paged
from trainer.rollout.sampler_copy import release_samplers
from trainer.rollout.truncation import Truncation
from trainer.rollout.vllm_engine import vllm_rollouts

QUEUED = {"paged": paged, "vllm": vllm_rollouts}  # these take all prompts, and let rows wait for a place themselves
PAGED_FROM_ROWS, PAGED_FROM_TOKENS = 32, 512  # below these, too few places free up early to repay the cost of paging


def choose_backend(policy: Policy, rows: int, max_new_tokens: int, backend: str = "auto") -> str:
    """The backend asked for, or for `auto` the one of `generate` and `paged` that suits the device and the size.

    Raises ValueError if `paged` is asked for with a sharded policy.
    """
    sharded = policy.in_step.world > 1
    if backend == "paged" and sharded:
        raise ValueError(
            "rollout.backend is 'paged' with shard true: sharded ranks run every pass together, and the paged backend "
            "cannot. Set it to generate."
        )
    return auto_backend(policy, rows, max_new_tokens)[0] if backend == "auto" else backend


def auto_backend(policy: Policy, rows: int, max_new_tokens: int) -> tuple[str, str]:
    """(backend, why) that `auto` means. It never means vllm, which is another package's arithmetic: that one asks for.

    It is `generate` on CPU, where paging was slower at both sizes measured, and for a sharded policy, whose ranks must
    run every pass together. On CUDA it is `paged` for many long responses if flash attention is installed. Without
    flash attention, paging computes each row's attention to all other rows and masks it.
    """
    if policy.device.type != "cuda":
        return "generate", "on a CPU it was faster than paged"
    if policy.in_step.world > 1:
        return "generate", "a sharded policy cannot be paged"
    if rows < PAGED_FROM_ROWS or max_new_tokens < PAGED_FROM_TOKENS:
        large = f"{PAGED_FROM_ROWS} rollouts of {PAGED_FROM_TOKENS} tokens"
        return "generate", f"{rows} rollouts of {max_new_tokens} tokens are too few for paged (from {large})"
    if not _flash_attention():
        return "generate", "paged needs flash attention, which is not installed"
    return "paged", f"{rows} rollouts of {max_new_tokens} tokens leave places that others can take"


def _flash_attention() -> bool:
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    return is_flash_attn_2_available() or is_flash_attn_3_available()


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    max_batch: int = 1024,
    backend: str = "auto",
    truncation: Truncation = Truncation(),  # noqa: B008, frozen
) -> Rollouts:
    """Samples one response for each prompt: row i answers prompts[i]. To sample a group, repeat its prompt.

    A response ends with the first of the policy's end tokens, or with the token that completes a stop string.

    All ranks of a sharded policy sample together: each must pass the same number of rows, and samples until the rows of
    all ranks have ended. Raises NonFiniteError if the policy's logits are not finite.
    """
    width = max(len(ids) for ids in prompts)
    left, attention = _left_padded(policy, prompts, width)
    chosen = choose_backend(policy, len(prompts), max_new_tokens, backend)
    if chosen in QUEUED:
        drawn = QUEUED[chosen](
            policy,
            prompts,
            limit=max_new_tokens,
            temperature=temperature,
            generator=generator,
            max_batch=max_batch,
            truncation=truncation,
        )
        release_samplers(policy)
        return _assemble(left, attention, policy, drawn)
    was_training = policy.model.training
    policy.model.eval()
    parts = []
    for start in range(0, len(prompts), max_batch):
        places: dict[tuple[int, ...], int] = {}  # each distinct prompt of the chunk -> its row
        index = [places.setdefault(tuple(ids), len(places)) for ids in prompts[start : start + max_batch]]
        distinct, columns = _left_padded(policy, list(places), width)
        part = torch.tensor(index, device=policy.device)
        parts.append(
            generate(
                policy,
                distinct,
                columns,
                part,
                limit=max_new_tokens,
                temperature=temperature,
                generator=generator,
                truncation=truncation,
            )
        )
    policy.model.train(was_training)
    release_samplers(policy)
    return _assemble(left, attention, policy, Drawn(*map(torch.cat, zip(*parts, strict=True))))


def _left_padded(policy: Policy, prompts: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
    """(token ids, attention mask) [rows, width] on the policy's device."""
    left = torch.full((len(prompts), width), policy.pad_id, dtype=torch.long)
    for row, ids in enumerate(prompts):
        left[row, width - len(ids) :] = torch.tensor(ids)
    lengths = torch.tensor([len(ids) for ids in prompts])
    attention = torch.arange(width) >= (width - lengths).unsqueeze(1)
    return left.to(policy.device), attention.to(policy.device)


def _assemble(left: Tensor, attention: Tensor, policy: Policy, drawn: Drawn) -> Rollouts:
    mask = ~drawn.ended
    ends = torch.isin(drawn.tokens, torch.tensor(policy.end_ids, device=mask.device)) & mask
    if policy.stop_strings is not None:
        ids = [row[kept].tolist() for row, kept in zip(drawn.tokens.cpu(), mask.cpu(), strict=True)]
        lengths = [length or 0 for length in policy.stop_strings.lengths(ids)]  # 0: none
        last = torch.tensor(lengths, device=mask.device).unsqueeze(1) - 1
        columns = torch.arange(mask.shape[1], device=mask.device)
        ends |= columns == last
        mask = mask & ((columns <= last) | (last < 0))  # nothing after it
        drawn = Drawn(drawn.tokens.where(mask, policy.pad_id), drawn.logprobs.where(mask, 0.0), ~mask)
    width = int(mask.sum(1).max())
    mask, tokens, has_end = mask[:, :width], drawn.tokens[:, :width], (ends & mask).any(1)
    return Rollouts(
        input_ids=torch.cat([left, tokens], dim=1),
        attention_mask=torch.cat([attention, mask], dim=1),
        mask=mask,
        sampler_logprobs=drawn.logprobs[:, :width],
        truncated=~has_end,
    )
