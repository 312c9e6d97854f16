"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: few parameters are trained, and saved as a full model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from trainer.config import LoraConfig


def with_adapters(model: Any, config: LoraConfig) -> Any:
    """The model with adapters W + (alpha / rank) B A on all linear layers but the head; only A and B are trained.

    B starts at 0, so the policy starts as the base policy; A is drawn from torch's global generator.
    """
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    settings = PeftConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    with warnings.catch_warnings():  # peft reads a property that transformers deprecates
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(model, settings)


def merged_copy(model: Any) -> Any:
    """A copy with the adapters added into the weights: what `save_pretrained` writes is an ordinary model."""
    return copy.deepcopy(model).merge_and_unload()


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of what `merged_copy` holds, one at a time: W + (alpha / rank) B A where there are adapters.

    Of a model without adapters, its own weights, not copied. Tied weights come under each of their names.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, weight in base.named_parameters(remove_duplicate=False):
        owner, adapted, rest = name.partition(".base_layer.")
        if adapted and rest == "weight":
            layer = base.get_submodule(owner)
            weight = weight + layer.get_delta_weight(layer.active_adapters[0])
        if ".lora_" not in name:
            yield (f"{owner}.{rest}" if adapted else name), weight.detach()
