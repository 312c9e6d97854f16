"""The `generate` backend draws one token for all rows at a time, over the model's own key-value cache.

transformers' `generate` is not used: it takes no generator, returns log-probabilities only with every step's logits,
runs each copy of a prompt, and computes rows that have ended until all have. Here each distinct prompt is run once, and
all its rollouts share its keys and values. On CPU the cache grows, and rows that have ended are removed. On CUDA
launching kernels costs more than running them, so shapes are fixed and the step is compiled into a graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.errors import NonFiniteError
from trainer.policy.policy import Policy
from trainer.rollout.sampler_copy import hold_storage, sampler_copy_of
from trainer.rollout.truncation import Truncation

COMPACT_EVERY = 8  # tokens between checks of which rows have ended; each check is a host sync
COLUMNS = 256  # the fixed cache's length is a multiple of this, so that steps with other prompts reuse the same graph
SHAPES_KEPT = 3  # fixed caches with a compiled step: one for training, two for evaluation


class Drawn(NamedTuple):
    """Sampled rows, [B, limit] each: tokens int64, logprobs float32 (nats), ended bool, True after the end.

    logprobs are those of the distribution sampled from, so of `Truncation`'s q where it leaves tokens out.
    """

    tokens: Tensor
    logprobs: Tensor
    ended: Tensor


class Decoder(Protocol):
    """Runs the model for the sampler, over a key-value cache.

    `start` returns the logits [B, V] after each row's prompt; row i has the distinct prompt index[i]. `step` takes each
    row's token and returns the logits after it. `keep` continues with the given rows only, and returns True; a decoder
    that cannot drop rows keeps all and returns False.
    """

    def start(self, ids: Tensor, attention: Tensor, index: Tensor) -> Tensor: ...
    def step(self, token: Tensor) -> Tensor: ...
    def keep(self, rows: Tensor) -> bool: ...


def generate(
    policy: Policy,
    ids: Tensor,
    attention: Tensor,
    index: Tensor,
    *,
    limit: int,
    temperature: float,
    generator: torch.Generator,
    truncation: Truncation = Truncation(),  # noqa: B008, frozen
    decoder: Decoder | None = None,
) -> Drawn:
    """Draws a response of at most `limit` tokens for each entry of `index` int64 [B].

    index[i] is the row of its prompt in `ids` and `attention` [Q, P], left-padded. Stop strings are looked for every
    COMPACT_EVERY tokens, so a row may hold a few tokens after one; `sample` cuts them. Raises NonFiniteError if the
    policy's logits are not finite.
    """
    n, device = len(index), ids.device
    drawn = Drawn(
        torch.full((n, limit), policy.pad_id, device=device),
        torch.zeros(n, limit, device=device),
        torch.ones(n, limit, dtype=torch.bool, device=device),
    )
    ends = torch.tensor(policy.end_ids, device=device)
    rows = torch.arange(n, device=device)  # rows that are still in the batch
    done = torch.zeros(n, dtype=torch.bool, device=device)
    decoder = decoder or decoder_for(policy, n, ids.shape[1] + limit)
    with policy.autocast():  # around the whole loop, so that each weight is cast once and not at each token
        logits = decoder.start(ids, attention, index)
        for t in range(limit):
            logp = truncation(torch.log_softmax(logits.float() / temperature, dim=-1))
            token = _draw(logp, generator)
            drawn.tokens[rows, t] = torch.where(done, policy.pad_id, token)
            drawn.logprobs[rows, t] = torch.where(done, 0.0, logp.gather(1, token.unsqueeze(1)).squeeze(1))
            drawn.ended[rows, t] = done
            done = done | torch.isin(token, ends)
            if (t + 1) % COMPACT_EVERY == 0:
                if (stops := policy.stop_strings) is not None:
                    first = max(0, t + 1 - COMPACT_EVERY - stops.longest)
                    texts = drawn.tokens[rows, first : t + 1].tolist()
                    done = done | torch.tensor(stops.inside(texts), device=device)
                keep = (~done).nonzero().squeeze(1)
                if not policy.in_step.any(len(keep) > 0):
                    break
                if 0 < len(keep) < 0.75 * len(rows) and decoder.keep(keep):
                    rows, done, token = rows[keep], done[keep], token[keep]
            if t + 1 < limit:
                logits = decoder.step(token.unsqueeze(1))
    return drawn


def decoder_for(policy: Policy, rows: int, columns: int) -> Decoder:
    """Fixed shapes and a compiled step on CUDA; a growing cache on CPU and where fixed shapes cannot be."""
    # all ranks of a sharded policy must run its own modules together; the mask of fixed shapes works with SDPA only
    fixed = policy.device.type == "cuda" and policy.in_step.world == 1
    if not (fixed and policy.model.config._attn_implementation == "sdpa"):
        return GrowingCache(policy)
    columns = -(-columns // COLUMNS) * COLUMNS
    copied = sampler_copy_of(policy, "linear")
    found = copied.memory.pop((rows, columns), None)
    if found is None:
        found = FixedCache(copied.logits, _graphed(copied.logits), copied.model.config, rows, columns)
    if not found.possible:
        return GrowingCache(policy)
    while len(copied.memory) >= SHAPES_KEPT:
        copied.memory.pop(next(iter(copied.memory)))
    copied.memory[rows, columns] = found  # the newest is last
    return found


def _graphed(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step compiled into a CUDA graph, or as it is if that fails. Each call overwrites the last one's outputs."""
    chosen = torch.compile(step, mode="reduce-overhead", dynamic=False)

    def run(**inputs: Any) -> Any:
        nonlocal chosen
        torch.compiler.cudagraph_mark_step_begin()
        try:
            return chosen(**inputs)
        except torch._dynamo.exc.TorchDynamoException as error:  # no C compiler, or a model that it cannot take
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"The sampling step is not compiled and slower: {reason}", RuntimeWarning, stacklevel=2)
            chosen = step
            return step(**inputs)

    return run


class GrowingCache:
    """A key-value cache that grows by a column for each token, and from which rows can be removed."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def start(self, ids: Tensor, attention: Tensor, index: Tensor) -> Tensor:
        self._attention, self._position, self._cache = attention, positions(attention), None
        logits = self._logits(ids)
        if len(index) != len(ids):  # otherwise every prompt has one row, and the order is right
            self.keep(index)
            logits = logits[index]
        return logits

    def step(self, token: Tensor) -> Tensor:
        self._attention = torch.cat([self._attention, torch.ones_like(self._attention[:, :1])], dim=1)
        self._position = self._position[:, -1:] + 1
        return self._logits(token)

    def keep(self, rows: Tensor) -> bool:
        """A row may be named several times."""
        self._cache.batch_select_indices(rows)  # type: ignore[attr-defined]
        self._attention, self._position = self._attention[rows], self._position[rows]
        return True

    def _logits(self, ids: Tensor) -> Tensor:
        out = self._policy.body(
            input_ids=ids,
            attention_mask=self._attention.long(),
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = out.past_key_values
        return self._policy.project(out.last_hidden_state[:, -1])


class FixedCache:
    """A key-value cache of fixed shape [rows, columns], so that one compiled step serves all tokens. Rows never leave.

    possible: False for models in which some layer has no whole attention cache (sliding windows, linear attention).
    """

    def __init__(
        self, prefill: Callable[..., Any], step: Callable[..., Any], config: Any, rows: int, columns: int
    ) -> None:
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        class Layer(StaticLayer):
            """Rounds keys to the cache's dtype. Autocast leaves rotated keys in float32, and attention rounds them."""

            def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **named: Any) -> Any:
                return super().update(key_states.to(self.dtype), value_states.to(self.dtype), *rest, **named)

        self._prefill, self._step, self._rows, self._columns = prefill, step, rows, columns
        self._cache: Any = StaticCache(config=config, max_cache_len=columns)
        self.possible = all(type(layer) is StaticLayer for layer in self._cache.layers)
        self._cache.layers = [Layer(max_cache_len=columns) for _ in self._cache.layers]

    def start(self, ids: Tensor, attention: Tensor, index: Tensor) -> Tensor:
        position, width = positions(attention), ids.shape[1]
        logits, prompt = self._prefill(input_ids=ids, attention_mask=attention.long(), position_ids=position)
        for layer, found in zip(self._cache.layers, prompt.layers, strict=True):
            for tensor in (layer.keys, layer.values) if layer.is_initialized else ():
                if hold_storage(tensor):
                    tensor.zero_()  # what was there is masked, but a NaN would pass any mask
            if not layer.is_initialized:
                like = found.keys[:1].to(logits.dtype).expand(self._rows, -1, -1, -1)
                layer.lazy_initialization(like, found.values)
            layer.keys[:, :, :width], layer.values[:, :, :width] = found.keys[index], found.values[index]
            layer.cumulative_length.fill_(width)
        self._mask = torch.zeros(self._rows, 1, 1, self._columns, dtype=torch.bool, device=ids.device)
        self._mask[:, 0, 0, :width] = attention[index]
        self._column, self._position = width, position[index, -1:]
        return logits[index]

    def step(self, token: Tensor) -> Tensor:
        self._mask[..., self._column] = True
        self._column, self._position = self._column + 1, self._position + 1
        logits, _ = self._step(
            input_ids=token, attention_mask=self._mask, position_ids=self._position, past_key_values=self._cache
        )
        return logits

    def keep(self, rows: Tensor) -> bool:
        return False

    def release(self) -> None:
        """Gives back the memory of keys and values until the next start."""
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.keys.untyped_storage().resize_(0)
                layer.values.untyped_storage().resize_(0)


def positions(attention: Tensor) -> Tensor:
    """Position of each column of left-padded rows, from 0 at the first token."""
    return attention.long().cumsum(1).sub(1).clamp(min=0)


def _draw(logp: Tensor, generator: torch.Generator) -> Tensor:
    try:
        return torch.multinomial(logp.exp(), 1, generator=generator).squeeze(1)
    except RuntimeError as error:
        raise NonFiniteError("The policy's logits are not finite, so no token can be sampled.") from error
