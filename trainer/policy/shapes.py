"""Shapes of models, so that memory can be planned where the model is not: on a laptop, or on a node without a network.

From the config.json of each on the Hugging Face hub; what is not named is transformers' default of the model type.
"""

from __future__ import annotations

from typing import Any

from trainer.errors import ModelError
from trainer.policy.sources import FETCHABLE, resolve_model

_QWEN = {"model_type": "qwen2", "max_position_embeddings": 32_768, "tie_word_embeddings": True, "vocab_size": 151_936}
_LLAMA = {"model_type": "llama", "max_position_embeddings": 131_072}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1_536, "vocab_size": 49_152, "tie_word_embeddings": True,
        "max_position_embeddings": 8_192,
    },
    "Qwen/Qwen2.5-0.5B": _QWEN | {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4_864,
    },
    "Qwen/Qwen2.5-1.5B": _QWEN | {
        "hidden_size": 1_536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8_960,
    },
    "Qwen/Qwen2.5-7B": _QWEN | {
        "hidden_size": 3_584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18_944, "vocab_size": 152_064, "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.1-70B": _LLAMA | {
        "hidden_size": 8_192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 28_672, "vocab_size": 128_256, "tie_word_embeddings": False,
    },
}  # fmt: skip


def model_shape(name: str) -> Any:
    """The transformers configuration of a model: of a folder, of SHAPES, else from the hub. Raises ModelError."""
    from transformers import AutoConfig

    if name in SHAPES:
        shape = dict(SHAPES[name])
        return AutoConfig.for_model(shape.pop("model_type"), **shape)
    source = resolve_model(name) if name not in FETCHABLE else None
    if source is None or source.gguf_file:
        raise ModelError(
            f"The shape of {name!r} cannot be read from GGUF weights. Plan with a model folder, or with one of "
            f"{', '.join(SHAPES)}."
        )
    try:
        return AutoConfig.from_pretrained(source.path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The shape of {name!r} cannot be read: {type(error).__name__}. Without a network, plan with a model "
            f"folder or with one of {', '.join(SHAPES)}."
        ) from error
