"""`rlvr plan`: does a run fit its device, and with which settings? Nothing is loaded and no weights are needed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from monitor.commands.output import print_json, print_table
from monitor.commands.parsing import parse_known
from monitor.errors import MonitorError
from trainer.commands.train import parse_config
from trainer.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from trainer.plan import Choice, Device

HELP = """Say what a run takes in memory, part by part, before it starts: nothing is loaded, and no weights are needed.

rlvr plan [CONFIG.toml or preset] [options of rlvr train]: the peaks of sampling, signals, update and optimizer. If it
does not fit, smaller passes and sampling batches are chosen, and then checkpointed layers. Exit codes: 0 it fits,
perhaps with the settings named, 1 it cannot, 2 wrong use."""

ASSUMED_PROMPT = 512  # tokens, where the task or the tokenizer is not here


@dataclass(frozen=True)
class Options:
    """See HELP."""

    memory_gb: float | None = None  # of one device, GB (10^9 bytes); none: this machine's
    device: str | None = None  # cuda or cpu; none: cuda if --memory-gb is given or there is one
    ranks: int = 1  # processes, one to a device
    prompt_tokens: int | None = None  # longest prompt; none: that of the task, or 512 where it cannot be read
    json: bool = False  # one JSON object


def main(argv: list[str]) -> int:
    """Exit codes: 0 fits, 1 cannot fit, 2 wrong use."""
    try:
        options, config = _parse(argv)
        from trainer.plan import SPARE, fitting
        from trainer.policy.imagined import Passes
        from trainer.policy.shapes import model_shape

        passes = Passes(model_shape(config.model))
        device, (prompt, measured) = _device(options), _prompt(options, config)
        choice = fitting(config, passes, prompt, device)
    except (ValueError, MonitorError, OSError) as error:
        print(f"rlvr plan: {error}", file=sys.stderr)
        return 2
    if options.json:
        print_json(
            {
                "model": config.model,
                "device": "cuda" if device.cuda else "cpu",
                "memory": device.memory,
                "ranks": device.ranks,
                "prompt_tokens": prompt,
                "phases": choice.plan.phases,
                "peak": choice.plan.peak,
                "fits": choice.fits,
                "settings": choice.settings,
            }
        )
        return int(not choice.fits)
    _print(config, choice, device, prompt, measured, SPARE)
    return int(not choice.fits)


def _parse(argv: list[str]) -> tuple[Options, TrainConfig]:
    first = argv[:1] if argv and not argv[0].startswith("-") else []
    options, rest = parse_known(Options, argv[len(first) :], "plan", HELP)
    config = parse_config([*first, *rest])
    if options.device not in (None, "cuda", "cpu"):
        raise ConfigError(f"--device is {options.device!r}, expected cuda or cpu.")
    if options.memory_gb is not None and options.memory_gb <= 0:
        raise ConfigError(f"--memory-gb is {options.memory_gb:g}, expected the GB of one device, e.g. 80.")
    if options.ranks < 1 or config.rollout.prompts % options.ranks:
        raise ConfigError(
            f"--ranks is {options.ranks} and rollout.prompts {config.rollout.prompts}: each rank takes the same number "
            "of whole groups. Set one so that it divides the other."
        )
    return options, config


def _device(options: Options) -> Device:
    import torch

    from trainer.plan import Device

    here = torch.cuda.is_available()
    cuda = options.device == "cuda" or (options.device is None and (here or options.memory_gb is not None))
    if options.memory_gb is not None:
        return Device(int(options.memory_gb * 1e9), cuda, options.ranks)
    if cuda and not here:
        raise ConfigError("--device is cuda, but this machine has none. Give its memory: --memory-gb 80.")
    if cuda:
        return Device(torch.cuda.get_device_properties(0).total_memory, True, options.ranks)
    return Device(_free_memory() // options.ranks, False, options.ranks)


def _free_memory() -> int:
    """Bytes of memory that are free on this machine, on Linux; elsewhere what there is."""
    import os

    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _prompt(options: Options, config: TrainConfig) -> tuple[int, bool]:
    """(tokens of the longest prompt, whether they were counted)."""
    if options.prompt_tokens is not None:
        return options.prompt_tokens, True
    from transformers import AutoTokenizer

    from trainer.policy.endings import chat_template
    from trainer.policy.sources import resolve_model
    from trainer.rollout.prompts import evaluation_prompts, prompt_ids, system_prompt
    from trainer.tasks import make_task

    try:
        task = make_task(config.task)
        source = resolve_model(config.model)
        tokenizer = AutoTokenizer.from_pretrained(source.path, gguf_file=source.gguf_file, local_files_only=True)
    except (ValueError, MonitorError, OSError):
        return ASSUMED_PROMPT, False
    tokenizer.chat_template = chat_template(config.rollout.chat_template, tokenizer.chat_template)
    prompts = [*task.prompts("train"), *(p for of in evaluation_prompts(config, task).values() for p in of)]
    system = system_prompt(config, task)
    return max(len(prompt_ids(tokenizer, prompt, system)) for prompt in prompts), True


def _print(config: TrainConfig, choice: Choice, device: Device, prompt: int, measured: bool, spare: float) -> None:
    phases = choice.plan.phases
    parts = list(dict.fromkeys(part for of in phases.values() for part in of))
    rows: list[list[Any]] = [
        [part, *(_gb(of[part]) if part in of else None for of in phases.values())] for part in parts
    ]
    rows.append(["together", *(_gb(sum(of.values())) for of in phases.values())])
    print_table(["GB", *phases], rows)
    memory, peak = device.memory / 1e9, choice.plan.peak / 1e9
    print(
        f"{config.model}, prompts of {prompt} tokens{'' if measured else ' (assumed: give --prompt-tokens)'}, "
        f"responses of {config.rollout.max_new_tokens}, all at once; {device.ranks} x {memory:.0f} GB, "
        f"{'bfloat16 autocast' if device.cuda else 'float32'}."
    )
    if not choice.fits:
        held = (
            sum(phases["optimizer"].get(part, 0) for part in ("weights", "gradients", "optimizer", "reference")) / 1e9
        )
        print(
            f"It cannot fit: {peak:.1f} GB in phase {choice.plan.largest}, of {memory:.1f} GB ({1 - spare:.0%} of it "
            "usable), with the smallest passes and checkpointed layers. Weights, gradients, optimizer and reference "
            f"alone take {held:.1f} GB: train adapters (--lora.rank 16), shard over devices (--shard --ranks N), or, "
            "unsharded, keep moments of 8 bits (--optim.kind adamw_8bit)."
        )
        return
    print(
        f"It fits: peak {peak:.1f} GB, in phase {choice.plan.largest}, {1 - peak / memory:.0%} of the device to spare."
    )
    if choice.settings:
        told = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in choice.settings.items())
        print(f"With these settings, which are not the configuration's: {told}")


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
