"""Sampling: groups of responses from the policy, reproducible from a generator.

A plain loop over the model's own key-value cache instead of `generate`, which takes no generator and returns the
sampled tokens' log-probabilities only by keeping every step's logits. Finished rows leave the batch in passing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.policy import Policy
from trainer.tasks import Prompt
from trainer.tokens import Rollouts

COMPACT_EVERY = 8  # tokens between looks at which rows have ended: each look is a host sync


class NonFiniteError(RuntimeError):
    """Logits, loss or gradient became NaN or infinite; training cannot go on from these weights."""


def encode_prompts(policy: Policy, prompts: list[Prompt], system: str | None, max_new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt, through the chat template where the tokenizer has one.

    Raises ValueError for a prompt that leaves no room for `max_new_tokens` in the model's context.
    """
    tokenizer = policy.tokenizer
    encoded: list[list[int]] = []
    for prompt in prompts:
        if tokenizer.chat_template:
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": prompt.text})
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = tokenizer(f"{system}\n\n{prompt.text}" if system else prompt.text, verbose=False)["input_ids"]
        if not ids or len(ids) + max_new_tokens > policy.context:
            raise ValueError(
                f"Prompt {prompt.id!r} has {len(ids)} tokens and rollout.max_new_tokens is {max_new_tokens}, but the "
                f"model's context is {policy.context} tokens. Lower rollout.max_new_tokens or shorten the prompt."
            )
        encoded.append(ids)
    return encoded


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    max_batch: int = 1024,
) -> Rollouts:
    """One response for each prompt (repeat a prompt for a group); row i answers prompts[i].

    A sharded policy runs in step on all ranks: every rank has as many rows, and samples until all have ended.
    Raises NonFiniteError if the policy's logits are not finite.
    """
    width = max(len(ids) for ids in prompts)
    left = torch.full((len(prompts), width), policy.pad_id, dtype=torch.long)
    for row, ids in enumerate(prompts):
        left[row, width - len(ids) :] = torch.tensor(ids)
    lengths = torch.tensor([len(ids) for ids in prompts])
    attention = torch.arange(width) >= (width - lengths).unsqueeze(1)
    left, attention = left.to(policy.device), attention.to(policy.device)
    was_training = policy.model.training
    policy.model.eval()
    parts = [
        _sample_chunk(
            policy, left[i : i + max_batch], attention[i : i + max_batch], max_new_tokens, temperature, generator
        )
        for i in range(0, len(prompts), max_batch)
    ]
    policy.model.train(was_training)
    return _assemble(left, attention, policy.end_ids, *(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _sample_chunk(
    policy: Policy, ids: Tensor, attention: Tensor, limit: int, temperature: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [B, limit], logprobs [B, limit], ended [B, limit]); `ended` is True after the end token."""
    n = len(ids)
    tokens = torch.full((n, limit), policy.pad_id, device=ids.device)
    logprobs = torch.zeros(n, limit, device=ids.device)
    ended = torch.ones(n, limit, dtype=torch.bool, device=ids.device)
    ends = torch.tensor(policy.end_ids, device=ids.device)
    rows = torch.arange(n, device=ids.device)  # rows of the chunk that are still in the batch
    done = torch.zeros(n, dtype=torch.bool, device=ids.device)
    position = attention.long().cumsum(1).sub(1).clamp(min=0)
    cache = None
    for t in range(limit):
        with policy.autocast():
            out = policy.body(
                input_ids=ids,
                attention_mask=attention.long(),
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
        cache = out.past_key_values
        logp = torch.log_softmax(policy.project(out.last_hidden_state[:, -1]).float() / temperature, dim=-1)
        token = _draw(logp, generator)
        tokens[rows, t] = torch.where(done, policy.pad_id, token)
        logprobs[rows, t] = torch.where(done, 0.0, logp.gather(1, token.unsqueeze(1)).squeeze(1))
        ended[rows, t] = done
        done = done | torch.isin(token, ends)
        if (t + 1) % COMPACT_EVERY == 0:
            keep = (~done).nonzero().squeeze(1)
            if not policy.in_step.any(len(keep) > 0):
                break
            if 0 < len(keep) < 0.75 * len(rows):
                cache.batch_select_indices(keep)
                rows, done, token = rows[keep], done[keep], token[keep]
                attention, position = attention[keep], position[keep]
        ids = token.unsqueeze(1)
        attention = torch.cat([attention, torch.ones_like(attention[:, :1])], dim=1)
        position = position[:, -1:] + 1
    return tokens, logprobs, ended


def _draw(logp: Tensor, generator: torch.Generator) -> Tensor:
    try:
        return torch.multinomial(logp.exp(), 1, generator=generator).squeeze(1)
    except RuntimeError as error:
        raise NonFiniteError("The policy's logits are not finite, so no token can be sampled.") from error


def _assemble(
    left: Tensor, attention: Tensor, end_ids: list[int], tokens: Tensor, logprobs: Tensor, ended: Tensor
) -> Rollouts:
    mask = ~ended
    width = int(mask.sum(1).max())
    mask, tokens = mask[:, :width], tokens[:, :width]
    has_end = (torch.isin(tokens, torch.tensor(end_ids, device=tokens.device)) & mask).any(1)
    return Rollouts(
        input_ids=torch.cat([left, tokens], dim=1),
        attention_mask=torch.cat([attention, mask], dim=1),
        mask=mask,
        sampler_logprobs=logprobs[:, :width],
        truncated=~has_end,
    )
