"""TRL trainers of a tiny in-memory Qwen2 for tests: a word is a token, so texts and ids are the same thing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

WORDS, WIDTH = 40, 9
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}{{ 'assistant ' }}"


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "user": 2, "assistant": 3} | {f"w{i}": i for i in range(4, WORDS)}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE, padding_side="left"
    )


def model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None,
            eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip


def low_words(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Share of the tokens below 20: a reward that differs from rollout to rollout."""
    return [sum(token < 20 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def trainer(
    folder: Path,
    *,
    kind: str = "grpo",
    policy: Any = None,
    reward: Callable[..., list[float]] | list[Callable[..., list[float]]] = low_words,
    conversations: bool = False,
    peft: Any = None,
    eval_prompts: list[str] | None = None,
    **settings: Any,
) -> Any:
    """A GRPOTrainer (kind "rloo": an RLOOTrainer) on the CPU, 3 steps of 2 groups of 4 rollouts."""
    trainer_class, config = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    args = config(
        **{
            "output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "report_to": [], "beta": 0.0,
            "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": WIDTH, "max_steps": 3,
            "logging_steps": 1, "gradient_checkpointing": False, "learning_rate": 1e-3, "save_strategy": "no",
            "disable_tqdm": True, "lr_scheduler_type": "constant", "seed": 5,
        }
        | settings
    )  # fmt: skip
    prompts: list[Any] = [f"w{4 + i} w{5 + i}" + " w9" * (i % 3) for i in range(24)]
    if conversations:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    return trainer_class(
        model=policy or model(), reward_funcs=reward, args=args, train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(), peft_config=peft,
        eval_dataset=eval_prompts and Dataset.from_dict({"prompt": eval_prompts}),
    )  # fmt: skip


class Snapshots(TrainerCallback):
    """Float64 copies of the policy as it was when each optimizer step began, by the number of the step."""

    def __init__(self) -> None:
        self.models: dict[int, Qwen2ForCausalLM] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # with adapters: their product added to the weights
        whole = copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model
        taken = Qwen2ForCausalLM(model.config)  # TRL binds a forward of its own to the original, which a copy keeps
        taken.load_state_dict(whole.state_dict())
        self.models[state.global_step + 1] = taken.double().eval()
