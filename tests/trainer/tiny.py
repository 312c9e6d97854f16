"""A tiny policy with the built-in tokenizer and random weights: tests of mechanics need no trained one."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.base_models.make_base import build_tokenizer
from trainer.policy.policy import Policy


def tiny_policy(
    seed: int = 0,
    vocabulary: int = 0,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    heads: int = 2,
    tied: bool = False,
) -> Policy:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
        initializer_range=0.3,  # wide enough that distributions differ between prefixes
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Policy(LlamaForCausalLM(config), tokenizer, device)
