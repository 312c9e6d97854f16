"""Predicted beside measured peak memory of a training step on a CPU: python benchmarks/bench_plan.py

Measured is what torch's CPU allocator gave out and took back, by the profiler's memory events: exact to the byte, and
without Python, the libraries and the allocator's own reserve. Weights are added, since they lie in the mapped file.
"""

from __future__ import annotations

import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.harness import RESULTS, no_options, write_rows
from trainer.base_models.make_base import build_tokenizer
from trainer.config import TrainConfig
from trainer.learning.batch import token_batch
from trainer.plan import Device, Plan, memory_plan
from trainer.policy.imagined import Passes
from trainer.policy.policy import Policy
from trainer.policy.shapes import model_shape
from trainer.rollout.prompts import encode_prompts
from trainer.runtime.build import Parts, prepare
from trainer.train import sample_step


def shape_of(hidden: int, layers: int, vocabulary: int = 512, heads: int = 4, kv_heads: int = 4) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
    }  # fmt: skip


def _rollout(prompts: int, group: int, tokens: int) -> dict[str, int]:
    return {"prompts": prompts, "group_size": group, "max_new_tokens": tokens}


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name: (model, settings)
    "a wide vocabulary": (
        shape_of(192, 2, vocabulary=32_768, kv_heads=2),
        {"rollout": _rollout(4, 4, 48), "optim": {"epochs": 2}},
    ),
    "checkpointed layers and a reference": (
        shape_of(128, 12),
        {
            "rollout": _rollout(4, 8, 96),
            "loss": {"kl_coef": 0.01},
            "optim": {"epochs": 2, "gradient_checkpointing": True},
        },
    ),
    "passes by tokens": (shape_of(128, 8), {"rollout": _rollout(4, 8, 96), "optim": {"micro_tokens": 800}}),
    "moments of 8 bits": (
        shape_of(256, 4),
        {"rollout": _rollout(4, 8, 64), "optim": {"kind": "adamw_8bit"}},
    ),
    "one pass, on-policy": (shape_of(256, 4), {"rollout": _rollout(4, 8, 64)}),
    "adapters": (
        shape_of(256, 6),
        {"rollout": _rollout(4, 8, 64), "loss": {"kl_coef": 0.01}, "lora": {"rank": 4}, "optim": {"epochs": 2}},
    ),
}


def model_folder(folder: Path, shape: dict[str, Any]) -> Path:
    """A model of random weights with the built-in tokenizer; its responses seldom end."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen2Config(**shape, **ends, max_position_embeddings=256, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def configured(model: Path, settings: dict[str, Any]) -> TrainConfig:
    tree = {"model": str(model), "eval": {"every": 0}, "threads": 1, "record": {"probe_every": 0}} | settings
    tree["weighting"] = {"kind": "uniform"}
    return TrainConfig(**tree)


def allocated(step: Any) -> tuple[Any, int, int]:
    """(what the step returns, most bytes at once, bytes left) beyond those before it, of torch's CPU allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    levels = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return found, max(levels, default=0), levels[-1] if levels else 0


def measured_peaks(parts: Parts) -> dict[str, int]:
    """Peak bytes of the second step's rollouts and of its update, weights and optimizer states included."""
    config, held = parts.config, 0
    models = [policy.model for policy in (parts.policy, parts.updater.reference) if isinstance(policy, Policy)]
    weights = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    found: dict[str, int] = {}
    for step in (1, 2):
        (rollouts, scored), most, left = allocated(lambda: sample_step(parts))
        found["rollouts"] = weights + held + most
        batch = token_batch(rollouts, scored, parts.task.correct_at, config)
        update, most, _ = allocated(lambda batch=batch, step=step: parts.updater.update(batch, step))
        found["update"] = weights + held + left + most
        del update, rollouts, batch
        states = [v for s in parts.updater.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        held = sum({v.data_ptr(): v.nbytes for v in states}.values())  # 8-bit ones share the map of their values
    return found


def compare(folder: Path, name: str) -> tuple[dict[str, int], dict[str, int], Plan]:
    """(predicted, measured) peaks, bytes, of rollouts and update of one of SHAPES, and the plan."""
    shape, settings = SHAPES[name]
    config = configured(model_folder(folder / "model", shape), settings)
    parts = prepare(config)
    prompts = encode_prompts(parts.policy, list(parts.task.prompts("train")), None, config.rollout.max_new_tokens)
    plan = memory_plan(config, Passes(model_shape(config.model)), max(map(len, prompts)), Device(1 << 40, cuda=False))
    sums = {phase: sum(of.values()) for phase, of in plan.phases.items()}
    predicted = {"rollouts": sums.pop("rollouts"), "update": max(sums.values())}
    return predicted, measured_peaks(parts), plan


def main() -> None:
    no_options(__doc__)
    rows = []
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            predicted, measured, plan = compare(Path(folder), name)
        for phase, of in plan.phases.items():
            print(f"{name}, {phase}: " + ", ".join(f"{part} {size / 1e6:.1f} MB" for part, size in of.items()))
        for phase, size in predicted.items():
            off = size / measured[phase] - 1
            rows.append({"model": name, "phase": phase, "predicted_mb": round(size / 1e6, 1),
                         "measured_mb": round(measured[phase] / 1e6, 1), "off": round(off, 3)})  # fmt: skip
            print(rows[-1])
    write_rows(RESULTS / "plan.csv", rows, ("torch", "transformers"))


if __name__ == "__main__":
    main()
