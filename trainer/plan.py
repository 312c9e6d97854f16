"""Will a run fit its device? What each part of a step takes in memory, and settings with which it does.

Nothing is loaded: passes through the model are run on tensors without values (`policy/imagined.py`), the rest is
arithmetic. Sizes are those of the longest prompts and responses, all at once: what the worst step can take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from trainer.config import TrainConfig
from trainer.learning.optimizers import moment_bytes
from trainer.policy import imagined
from trainer.policy import policy as policy_module
from trainer.policy.imagined import Passes
from trainer.rollout.generate import COLUMNS
from trainer.rollout.vllm_engine import CACHE_SHARE, cache_bytes
from trainer.update import one_pass_by_groups

SPARE = 0.1  # of the device's memory stays free: for fragments, kernels' workspaces and the runtime
SAMPLING_COPIES = (
    4  # of the logits of a token, float32: over the temperature, their logarithms, probabilities, the draw
)
SIGNAL_COPIES = 1.2  # of a slab of float32 logits in the definition of the signals, measured (docs/plan.md)
BATCH_BYTES = 90  # of a response position: ids, masks, log-probabilities, signals, weights, terms of the loss


@dataclass(frozen=True, slots=True)
class Device:
    """memory in bytes; cuda: bfloat16 autocast, fixed caches and the kernel of the signals; else a CPU's float32."""

    memory: int
    cuda: bool = True
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of each part in each phase of a step: {phase: {part: bytes}}."""

    phases: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def largest(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan that fits, and the dotted settings that differ from those asked for, or the plan closest to fitting."""

    plan: Plan
    settings: dict[str, Any]
    fits: bool


def memory_plan(config: TrainConfig, passes: Passes, prompt: int, device: Device) -> Plan:
    """The plan of a configuration. prompt: tokens of the longest one."""
    half_layers = config.shard_gather == "bfloat16" and device.ranks > 1
    setup = imagined.Setup(
        half=device.cuda or half_layers,
        checkpointing=config.optim.gradient_checkpointing,
        lora=config.lora,
        reference=config.loss.kl_coef > 0 and config.loss.kl_reference == "initial",
        entropy=config.loss.entropy_coef != 0 or config.loss.entropy_target is not None,
        half_layers=half_layers,
    )
    counts = passes(imagined.counted, config.lora)
    shards = device.ranks if config.shard else 1
    held = {
        "weights": 4 * counts.all // shards,
        "optimizer": sum(moment_bytes(config.optim, numbers) for numbers in counts.trained_tensors) // shards,
        "reference": 4 * counts.all // shards if setup.reference and not config.lora.rank else 0,
    }
    if shards > 1:  # of a sharded model, two layers and what is outside of them are gathered at a time
        held["gathered"] = 4 * counts.outside + (2 if half_layers else 4) * 2 * counts.layer
    rollouts = _rollouts(config, passes, setup, counts, prompt, device)
    if config.rollout.backend == "vllm":
        rollouts = _engine(config, passes, counts, prompt, device)
        if not device.cuda:  # there it cannot sleep
            held |= {part: rollouts[part] for part in ("sampler", "caches")}
    gradients = {"gradients": 4 * counts.trained // shards}
    batch = {"batch": BATCH_BYTES * _rows(config, device) * config.rollout.max_new_tokens}
    update, signals = _update(config, passes, setup, prompt, device)
    if shards > 1:  # until they are summed: those outside of layers for the whole backward pass, a layer's, and its sum
        update["whole gradients"] = 4 * counts.outside + ((2 if half_layers else 4) + 4) * counts.layer
    return Plan(
        {
            "rollouts": held | rollouts,
            "signals": held | batch | signals,
            "update": _together(
                held | batch | update, gradients, split=_micro_rows(config, device, prompt) < _rows(config, device)
            ),
            "optimizer": held | batch | gradients | {"temporaries": _optimizer(config, counts, device)},
        }
    )


def _together(parts: dict[str, int], gradients: dict[str, int], *, split: bool) -> dict[str, int]:
    """With several micro-batches gradients are there at the peak of the next one. Else they grow as the graph goes."""
    if split:
        return parts | gradients
    beyond = max(0, gradients["gradients"] - parts["activations"])
    return parts | {"gradients": beyond}


def _rows(config: TrainConfig, device: Device) -> int:
    """A rank's rollouts of a step."""
    return max(1, config.rollout.prompts // device.ranks) * config.rollout.group_size


def _micro_rows(config: TrainConfig, device: Device, prompt: int) -> int:
    """The most rows of full length in one pass."""
    rows = min(config.optim.micro_batch, -(-_rows(config, device) // config.optim.mini_batches))
    tokens = config.optim.micro_tokens
    return rows if tokens is None else max(1, min(rows, tokens // (prompt + config.rollout.max_new_tokens)))


def _update(
    config: TrainConfig, passes: Passes, setup: imagined.Setup, prompt: int, device: Device
) -> tuple[dict[str, int], dict[str, int]]:
    """(parts of the update, parts of the signals before it)."""
    width, rows = config.rollout.max_new_tokens, _micro_rows(config, device, prompt)
    text = passes.shape.get_text_config()
    group = config.rollout.group_size
    kept, peak = passes(imagined.update_bytes, setup, rows, prompt, width)
    together = min(_rows(config, device), max(1, config.optim.micro_batch // group) * group)  # rows compared at once
    slab = _signal_slab(together, width, text.vocab_size, text.hidden_size, device)
    once = config.optim.epochs == config.optim.mini_batches == 1
    on_policy = once and (rows >= _rows(config, device) or one_pass_by_groups(config))
    if on_policy:
        return {"activations": max(peak, kept + slab)}, {}
    one_pass = passes(imagined.states_bytes, setup, rows, prompt + width)
    states = 4 * together * width * text.hidden_size
    return {"activations": peak}, {"hidden states": states, "activations": one_pass, "logits": slab}


def _signal_slab(rows: int, width: int, vocabulary: int, hidden: int, device: Device) -> int:
    """What computing the signals of `rows` rows of `width` positions takes beside their hidden states."""
    limit = policy_module.CUDA_SLAB_ELEMENTS if device.cuda else policy_module.SLAB_ELEMENTS
    elements = rows * vocabulary * min(width, max(1, limit // (rows * vocabulary)))
    return 2 * elements + 2 * hidden * vocabulary if device.cuda else int(4 * SIGNAL_COPIES * elements)


def _rollouts(
    config: TrainConfig, passes: Passes, setup: imagined.Setup, counts: imagined.Counts, prompt: int, device: Device
) -> dict[str, int]:
    """Sampling for training or, if that takes more, for an evaluation: at most rollout.max_batch rows at a time."""
    rollout, text = config.rollout, passes.shape.get_text_config()
    rows = min(rollout.max_batch, _sampled_rows(config, device))
    distinct = math.ceil(rows / min(rollout.group_size, config.eval.samples))
    columns = prompt + rollout.max_new_tokens
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_dim
    layers, width = text.num_hidden_layers, 2 if device.cuda else 4
    if device.cuda:
        columns = -(-columns // COLUMNS) * COLUMNS
    growing = 0 if device.cuda else 1  # a layer's keys and values are copied as they grow
    linear = counts.head if setup.half_layers else counts.linear
    cast = 2 * linear if setup.half else 0  # autocast's own casts, which the sampler's copy makes needless
    prefill = passes(imagined.states_bytes, setup, distinct, max(2, prompt))
    caches = rows * columns * per_token * width * (layers + growing)
    logits = SAMPLING_COPIES * 4 * rows * text.vocab_size
    return {  # prompts are run before the caches have grown
        "sampler": cast,
        "caches": caches,
        "logits": logits,
        "activations": max(0, prefill - cast - (0 if device.cuda else caches + logits)),
    }


def _engine(
    config: TrainConfig, passes: Passes, counts: imagined.Counts, prompt: int, device: Device
) -> dict[str, int]:
    """An engine of vLLM for the same rows: weights of its own, its cache, and the logits of the rows' next tokens.

    On a CPU a tied head is held apart. On CUDA the cache takes no more than its share: rows then wait for a place.
    """
    rollout, text = config.rollout, passes.shape.get_text_config()
    rows, width = min(rollout.max_batch, _sampled_rows(config, device)), 2 if device.cuda else 4
    head = 0 if device.cuda or not text.tie_word_embeddings else text.vocab_size * text.hidden_size
    caches = cache_bytes(text, rows, prompt + rollout.max_new_tokens, width)
    return {
        "sampler": width * (counts.all + head),
        "caches": min(caches, int(CACHE_SHARE * device.memory)) if device.cuda else caches,
        "logits": SAMPLING_COPIES * 4 * rows * text.vocab_size,
    }


def _sampled_rows(config: TrainConfig, device: Device) -> int:
    """Rows that a rank samples for a step or, if that is more, for a split of an evaluation."""
    evaluated = math.ceil(config.eval.prompts / device.ranks) * config.eval.samples if config.eval.every else 0
    return max(_rows(config, device), evaluated)


def _optimizer(config: TrainConfig, counts: imagined.Counts, device: Device) -> int:
    """AdamW takes the root of all second moments at once on CUDA, one by one on a CPU; ranks sum one flat gradient.

    With 8-bit moments a kernel does all in place on CUDA; on a CPU a tensor's moments are float32 while it is updated.
    """
    shards = device.ranks if config.shard else 1
    if config.optim.kind == "adamw_8bit":
        adam = 0 if device.cuda else 5 * 4 * counts.largest
    else:
        adam = 4 * counts.trained // shards if device.cuda else 3 * 4 * counts.largest
    flat = 4 * counts.trained if device.ranks > 1 and not config.shard else 0
    return max(adam, flat)


def fitting(config: TrainConfig, passes: Passes, prompt: int, device: Device) -> Choice:
    """The configuration as it is if it fits; else with fewer rows sampled and trained on at once.

    Both are halved until they fit. If one row of full length still does not, layers are checkpointed and passes start
    large again. What then does not fit needs another device, more ranks with `shard`, or adapters.
    """
    usable = (1 - SPARE) * device.memory
    settings: dict[str, Any] = {}

    def planned(**more: Any) -> Plan:
        settings.update({key.replace("__", "."): value for key, value in more.items()})
        return memory_plan(changed(config, settings), passes, prompt, device)

    def too_much(plan: Plan, *phases: str) -> bool:
        return any(sum(plan.phases[phase].values()) > usable for phase in phases)

    plan = planned()
    rows = most = _micro_rows(config, device, prompt)
    columns = prompt + config.rollout.max_new_tokens
    while too_much(plan, "signals", "update"):
        if rows > 1:
            rows //= 2
        elif not changed(config, settings).optim.gradient_checkpointing:
            rows, settings["optim.gradient_checkpointing"] = most, True
        else:
            break
        plan = planned(**{"optim__micro_batch": rows} if config.shard else {"optim__micro_tokens": rows * columns})
    sampled = min(config.rollout.max_batch, _sampled_rows(config, device))
    while too_much(plan, "rollouts") and sampled > 1:
        sampled //= 2
        plan = planned(rollout__max_batch=sampled)
    return Choice(plan, settings, plan.peak <= usable)


def changed(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    tree = config.model_dump()
    for key, value in settings.items():
        group, _, name = key.partition(".")
        tree[group][name] = value
    return TrainConfig(**tree)
