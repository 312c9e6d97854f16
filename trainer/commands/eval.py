"""`rlvr eval`: how good, and how varied, a run's final policy or any Hugging Face folder is on a task.

Samples as the run trained (task, temperature, length), so the figures continue those of its evaluations. A run's
result is added to STORE/evals/RUN.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from monitor.commands.output import print_json, print_table
from monitor.errors import MonitorError, UnknownRunError, nearest
from monitor.stats.paired import bootstrap_interval
from monitor.store.runs import get_run, require_store, run_names
from trainer.config import ConfigError, TrainConfig
from trainer.tasks import SPLITS, Prompt, Task, make_task

if TYPE_CHECKING:
    from trainer.evaluate import SplitOutcome
    from trainer.policy.policy import Policy
    from trainer.rewards.scoring import RewardFunction

MIN_PROMPTS = 3  # for an interval, as for a band over seeds


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    """What is evaluated; has the fields that `trainer.evaluate` asks for."""

    config: TrainConfig
    policy: Policy
    task: Task
    reward: RewardFunction


def main(argv: list[str]) -> int:
    """Exit codes: 0 evaluated, 2 wrong use."""
    options = _parser().parse_args(argv)
    try:
        is_run, model, config = subject(options.subject, Path(options.store))
        config = _configured(config, options)
        splits = {split: list(make_task(config.task).prompts(split)) for split in options.split}
        splits = {split: prompts[: options.prompts] for split, prompts in splits.items() if prompts}
        if not splits:
            raise ConfigError(f"{config.task} has no prompts of split {' or '.join(options.split)}.")
        report = evaluate_model(model, config, splits, options.k)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlvr eval", description="Evaluate a run's final policy, or any model.")
    parser.add_argument("subject", help="a run of the store, a Hugging Face folder, or a model as rlvr train takes it")
    parser.add_argument("--store", default="runs", help="folder of the store (default: runs)")
    parser.add_argument("--task", help="chain, reasoning_gym:<dataset> or jsonl:<path> (default: the run's, or chain)")
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=["heldout", "ood", "multipath"],
                        help="splits to evaluate; those that the task lacks are left out")  # fmt: skip
    parser.add_argument("--samples", type=int, default=16, help="samples of each prompt (default: 16)")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 16], help="k of pass@k (default: 1 4 16)")
    parser.add_argument("--prompts", type=int, help="at most so many prompts of each split (default: all)")
    parser.add_argument("--temperature", type=float, help="sampling temperature (default: the run's, or 1)")
    parser.add_argument("--max-new-tokens", type=int, help="longest response (default: the run's, or 56)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def subject(name: str, store: Path) -> tuple[bool, str, TrainConfig]:
    """(whether it is a run, the model to load, how to sample). Raises MonitorError or ConfigError."""
    if (store / "runs" / name / "run.json").is_file():
        stored = dict(get_run(store, name).info.get("config") or {})
        config = TrainConfig.of_run(stored)
        folder = Path(config.save) if config.save else store / "policies" / name
        if not (folder / "config.json").is_file():
            raise UnknownRunError(
                f"Run {name!r} has no final policy at {str(folder)!r}: a run saves one when it ends. Resume it with "
                f"`rlvr train --resume {name}`."
            )
        return True, str(folder), config
    from trainer.policy.sources import resolve_model

    try:
        resolve_model(name)
    except MonitorError as error:
        known = run_names(require_store(store)) if (store / "runs").is_dir() else []
        raise UnknownRunError(f"No run {name!r} in store {str(store)!r}.{nearest(name, known)} {error}") from None
    return False, name, TrainConfig()


def _configured(config: TrainConfig, options: argparse.Namespace) -> TrainConfig:
    tree = config.model_dump()
    tree["task"] = options.task or config.task
    if options.task and options.task != config.task:
        tree["reward"] = None  # the run's own judges another task
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
    return TrainConfig(**(tree | {"seed": options.seed}))


def evaluate_model(
    model: str, config: TrainConfig, splits: dict[str, list[Prompt]], ks: Sequence[int]
) -> dict[str, Any]:
    """The model's figures on each split, with how they were sampled. Plain JSON types."""
    import torch

    from trainer.policy.policy import Policy, pick_device
    from trainer.policy.sources import ensure_model
    from trainer.rewards.loading import checked_rewards, load_reward

    task = make_task(config.task)
    reward = partial(checked_rewards, load_reward(config.reward) if config.reward else task.reward)
    found = _Subject(config, Policy.load(ensure_model(model), pick_device()), task, reward)
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
    """Every split's outcome, drawn in portions of at most rollout.max_batch samples."""
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
            )
    return outcomes


def split_figures(outcome: SplitOutcome, ks: Sequence[int]) -> dict[str, Any]:
    """{"prompts", figure: {"mean", "low", "high"}}: mean over prompts with its bootstrap 95 % interval.

    pass@k is the unbiased estimate per prompt (`trainer.evaluate.pass_at_k`); "solved" is the share of prompts with
    any correct sample. The prompt is the unit that is resampled: it holds all spread between problems, and under
    three prompts there is no interval (null).
    """
    from trainer.evaluate import pass_at_k

    values = {f"pass@{k}": pass_at_k(outcome.n_correct, outcome.samples, k) for k in sorted(set(ks))}
    if outcome.distinct is not None:
        values["distinct"] = outcome.distinct.astype(np.float64)
    values["response_length"] = outcome.response_length
    found: dict[str, Any] = {"prompts": len(outcome.n_correct), "solved": float(np.mean(outcome.n_correct > 0))}
    for name, each in values.items():
        low, high = bootstrap_interval(each) if len(each) >= MIN_PROMPTS else (None, None)
        found[name] = {"mean": float(each.mean()), "low": low, "high": high}
    return found


def _record(store: Path, run: str, report: dict[str, Any]) -> Path:
    """Adds the report to STORE/evals/RUN.json, a list, newest last; replaced by rename."""
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


def _interval(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    interval = "" if figure["low"] is None else f" [{figure['low']:.3g}, {figure['high']:.3g}]"
    return f"{figure['mean']:.3g}{interval}"
