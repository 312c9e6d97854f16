"""The `paged` backend: transformers' continuous batching, which starts a waiting row wherever one has ended.

It runs on the policy's sampler copy, because its manager sets evaluation mode, changes the attention implementation and
ignores autocast. It draws from torch's global generator: we seed that from our own, and restore its state afterwards.
All requests are queued before it starts, so that batches do not depend on timing. A group's prompt is run once, up to
its last token, and the rollouts then share its blocks (`num_return_sequences`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from trainer.errors import NonFiniteError
from trainer.policy.policy import Policy
from trainer.rollout.generate import Drawn
from trainer.rollout.sampler_copy import sampler_copy_of
from trainer.rollout.truncation import Truncation

PAGE = 32  # tokens in a page on CPU, where a cache of whole 256-token pages would be mostly empty


def paged(
    policy: Policy,
    prompts: list[list[int]],
    *,
    limit: int,
    temperature: float,
    generator: torch.Generator,
    max_batch: int,
    truncation: Truncation = Truncation(),  # noqa: B008, frozen
) -> Drawn:
    """Draws a response for each prompt, at most `max_batch` at a time. Neighbours with equal prompts share its blocks.

    Rows go on after a stop string, which transformers does not look for here; `sample` cuts them.

    Raises NonFiniteError if the policy's logits are not finite, and RuntimeError with the reason if transformers fails.
    """
    group = _group_size(prompts)
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
    settings = _generation(policy, temperature, limit, group, truncation)
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        manager = sampler_copy_of(policy, "all").model.init_continuous_batching(
            generation_config=settings, continuous_batching_config=_batching(policy, prompts, limit, max_batch, seed)
        )
        names = manager.add_requests(prompts[::group], max_new_tokens=limit)
        found = _run(manager, len(prompts))
    return _drawn(policy, found, [row for name in names for row in _rows_of(name, group)], limit)


def _group_size(prompts: list[list[int]]) -> int:
    """The largest number that divides the length of every run of equal prompts; 1 if some prompt has only one token."""
    size = next((i for i, ids in enumerate(prompts) if ids != prompts[0]), len(prompts))
    whole = len(prompts) % size == 0 and all(ids == prompts[i - i % size] for i, ids in enumerate(prompts))
    return size if whole and min(map(len, prompts)) > 1 else 1


def _rows_of(name: str, group: int) -> list[str]:
    return [name, *(f"{name}__child#{i}" for i in range(group - 1))]


def _generation(policy: Policy, temperature: float, limit: int, group: int, truncation: Truncation) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=truncation.top_k,  # 0 is the whole distribution: transformers' default is the top 50
        top_p=truncation.top_p,
        min_p=truncation.min_p or None,
        max_new_tokens=limit,
        num_return_sequences=group,
        eos_token_id=policy.end_ids,
        pad_token_id=policy.pad_id,
    )


def _batching(policy: Policy, prompts: list[list[int]], limit: int, max_batch: int, seed: int) -> Any:
    from transformers import ContinuousBatchingConfig

    rows = min(max_batch, len(prompts))
    settings: dict[str, Any] = {"max_requests_per_batch": rows, "return_logprobs": True, "seed": seed}
    if policy.device.type == "cpu":  # without this it would plan for 60 % of the machine's memory
        longest = max(map(len, prompts)) + limit
        blocks = {"num_blocks": rows * (longest // PAGE + 2), "max_batch_tokens": max(256, rows)}
        named = {field.name for field in fields(ContinuousBatchingConfig)}
        settings |= blocks | {"page_size" if "page_size" in named else "block_size": PAGE}  # as 5.17 calls it
    return ContinuousBatchingConfig(**settings)


def _run(manager: Any, expected: int) -> dict[str, Any]:
    """Results by request. When this returns, the manager's thread has ended and its memory is free."""
    found: dict[str, Any] = {}
    manager.start()
    try:
        while len(found) < expected:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                break
            if result is not None and (result.is_finished() or result.error is not None):
                found[result.request_id] = result
    finally:
        manager.stop(block=True)
        manager.destroy()
    errors = [str(result.error) for result in found.values() if result.error is not None]
    if errors and "probability tensor" in errors[0]:
        raise NonFiniteError("The policy's logits are not finite, so no token can be sampled.")
    if errors or len(found) < expected:
        raise RuntimeError(
            f"transformers' continuous batching ended {len(found) - len(errors)} of {expected} rollouts: "
            f"{errors[0] if errors else 'its thread stopped'}. Set rollout.backend to generate."
        )
    return found


def _drawn(policy: Policy, found: Mapping[str, Any], rows: list[str], limit: int) -> Drawn:
    tokens = torch.full((len(rows), limit), policy.pad_id)
    logprobs, ended = torch.zeros(len(rows), limit), torch.ones(len(rows), limit, dtype=torch.bool)
    for i, name in enumerate(rows):
        ids = found[name].generated_tokens
        tokens[i, : len(ids)], ended[i, : len(ids)] = torch.tensor(ids), False
        logprobs[i, : len(ids)] = torch.tensor(found[name].logprobs)
    return Drawn(tokens.to(policy.device), logprobs.to(policy.device), ended.to(policy.device))
