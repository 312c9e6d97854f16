"""The policy: a Hugging Face causal language model. Only this file sees its logits [..., V].

`hidden` runs the model's body. `project` runs its head on a slab: the hidden states of some positions. Signals and
log-probabilities are computed slab by slab, so that at most SLAB_ELEMENTS logits (CUDA_SLAB_ELEMENTS for signals on a
CUDA device) exist at a time, whatever the vocabulary and the response length.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monitor.signals import TokenSignals
from monitor.signals.slabs import slab_signals
from trainer.config import LoraConfig, RolloutConfig
from trainer.errors import ModelError
from trainer.flow import Rollouts, TokenBatch
from trainer.policy.endings import StopStrings, chat_template, stop_tokens, turn_end_id
from trainer.policy.gguf import unpacked
from trainer.policy.lora import merged_copy, with_adapters
from trainer.policy.micro_batches import MicroBatches
from trainer.policy.sources import ModelSource
from trainer.runtime.disk import write_whole
from trainer.runtime.ranks import Ranks, shard, whole

SLAB_ELEMENTS = 1 << 24  # logits in one slab: 64 MiB in float32
LENGTH_PARTS = 4  # passes over rows of like length on a CPU; more save little padding and cost calls
CUDA_SLAB_ELEMENTS = 1 << 28  # 512 MiB in bf16, which the kernel reads as it is: 1,766 positions of 151,936 fill a GPU


class _Slab:
    """Hides a slab from FSDP, which seeks inputs with gradient and would reduce the head's gradient at each call."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


class _Halves(nn.Module):
    """A language model whose body and head are called separately but through one module, so FSDP's hooks see both."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, slab: _Slab | None = None, **inputs: Any) -> Any:
        if slab is not None:
            return self.model.get_output_embeddings()(slab.states)
        return self.model.get_decoder()(**inputs)


class Reference(Protocol):
    """What the KL needs of the policy that it is measured from."""

    def hidden(self, batch: TokenBatch) -> Tensor: ...
    def logprobs(self, hidden: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]: ...


class WithoutAdapters:
    """The policy that training with adapters started from: the same module with its adapters switched off."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.logprobs = policy.logprobs  # the head has no adapters

    def hidden(self, batch: TokenBatch) -> Tensor:
        with self._policy.model.disable_adapter():
            return self._policy.hidden(batch)


class Policy:
    """Model and tokenizer on one device. On CUDA, bf16 autocast runs over float32 weights."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, *, to_spread: bool = False) -> None:
        """to_spread: the weights stay where they are, until `shard` brings this rank's part of them to the device."""
        self.model, self.tokenizer, self.device = model if to_spread else model.to(device), tokenizer, device
        self.vocabulary: int = model.get_output_embeddings().weight.shape[0]
        self._halves = _Halves(self.model)
        self.in_step, self._half_layers = Ranks(), False
        self.sampler_copies: dict[str, Any] = {}  # filled by trainer.rollout.sampler_copy when a sampler needs one
        self.context = int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)
        self.end_ids, self.pad_id = _special_ids(model, tokenizer)
        self.stop_strings: StopStrings | None = None
        self._check_head()

    @classmethod
    def load(
        cls,
        source: ModelSource,
        device: torch.device | None = None,
        lora: LoraConfig | None = None,
        spread: Ranks = Ranks(),  # noqa: B008, frozen
    ) -> Policy:
        """Loads the weights in float32 and the tokenizer. device: by default CUDA if there is one. lora: adapters.

        spread: of several ranks, over which `shard` will spread the weights, rank 0 alone reads them, into the host's
        memory, and the others make a model without values.

        Raises ModelError, OSError or ValueError if they cannot be read.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        path = unpacked(source) if source.gguf_file else source.path
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            if spread.rank:
                model = _without_values(path)
            else:
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        except (SafetensorError, TypeError, LookupError, AttributeError) as error:  # how transformers meets damage
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ModelError(f"Model {str(path)!r} cannot be loaded: {why}. Is a file of it damaged?") from error
        if lora and lora.rank:
            with torch.device("meta") if spread.rank else contextlib.nullcontext():
                model = with_adapters(model, lora)
        return cls(model, tokenizer, device or pick_device(), to_spread=spread.world > 1)

    def converse(self, rollout: RolloutConfig) -> Policy:
        """Takes the chat template and the ends of responses that the settings name; returns the policy itself.

        A saved policy carries that template. Raises ConfigError for a template or a stop that cannot be used.
        """
        self.tokenizer.chat_template = chat_template(rollout.chat_template, self.tokenizer.chat_template)
        turn_end = turn_end_id(self.tokenizer)
        ids, strings = stop_tokens(self.tokenizer, self.vocabulary, rollout.stop)
        ends = [*self.end_ids, *([] if turn_end is None else [turn_end]), *ids]
        self.end_ids = list(dict.fromkeys(ends))
        self.stop_strings = StopStrings(self.tokenizer, strings) if strings else None
        return self

    def checkpoint_layers(self) -> None:
        """From now on a decoder layer keeps its input alone for the backward pass, which computes the rest again.

        Gradients stay the same. It takes a third more time in the update: one more forward pass.
        """
        for layer in self.model.get_decoder().layers:
            layer.forward = MethodType(_checkpointed, layer)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda" or self._half_layers)

    def shard(self, ranks: Ranks, *, half_layers: bool = False) -> None:
        """Spreads rank 0's parameters over the ranks (FSDP2). From then on all run every forward pass together.

        half_layers: decoder layers are gathered in bfloat16, and autocast runs on a CPU too.
        """
        self.in_step, self._half_layers = ranks, half_layers
        shard(self._halves, self.model.get_decoder().layers, ranks, half_layers=half_layers)

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name. Tied ones appear once; of sharded ones, this rank's shard."""
        self._reshard()
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _reshard(self) -> None:
        """Shards the root again. After a pass without gradient FSDP leaves it gathered, unlike the optimizer's copy."""
        if self.in_step.world > 1:
            self._halves.reshard()  # type: ignore[operator]

    def body(self, **inputs: Any) -> Any:
        """The model without its head: last_hidden_state and, if asked for, the key-value cache."""
        return self._halves(**inputs)

    def hidden(self, batch: TokenBatch | Rollouts, *, full_precision: bool = False) -> Tensor:
        """Hidden states that predict each response position, [N, T, D]: those of sequence column t - 1 predict t.

        Columns after a row's response hold values without meaning.
        """
        with contextlib.nullcontext() if full_precision else self.autocast():
            if self.device.type == "cpu" and self.in_step.world == 1:
                return self._hidden_by_length(batch)
            return self.padded_hidden(batch.input_ids, batch.attention_mask, batch.mask.shape[1])

    def padded_hidden(self, input_ids: Tensor, attention_mask: Tensor, width: int) -> Tensor:
        """Hidden states that predict the last `width` columns, [rows, width, D], in one pass."""
        attention = attention_mask.long()
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        found = self.body(input_ids=input_ids, attention_mask=attention, position_ids=positions, use_cache=False)
        states: Tensor = found.last_hidden_state
        return states[:, -width - 1 : -1]

    def _hidden_by_length(self, batch: TokenBatch | Rollouts) -> Tensor:
        """The same in LENGTH_PARTS passes of rows of like length, each cut after its longest response.

        A CPU computes padding as slowly as tokens. On CUDA the host would have to wait for the lengths.
        """
        n, width = batch.mask.shape
        lengths = batch.mask.sum(1)
        order = lengths.argsort()
        longest = lengths[order].tolist()
        prompt, parts = batch.input_ids.shape[1] - width, []
        for rows in order.split(-(-n // LENGTH_PARTS)):
            longest, own = longest[len(rows) :], max(1, longest[len(rows) - 1])
            columns = slice(0, prompt + own)
            states = self.padded_hidden(batch.input_ids[rows, columns], batch.attention_mask[rows, columns], own)
            parts.append(nn.functional.pad(states, (0, 0, 0, width - own)))
        return torch.cat(parts)[order.argsort()]

    @torch.no_grad()
    def states(self, batch: TokenBatch, micro: MicroBatches, *, full_precision: bool = False) -> Tensor:
        """`hidden` without gradient, in passes through the model within the limits of `micro`."""
        if micro.hold(batch):
            return self.hidden(batch, full_precision=full_precision)
        found = None
        for part in micro.split(batch):
            states = self.hidden(part.batch, full_precision=full_precision)
            if found is None:
                found = states.new_zeros(*batch.mask.shape, states.shape[-1])
            found[part.rows, : states.shape[1]] = states
        assert found is not None
        return found

    def project(self, slab: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        with self.autocast():
            return self._halves(_Slab(slab))

    @torch.no_grad()
    def signals(self, hidden: Tensor, batch: TokenBatch, temperature: float, reference: str = "group") -> TokenSignals:
        """TokenSignals [N, T] of a batch of whole groups, slab by slab; hidden [N, T, D].

        Extra memory, whatever the response length, is that of one slab of N x span x V logits, with span >= 1 the most
        positions within the limit. On a CUDA device a logit takes 2 bytes (bf16 from autocast, 512 MiB in all), the
        kernel's sums add 0.2 %, and the head's weights cast once add 2 D V bytes. On the CPU a logit takes 4 bytes
        (64 MiB in all), and `monitor.signals.definition` needs scratch memory.
        """
        limit = CUDA_SLAB_ELEMENTS if hidden.is_cuda else SLAB_ELEMENTS
        with self.autocast():  # around all slabs: the head's weights are cast once
            return slab_signals(
                hidden,
                self.project,
                limit // self.vocabulary,
                batch.token_ids,
                batch.mask,
                batch.group_ids,
                temperature=temperature,
                reference=reference,  # type: ignore[arg-type]
            )

    @torch.no_grad()
    def logits_at(
        self, batch: TokenBatch, rows: Tensor, columns: Tensor, temperature: float, micro: MicroBatches
    ) -> Tensor:
        """Logits / temperature of M response positions, float32 [M, V], without autocast. The caller bounds M."""
        states = self.states(batch, micro, full_precision=True)[rows, columns]
        return self._halves(_Slab(states)).float() / temperature

    def logprobs(self, hidden: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(logprob, entropy) with gradient of M positions, nats: hidden [M, D], token_ids [M] -> float32 [M] each.

        If more than one slab is needed, the backward pass computes their logits again.
        """
        span = max(1, SLAB_ELEMENTS // self.vocabulary)
        if len(hidden) <= span:
            return self._slab_logprobs(hidden, token_ids, temperature)
        parts = [
            checkpoint(self._slab_logprobs, h, ids, temperature, use_reentrant=False)
            for h, ids in zip(hidden.split(span), token_ids.split(span), strict=True)
        ]
        logprob, entropy = zip(*parts, strict=True)
        return torch.cat(logprob), torch.cat(entropy)

    def _slab_logprobs(self, hidden: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(self.project(hidden).float() / temperature, dim=-1)
        entropy = -(logp.exp() * logp.clamp(min=-104)).sum(-1)  # 0 * -inf would be NaN; e^-104 is 0 in float32
        return logp.gather(1, token_ids.unsqueeze(1)).squeeze(1), entropy

    def save(self, folder: Path) -> None:
        """The policy as a normal Hugging Face folder: AutoModelForCausalLM.from_pretrained(folder) loads it.

        All ranks must call this; rank 0 writes. An older policy in the folder is replaced once the new one is whole.
        Raises OSError, on rank 0, if the disk refuses; the older policy then stays.
        """
        self._reshard()
        state = {name: whole(value) for name, value in self.model.state_dict().items()}
        if int(os.environ.get("RANK", "0")) == 0:
            merged = merged_copy(self.model) if hasattr(self.model, "merge_and_unload") else None

            def write(half: Path) -> None:
                (merged or self.model).save_pretrained(half, state_dict=None if merged else state)
                self.tokenizer.save_pretrained(half)

            write_whole(folder, write)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Refuses a model whose logits are not head(body), e.g. scaled or soft-capped ones: it would train wrongly."""
        place = next(self.model.parameters()).device
        if place.type == "meta":  # rank 0 looks at it
            return
        ids = torch.tensor([[self.pad_id, self.end_ids[0]]], device=place)
        with self.autocast():
            expected = self.model(input_ids=ids).logits.float()
            ours = self.project(self.body(input_ids=ids).last_hidden_state).float()
        error = torch.where(expected == ours, 0.0, expected - ours).abs().max()  # -inf in both differs by 0
        if not error < 1e-2 * expected.nan_to_num(neginf=0.0).abs().max().clamp(min=1.0):
            raise ValueError(
                f"Model {type(self.model).__name__} changes its logits after the output embedding (largest difference "
                f"{error:.3g}); expected logits = head(body(ids)). Use a model without logit scaling or soft-capping."
            )


def _checkpointed(layer: nn.Module, *inputs: Any, **named: Any) -> Any:
    """A layer's forward pass; type(layer) is the layer's own class, or FSDP's beneath which that class stays."""
    if not torch.is_grad_enabled():
        return type(layer).forward(layer, *inputs, **named)
    own = partial(type(layer).forward, layer)
    return checkpoint(own, *inputs, use_reentrant=False, preserve_rng_state=False, **named)  # nothing in it is random


def pick_device() -> torch.device:
    """The CUDA device of this process, which `join_ranks` chose, or the CPU without CUDA."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _without_values(path: str | Path) -> Any:
    """The model that from_pretrained(path) would load, in float32, but on the meta device: no weights are read."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    with contextlib.suppress(OSError):  # it has none: that of the model's configuration stays
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def _special_ids(model: Any, tokenizer: Any) -> tuple[list[int], int]:
    """(end token ids, pad id): from the generation config, else the tokenizer."""
    end = getattr(model.generation_config, "eos_token_id", None)
    ends = end if isinstance(end, list) else [] if end is None else [end]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends = [*ends, tokenizer.eos_token_id]
    if not ends:
        raise ValueError(
            "The model has no end token: neither generation_config.eos_token_id nor tokenizer.eos_token_id is set. "
            "Set one of them in the model's folder, or every response would be truncated."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    return ends, pad
