"""`rlvr eval`: how often right, and how varied, the answers of a run's final policy or of any model are on a task.

A run is sampled with its own task, temperature and response length, so the figures continue those of its evaluations.
On another task a response may be as long as the model's context allows, at most LONGEST_RESPONSE tokens. A run's result
is added to STORE/evals/RUN.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from monitor.commands.output import print_json, print_table
from monitor.commands.parsing import parse
from monitor.errors import MonitorError, UnknownRunError, nearest
from monitor.stats.paired import bootstrap_interval
from monitor.store.runs import get_run, require_store, run_names
from trainer.config import ConfigError, TrainConfig
from trainer.tasks import Prompt, Task, make_task

if TYPE_CHECKING:
    from trainer.evaluate import SplitOutcome
    from trainer.policy.policy import Policy
    from trainer.rewards.weighted import Rewards

MIN_PROMPTS = 3  # needed for an interval, as many as the seeds of a band
LONGEST_RESPONSE = 1024  # tokens, unless the run or the user sets another limit
MANY_TRUNCATED = 0.05  # of a split's samples; a larger share gets a note below the table


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    """What is evaluated, with the fields that `trainer.evaluate.Evaluable` asks for."""

    config: TrainConfig
    policy: Policy
    task: Task
    rewards: Rewards


@dataclass(frozen=True)
class Options:
    """Evaluate a run's final policy, or any model."""

    subject: tyro.conf.Positional[
        Annotated[str, tyro.conf.arg(metavar="RUN|MODEL")]
    ]  # a run of the store, a Hugging Face folder, or a model as rlvr train takes it
    store: str = "runs"  # folder of the store
    task: str | None = None  # chain, paths, reasoning_gym:<dataset> or jsonl:<path>; none: the run's, or chain
    # splits to evaluate; those that the task lacks are left out
    split: tuple[Literal["train", "heldout", "ood", "multipath"], ...] = ("heldout", "ood", "multipath")
    samples: int = 16  # samples of each prompt
    k: tuple[int, ...] = (1, 4, 16)  # k of pass@k
    prompts: int | None = None  # at most so many prompts of each split, chosen as the run does; none: all
    temperature: float | None = None  # sampling temperature; none: the run's, or 1
    # longest response; none: the run's, or 56 for chain; on another task what the model's context allows, up to 1,024
    max_new_tokens: int | None = None
    seed: int = 0  # seed of the sampling
    json: bool = False  # print one JSON object


def main(argv: list[str]) -> int:
    """Exit codes: 0 evaluated, 2 wrong use."""
    from trainer.rollout.prompts import chosen_prompts

    options = parse(Options, argv, "eval")
    try:
        is_run, model, config = subject(options.subject, Path(options.store))
        known = options.max_new_tokens is not None or options.task in (None, config.task)
        config = _configured(config, options)
        found = {split: make_task(config.task).prompts(split) for split in options.split}
        splits: dict[str, list[Prompt]] = {
            split: chosen_prompts(prompts, config.eval) if options.prompts else list(prompts)
            for split, prompts in found.items()
            if prompts
        }
        if not splits:
            raise ConfigError(f"{config.task} has no prompts of split {' or '.join(options.split)}.")
        report = evaluate_model(model, config, splits, options.k, length_is_set=known)
    except (ValueError, MonitorError, OSError) as error:
        print(f"rlvr eval: {error}", file=sys.stderr)
        return 2
    report = {"subject": options.subject, "model": model, **report}
    if is_run:
        print(f"Added to {_record(Path(options.store), options.subject, report)}", file=sys.stderr)
    if options.json:
        print_json(report)
    else:
        _print(report)
    return 0


def subject(name: str, store: Path) -> tuple[bool, str, TrainConfig]:
    """(whether `name` is a run, the model to load, the settings to sample with). Raises MonitorError or ConfigError."""
    if (store / "runs" / name / "run.json").is_file():
        stored = get_run(store, name).info.get("config")
        if not stored:
            raise ConfigError(
                f"Run {name!r} has no configuration of `rlvr train`, which says how to sample it. Give the folder of "
                "its policy instead."
            )
        config = TrainConfig.of_run(stored)
        folder = Path(config.save) if config.save else store / "policies" / name
        if not (folder / "config.json").is_file():
            raise UnknownRunError(
                f"Run {name!r} has no final policy at {str(folder)!r}: a run saves one when it ends. Resume it with "
                f"`rlvr train --resume {name}`."
            )
        own = config.rollout.model_copy(update={"chat_template": "model"})  # the saved policy carries the run's
        return True, str(folder), config.model_copy(update={"rollout": own})
    from trainer.policy.sources import resolve_model

    try:
        resolve_model(name)
    except MonitorError as error:
        known = run_names(require_store(store)) if (store / "runs").is_dir() else []
        raise UnknownRunError(f"No run {name!r} in store {str(store)!r}.{nearest(name, known)} {error}") from None
    return False, name, TrainConfig()


def _configured(config: TrainConfig, options: Options) -> TrainConfig:
    tree = config.model_dump()
    tree["task"] = options.task or config.task
    if options.task and options.task != config.task:
        tree["reward"] = None  # the run's own reward judges another task
    sampling = {"temperature": options.temperature, "max_new_tokens": options.max_new_tokens}
    tree["rollout"] |= {key: value for key, value in sampling.items() if value is not None}
    largest = max(options.k)
    if min(options.k) < 1 or largest > options.samples:
        raise ConfigError(
            f"--k {' '.join(map(str, options.k))} with --samples {options.samples}: pass@k needs k from 1 to the "
            "number of samples."
        )
    if options.prompts is not None and options.prompts < 1:
        raise ConfigError(f"--prompts is {options.prompts}, expected at least 1.")
    tree["eval"] |= {"samples": options.samples, "k": largest}
    if options.prompts:
        tree["eval"]["prompts"] = options.prompts
    return TrainConfig(**(tree | {"seed": options.seed}))


def evaluate_model(
    model: str,
    config: TrainConfig,
    splits: dict[str, list[Prompt]],
    ks: Sequence[int],
    *,
    length_is_set: bool = True,
) -> dict[str, Any]:
    """The model's figures on each split, with how they were sampled, as plain JSON types.

    length_is_set: whether responses may have rollout.max_new_tokens tokens. Otherwise they may have what the longest
    prompt leaves of the model's context, at most LONGEST_RESPONSE. Raises ValueError before sampling if a prompt leaves
    no room for a response.
    """
    import torch

    from trainer.policy.policy import Policy, pick_device
    from trainer.policy.sources import ensure_model
    from trainer.rewards.weighted import rewards_of
    from trainer.rollout.prompts import encode_prompts, system_prompt
    from trainer.rollout.vllm_engine import check_usable, start_engine

    task = make_task(config.task)
    rewards = rewards_of(config, task)
    if config.rollout.backend == "vllm":
        check_usable()
    policy = Policy.load(ensure_model(model), pick_device()).converse(config.rollout)
    prompts = [prompt for split in splits.values() for prompt in split]
    least = config.rollout.max_new_tokens if length_is_set else 1
    longest = max(map(len, encode_prompts(policy, prompts, system_prompt(config, task), least)))
    if not length_is_set:
        limit = min(LONGEST_RESPONSE, policy.context - longest)
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_new_tokens": limit})})
    if config.rollout.backend == "vllm":
        start_engine(policy, config, longest)
    found = _Subject(config, policy, task, rewards)
    generator = torch.Generator(found.policy.device).manual_seed(config.seed)
    began = time.time()
    outcomes = _sampled(found, splits, generator)
    return {
        "task": config.task,
        "seed": config.seed,
        "samples": config.eval.samples,
        "temperature": config.rollout.temperature,
        "max_new_tokens": config.rollout.max_new_tokens,
        "splits": {split: split_figures(outcome, ks) for split, outcome in outcomes.items()},
        "created": began,
        "seconds": time.time() - began,
    }


def _sampled(found: _Subject, splits: dict[str, list[Prompt]], generator: Any) -> dict[str, SplitOutcome]:
    """The outcome of every split. Samples are drawn at most rollout.max_batch at a time."""
    from trainer.evaluate import SplitOutcome, sample_split

    portion = max(1, found.config.rollout.max_batch // found.config.eval.samples)
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    outcomes = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        for split, prompts in splits.items():
            bar = bars.add_task(f"{split}, prompts", total=len(prompts))
            parts = []
            for start in range(0, len(prompts), portion):
                chunk = prompts[start : start + portion]
                parts.append(sample_split(found, chunk, generator))
                bars.advance(bar, len(chunk))
            distinct = [part.distinct for part in parts if part.distinct is not None]
            outcomes[split] = SplitOutcome(
                parts[0].samples,
                np.concatenate([part.n_correct for part in parts]),
                np.concatenate(distinct) if len(distinct) == len(parts) else None,
                np.concatenate([part.response_length for part in parts]),
                np.concatenate([part.truncated for part in parts]),
            )
    return outcomes


def split_figures(outcome: SplitOutcome, ks: Sequence[int]) -> dict[str, Any]:
    """{"prompts", figure: {"mean", "low", "high"}}: mean over prompts with its bootstrap 95 % interval.

    pass@k is the unbiased estimate per prompt (`trainer.evaluate.pass_at_k`). "solved" is the share of prompts with
    any correct sample. "truncated" is the share of samples cut off at the longest length. The bootstrap resamples
    prompts, because problems differ more than samples of one problem. Under MIN_PROMPTS there is no interval (null).
    """
    from trainer.evaluate import pass_at_k

    values = {f"pass@{k}": pass_at_k(outcome.n_correct, outcome.samples, k) for k in sorted(set(ks))}
    if outcome.distinct is not None:
        values["distinct"] = outcome.distinct.astype(np.float64)
    values["response_length"] = outcome.response_length
    values["truncated"] = outcome.truncated
    found: dict[str, Any] = {"prompts": len(outcome.n_correct), "solved": float(np.mean(outcome.n_correct > 0))}
    for name, each in values.items():
        low, high = bootstrap_interval(each) if len(each) >= MIN_PROMPTS else (None, None)
        found[name] = {"mean": float(each.mean()), "low": low, "high": high}
    return found


def _record(store: Path, run: str, report: dict[str, Any]) -> Path:
    """Appends the report to the list in STORE/evals/RUN.json. The file is replaced by a rename."""
    path = store / "evals" / f"{run}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else []
    part = path.with_suffix(".json.tmp")
    part.write_text(json.dumps([*known, report], indent=1) + "\n")
    part.replace(path)
    return path


def _print(report: dict[str, Any]) -> None:
    print(
        f"{report['subject']} on {report['task']}: {report['samples']} samples of each prompt at temperature "
        f"{report['temperature']:g}, at most {report['max_new_tokens']} tokens, seed {report['seed']}"
    )
    names = [name for split in report["splits"].values() for name in split if name not in ("prompts", "solved")]
    columns = ["split", "prompts", "solved", *dict.fromkeys(names)]
    rows = []
    for split, figures in report["splits"].items():
        cells = [_interval(figures.get(name)) for name in columns[3:]]
        rows.append([split, figures["prompts"], f"{figures['solved']:.1%}", *cells])
    print_table(columns, rows)
    print("In brackets: 95 % bootstrap interval over prompts. solved: share of prompts with any correct sample.")
    for split, figures in report["splits"].items():
        if (share := figures["truncated"]["mean"]) > MANY_TRUNCATED:
            print(
                f"{share:.0%} of the samples of {split} were cut off at {report['max_new_tokens']} tokens and may have "
                "missed their answer. Raise --max-new-tokens."
            )


def _interval(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    interval = "" if figure["low"] is None else f" [{figure['low']:.3g}, {figure['high']:.3g}]"
    return f"{figure['mean']:.3g}{interval}"
