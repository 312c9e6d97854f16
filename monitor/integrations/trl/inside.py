"""What we take from inside TRL: the methods that are wrapped, the policy's body and its head.

TRL never makes logits: its fused head goes from hidden states to log-probabilities. So hidden states are read where the
body returns them, and go through the same head here, with TRL's own scale, soft cap and dtypes (add_fused_lm_head in
trl/trainer/utils.py, version 1.16).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# methods of both trainers that are wrapped, with the parameters that must be there
METHODS = {
    "_generate_and_score_completions": ("inputs",),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_compute_loss": ("model", "inputs"),
}
ATTRIBUTES = (
    "num_generations", "num_iterations", "temperature", "reward_weights", "reward_func_names", "epsilon_low",
    "epsilon_high", "eos_token_ids", "_tokenizer", "_step",
)  # fmt: skip
OUTPUTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU")  # accelerate's kinds of processes that keep every parameter whole


def unlike(trainer: Any) -> list[str]:
    """What of TRL's inside is not as it is relied on; nothing in TRL 1.16."""
    found = []
    for name, parameters in METHODS.items():
        method = getattr(type(trainer), name, None)
        own = inspect.signature(method).parameters if callable(method) else {}
        lacking = [parameter for parameter in parameters if parameter not in own]
        if lacking:
            found.append(f"{name}({', '.join(lacking)})")
    return found + [name for name in ATTRIBUTES if not hasattr(trainer, name)]


def causal_model(trainer: Any) -> Any:
    """The language model with its head, without what accelerate and PEFT put around it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


class Body:
    """The policy's body. While it is listened to, it gives away the hidden states that predict response tokens."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._module = causal_model(trainer).base_model

    @contextmanager
    def listening(self, width: int) -> Iterator[list[Tensor]]:
        """A list that gets [rows, width, D] of each pass: the states at the columns before the last `width` tokens."""
        heard: list[Tensor] = []

        def hear(module: Any, args: Any, output: Any) -> None:
            heard.append(output.last_hidden_state[:, -width - 1 : -1].detach())

        hook = self._module.register_forward_hook(hear)  # taken off again, so that the model can be copied and saved
        try:
            yield heard
        finally:
            hook.remove()

    @torch.no_grad()
    def extra_forward(self, out: Mapping[str, Any]) -> Tensor:
        """Hidden states [n, T, D] of a rollout batch, from a pass of their own, in the trainer's batch size."""
        from trl.models.utils import disable_gradient_checkpointing

        trainer, width = self._trainer, out["completion_ids"].shape[1]
        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
        attention = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)
        size, kwargs = trainer.args.per_device_train_batch_size, trainer.args.gradient_checkpointing_kwargs
        with disable_gradient_checkpointing(trainer.model, kwargs), self.listening(width) as heard:
            if self._needs_the_whole_model(out):  # which runs the head as well, and throws its results away
                extras = {key: out[key] for key in MULTIMODAL if key in out}
                score = type(trainer)._get_per_token_logps_and_entropies
                score(trainer, trainer.model, ids, attention, width, batch_size=size, **extras)
            else:
                with trainer.accelerator.autocast():
                    for start in range(0, len(ids), size):
                        rows = slice(start, start + size)
                        self._module(input_ids=ids[rows], attention_mask=attention[rows], use_cache=False)
        return torch.cat(heard)

    def _needs_the_whole_model(self, out: Mapping[str, Any]) -> bool:
        config = getattr(self._trainer.model, "active_peft_config", None)
        sharded = self._trainer.accelerator.distributed_type.name not in PLAIN
        return sharded or getattr(config, "is_prompt_learning", False) or any(key in out for key in MULTIMODAL)


class Head:
    """The policy's head, as TRL applies it."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._model = trainer, causal_model(trainer)
        config = self._model.config.get_text_config()
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale = _logit_scale(config)
        self.vocabulary = int(config.vocab_size)

    @contextmanager
    def ready(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from hidden states [..., D] to logits [..., V], before the temperature."""
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        head = self._model.get_output_embeddings()
        weight, bias = (_whole(parameter) for parameter in (head.weight, getattr(head, "bias", None)))
        full = getattr(self._trainer.args, "cast_lm_head_to_fp32", False)

        def project(states: Tensor) -> Tensor:
            states = states.to(weight.device)
            logits = functional.linear(states.float() if full else states, weight, bias)
            if self._scale != 1 or self._cap is not None:
                logits = logits.float() * self._scale
            return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

        with torch.no_grad(), maybe_gather_lm_head_ctx(weight, bias):
            if full:
                weight, bias = weight.float(), None if bias is None else bias.float()
            with nullcontext() if full else self._trainer.accelerator.autocast():
                yield project


def _whole(parameter: Any) -> Any:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _logit_scale(config: Any) -> float:
    """What the model multiplies its logits by, under the name that its family gives it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1 / float(scaling)
