"""`rlvr preflight`: can this run learn? From a few hundred rollouts of the policy that training would start from."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from monitor.commands.output import print_json, print_table
from monitor.commands.parsing import parse_known
from monitor.errors import MonitorError
from trainer.commands.train import parse_config
from trainer.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.flow import Scored
    from trainer.preflight import Draws, Figures, Finding
    from trainer.runtime.build import Parts

HELP = """Say whether a run can learn, before it costs anything: nothing is trained and nothing is recorded.

rlvr preflight [CONFIG.toml or preset] [options of rlvr train]: samples the training prompts as the run would, and
puts entropy, pass@k, groups that can teach, truncation, answers that cannot be read and repetition beside published
criteria. Exit codes: 0 fine, 1 learning is unlikely, 2 wrong use."""

SHOWN = {  # figure: (label, unit), in the order of the table
    "entropy": ("Entropy", "nats"),
    "pass@1": ("pass@1", "share"),
    "pass@G": ("pass@{G}", "share"),
    "live_share": ("Live groups, expected", "share"),
    "equal_wrong_share": ("  equal, all wrong", "share"),
    "equal_correct_share": ("  equal, all correct", "share"),
    "live_share_measured": ("Live groups, measured", "share"),
    "truncated_share": ("Truncated at {limit} tokens", "share"),
    "response_length": ("Response length", "tokens"),
    "no_answer_share": ("Ended without an answer", "share"),
    "no_reward_share": ("Reward None", "share"),
    "decided_share": ("Decided tokens (< 0.05 nat)", "share"),
    "repetition_share": ("Repetition", "share"),
    "duplicate_share": ("Same text", "share"),
    "sampler_mismatch": ("Sampler mismatch", "nats"),
    "sampler_mismatch_beyond2": ("Mismatch beyond 2", "share"),
}


@dataclass(frozen=True)
class Options:
    """See HELP."""

    preflight_prompts: int = 32  # training prompts that are sampled, the first that the run would take
    samples: int | None = None  # rollouts of each, in whole groups; none: 16 or a little more
    json: bool = False  # one JSON object


def main(argv: list[str]) -> int:
    """Exit codes: 0 nothing makes learning unlikely, 1 something does or sampling failed, 2 wrong use."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    try:
        options, config = _parse(argv)
        with console.status(Text(f"Loading {config.model} and {config.task}")):
            from trainer.runtime.build import prepare

            # no reference policy is needed: nothing is trained
            parts = prepare(config.model_copy(update={"loss": config.loss.model_copy(update={"kl_coef": 0.0})}))
    except (ValueError, MonitorError, OSError) as error:  # OSError: a hub id that cannot be loaded
        print(f"rlvr preflight: {error}", file=sys.stderr)
        return 2
    from trainer.errors import NonFiniteError, RewardError
    from trainer.preflight import figures_of, findings, unended_sentence

    samples = options.samples or -(-16 // config.rollout.group_size) * config.rollout.group_size
    try:
        draws = _draw(parts, options.preflight_prompts, samples, console)
    except (NonFiniteError, RewardError) as error:
        print(f"rlvr preflight: {error}", file=sys.stderr)
        return 1
    figures = figures_of(draws, config.rollout.group_size)
    found = findings(figures, config, unended_sentence(draws, config))
    show = _print_json if options.json else _print
    show(config, draws.correct.shape, figures, found)
    return int(any(finding.severity == "critical" for finding in found))


def _parse(argv: list[str]) -> tuple[Options, TrainConfig]:
    """Our own options, and the configuration that `rlvr train` would make of the rest. Raises ConfigError."""
    first = argv[:1] if argv and not argv[0].startswith("-") else []
    options, rest = parse_known(Options, argv[len(first) :], "preflight", HELP)
    config = parse_config([*first, *rest])
    if options.preflight_prompts < 1:
        raise ConfigError(f"--preflight-prompts is {options.preflight_prompts}, expected at least 1.")
    group_size = config.rollout.group_size
    if options.samples is not None and (options.samples < group_size or options.samples % group_size):
        raise ConfigError(
            f"--samples is {options.samples}, expected a multiple of rollout.group_size, {group_size}: groups are "
            "judged as training would meet them."
        )
    return options, config


def _draw(parts: Parts, prompts: int, samples: int, console: Console) -> Draws:
    """Samples the first `prompts` training prompts of the run's order, in portions of about a step's size."""
    import numpy as np

    from trainer.preflight import Draws
    from trainer.rollout.prompts import PromptStream

    config, known = parts.config, list(parts.task.prompts("train"))
    chosen = next(PromptStream(known, min(prompts, len(known)), config.seed))
    size = max(1, config.rollout.prompts * config.rollout.group_size // samples)
    console.print(
        f"Preflight of {config.model} on {config.task} ({parts.policy.device.type}): {samples} rollouts of each of "
        f"{len(chosen)} training prompts."
    )
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows, sums, unended = [], [], Counter[str]()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task("prompts", total=len(chosen))
        for start in range(0, len(chosen), size):
            portion = chosen[start : start + size]
            rollout = config.rollout.model_copy(update={"prompts": len(portion), "group_size": samples})
            of_portion = replace(
                parts,
                config=config.model_copy(update={"rollout": rollout}),
                stream=PromptStream(portion, len(portion), config.seed),
            )
            columns_of, sums_of, unended_of = _portion(of_portion)
            unended.update(unended_of)
            rows.append(columns_of)
            sums.append(sums_of)
            bars.advance(bar, len(portion))
    joined: dict[str, Any] = {
        name: np.concatenate([each[name] for each in rows]).reshape(-1, samples) for name in rows[0]
    }
    if parts.config.reward:
        joined["answered"] = None  # the task's own reading says nothing about a reward of the user's own
    return Draws(**joined, sums={key: sum(each[key] for each in sums) for key in sums[0]}, unended=unended)


def _portion(parts: Parts) -> tuple[dict[str, Any], dict[str, float], Counter[str]]:
    """Columns [rollouts], sums and `unended` of `Draws`, of the next step of `parts`, which is not trained on."""
    import numpy as np
    import torch

    from monitor.metrics import DECIDED_NATS
    from monitor.signals.completions import repetition, same_text
    from monitor.signals.diagnostics import mismatch_sums
    from trainer.learning.batch import token_batch
    from trainer.train import sample_round
    from trainer.update import micro_batches

    rollouts, scored = sample_round(parts)
    batch = token_batch(rollouts, scored, parts.task.correct_at, parts.config)
    mask, token_ids = batch.mask, batch.token_ids
    states = parts.policy.states(batch, micro_batches(parts.config))
    with torch.no_grad():
        logprobs, entropy = parts.policy.logprobs(states[mask], token_ids[mask], parts.config.rollout.temperature)
    sums = mismatch_sums(logprobs, batch.sampler_logprobs[mask], torch.ones_like(logprobs, dtype=torch.bool))
    sums |= {
        "tokens": mask.sum().double(),
        "entropy": entropy.double().sum(),
        "decided": (entropy < DECIDED_NATS).sum().double(),
    }
    columns = {
        "rewards": batch.rewards,
        "correct": batch.correct,
        "lengths": mask.sum(1),
        "truncated": batch.truncated,
        "repetition": repetition(token_ids, mask),
        "same_text": same_text(token_ids, mask, batch.group_ids),
    }
    found: dict[str, Any] = {name: column.cpu().numpy() for name, column in columns.items()}
    found["answered"] = np.array([parts.task.gives_answer(text) for text in scored.completions])
    of_each = zip(*scored.given.values(), strict=True)
    found["rewarded"] = np.array([any(reward is not None for reward in row) for row in of_each])
    return found, {key: float(value) for key, value in sums.items()}, _unended(parts, batch.truncated, scored)


def _unended(parts: Parts, truncated: Tensor, scored: Scored) -> Counter[str]:
    """{text of a special token: how many truncated rollouts contain it}. Padding is no part of a response."""
    added, found = parts.policy.tokenizer.added_tokens_decoder, Counter[str]()
    for ids, cut in zip(scored.completion_ids, truncated.tolist(), strict=True):
        if cut:
            found.update(str(added[token]) for token in set(ids) & added.keys())
    return found


def _print_json(config: TrainConfig, shape: tuple[int, ...], figures: Figures, found: list[Finding]) -> None:
    from trainer.preflight import reference, signal_floor

    group_size = config.rollout.group_size
    named = {key.replace("@G", f"@{group_size}"): (key, estimate) for key, estimate in figures.items()}
    print_json(
        {
            "model": config.model,
            "task": config.task,
            "prompts": shape[0],
            "samples": shape[1],
            "rollout": config.rollout.model_dump(),
            "signal_floor": signal_floor(group_size),
            "figures": {
                name: asdict(estimate) | {"reference": reference(key, group_size)}
                for name, (key, estimate) in named.items()
            },
            "findings": [asdict(finding) for finding in found],
            "can_learn": not any(finding.severity == "critical" for finding in found),
        }
    )


def _print(config: TrainConfig, shape: tuple[int, ...], figures: Figures, found: list[Finding]) -> None:
    from trainer.preflight import reference

    rollout = config.rollout
    rows = []
    for key, (label, unit) in SHOWN.items():
        if key in figures:
            figure = figures[key]
            bounds = None if figure.low is None else f"{figure.low:.3g} to {figure.high:.3g}"
            name = label.format(G=rollout.group_size, limit=rollout.max_new_tokens)
            rows.append([name, f"{figure.mean:.3g}", unit, bounds, reference(key, rollout.group_size)])
    print_table(["figure", "value", "unit", "95 % interval", "reference (a line to look at, not a truth)"], rows)
    print(
        f"{shape[0]} prompts, {shape[1]} rollouts of each at temperature {rollout.temperature:g}; intervals are over "
        "prompts. Live: rewards differ within the group."
    )
    for finding in found:
        print(f"{finding.severity}: {finding.message}")
    critical = any(finding.severity == "critical" for finding in found)
    verdict = "As it stands, learning is unlikely." if critical else "Nothing here makes learning unlikely."
    print(verdict)
