"""`rlvr compare`: trains every arm with every seed, each run in a process of its own, and prints the paired table.

All arms of a seed start from the same base policy, prompts and sampling seed; only the arm's own settings differ.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from monitor.children import RLVR, child_environment
from monitor.commands.comparison_table import markdown, print_tables
from monitor.commands.parsing import parse_known
from monitor.errors import MonitorError
from monitor.queries.series import latest_scalars
from monitor.stats.comparison import load_comparison, paired_comparison, save_comparison
from monitor.store.tail import Tail
from trainer.commands.train import parse_config
from trainer.compare.arms import GRAMMAR, Arm, arm_config, both_normalisations, parse_arms
from trainer.compare.jobs import Job, cores, devices, run_jobs, settle, stopped_by_alert
from trainer.config import ConfigError, TrainConfig
from trainer.runtime.children import interrupts_raise

OWN = ("seed", "run", "comparison", "save", "weighting.kind")  # options of `rlvr train` that this command sets itself
HELP = f"""Train every arm with every seed and compare the arms, paired by seed.

rlvr compare [CONFIG.toml or preset] --arms uniform ict random [options of rlvr train, for all arms]

{GRAMMAR} Keys: keep, lr, normalise, warmup_steps, or any
dotted option of the groups weighting, loss, optim, signals. The first arm is the baseline. Runs are called
COMPARISON-ARM-sSEED. The same command, run again, skips finished runs and those that an alert stopped, and resumes
interrupted ones. The result is printed and stored as STORE/comparisons/COMPARISON.json, .csv and .html."""


@dataclass(frozen=True)
class Options:
    """See HELP."""

    arms: tuple[str, ...] = ("uniform", "ict", "random")  # what is compared; the first is the baseline
    seeds: tuple[int, ...] = (3,)  # one number: how many seeds (3 means 0 1 2); several numbers: the seeds themselves
    jobs: int | None = None  # runs at a time; none: one for each CUDA device, or without CUDA for each core
    comparison: str = "compare"  # name of the comparison
    store: str | None = None  # folder of the store; none: the configuration's
    # run each sparse arm twice: with weighting.normalise=selected, where the sum of weights over the loss's denominator
    # is 1 as in the dense update, and with =all, where it is the kept share (a tenth at keep=0.1). Step size cannot
    # explain a difference between uniform and the first; only step size can explain one between the two. AdamW divides
    # the gradient's scale out again, so with it the two differ only through gradient clipping, the KL term and epsilon
    matched_step_size: bool = False
    show: Annotated[str | None, tyro.conf.arg(metavar="COMPARISON")] = None  # train nothing: print a stored comparison
    markdown: bool = False  # print the tables as Markdown


def main(argv: list[str]) -> int:
    """Exit codes: 0 every run finished or an alert stopped it, 1 a run failed, 2 wrong use, 130 stopped by Ctrl-C."""
    console = Console(highlight=False, markup=False, emoji=False, stderr=True, soft_wrap=True)
    try:
        options, extras = _parse(argv)
        if options.show:
            comparison = load_comparison(Path(options.store or "runs"), options.show)
            print(markdown(comparison)) if options.markdown else print_tables(comparison)
            return 0
        base = parse_config(extras)
        arms = parse_arms(options.arms)
        if options.matched_step_size:
            arms = both_normalisations(arms, base)
        cuda = devices()
        grid = plan(base, extras, arms, _seeds(options.seeds), options.comparison, on_cpu=not cuda)
    except (ConfigError, MonitorError) as error:
        print(f"rlvr compare: {error}", file=sys.stderr)
        return 2
    store = Path(base.store)
    jobs = list(grid.values())
    at_once = options.jobs or len(cuda) or cores()
    done = sum(job.todo == "nothing" for job in jobs)
    console.print(
        f"Comparison {options.comparison}: {len(arms)} arms x {len(jobs) // len(arms)} seeds of {base.steps} steps, "
        f"{len(jobs) - done} runs to do, {min(at_once, len(jobs))} at a time. Store {store}."
    )
    (store / "runs").mkdir(parents=True, exist_ok=True)
    interrupts_raise()
    try:
        failed = run_jobs(store, jobs, at_once, cuda, console)
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from here.")
        return 130
    _conclude(store, options, base, arms, grid, failed, console)
    return 1 if failed else 0


def _parse(argv: list[str]) -> tuple[Options, list[str]]:
    """This command's own options, and the rest for `rlvr train` with CONFIG first. Raises ConfigError if they clash."""
    config = argv[:1] if argv and not argv[0].startswith("-") else [a for a in argv if a.endswith(".toml")][:1]
    rest = list(argv)
    if config:
        rest.remove(config[0])
    options, extras = parse_known(Options, rest, "compare", HELP)
    for text in extras:
        option = text.removeprefix("--").partition("=")[0].replace("-", "_")
        if text.startswith("--") and option in OWN:
            raise ConfigError(f"{text.partition('=')[0]} is set for every run by rlvr compare: use --arms and --seeds.")
    if options.jobs is not None and options.jobs < 1:
        raise ConfigError(f"--jobs is {options.jobs}, expected at least 1.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", options.comparison):
        raise ConfigError(
            f"--comparison is {options.comparison!r}, expected letters, digits, dots, dashes, underscores."
        )
    store = ["--store", options.store] if options.store else []
    return options, [*config, *extras, *store]


def _seeds(given: Sequence[int]) -> list[int]:
    """One number is how many seeds: 5 -> 0 1 2 3 4. Several numbers are the seeds themselves."""
    seeds = list(range(given[0])) if len(given) == 1 else list(given)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"--seeds is {' '.join(map(str, given))}, expected how many seeds (3 means 0 1 2), or several "
            "different seeds of 0 or more."
        )
    return seeds


def plan(
    base: TrainConfig, options: Sequence[str], arms: Sequence[Arm], seeds: Sequence[int], name: str, *, on_cpu: bool
) -> dict[tuple[str, int], Job]:
    """{(arm, seed): job}, ordered by seed, so that an interrupted comparison has whole pairs. Raises ConfigError."""
    if base.save or base.run:
        raise ConfigError(
            f"save is {base.save!r} and run is {base.run!r} in the configuration, but a comparison has many runs and "
            "names each itself. Remove both settings."
        )
    threads = ["--threads", "1"] if on_cpu and base.threads is None else []
    grid: dict[tuple[str, int], Job] = {}
    for seed in seeds:
        for arm in arms:
            config = arm_config(base, arm, seed=seed, comparison=name)
            arguments = [*options, *threads, *arm.options(), "--seed", str(seed), "--comparison", name]
            grid[arm.text, seed] = settle(Path(base.store), f"{name}-{arm.slug}-s{seed}", arguments, config)
    return grid


def _conclude(
    store: Path,
    options: Options,
    base: TrainConfig,
    arms: Sequence[Arm],
    grid: dict[tuple[str, int], Job],
    failed: Sequence[str],
    console: Console,
) -> None:
    """Computes, stores and prints the paired table of the runs that finished, or that an alert stopped."""
    runs = {arm.text: {seed: job.run for (text, seed), job in grid.items() if text == arm.text} for arm in arms}
    tail = Tail(store, histograms=False)
    tail.poll()
    recorded = set(latest_scalars(tail.cursor(), [job.run for job in grid.values()])["run"])
    good = recorded - set(failed)
    usable = {arm: {seed: run for seed, run in of.items() if run in good} for arm, of in runs.items()}
    configs = {run: dict(entry.info.get("config") or {}) for run, entry in tail.runs.items()}
    comparison = paired_comparison(tail.cursor(), options.comparison, usable, configs, k=base.eval.k, failed=failed)
    tail.close()
    steps = {run: stopped_by_alert(store, run) for of in usable.values() for run in of.values()}
    comparison["stopped"] = {run: step for run, step in steps.items() if step is not None}
    path = save_comparison(store, comparison)
    print(markdown(comparison)) if options.markdown else print_tables(comparison)
    done = subprocess.run(
        [*RLVR, "report", options.comparison, str(store)],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
    )
    written = ".csv, .html" if done.returncode == 0 else f".csv; no report: {done.stderr.strip()}"
    console.print(f"Stored: {path}, {written}")
    if failed:
        console.print(f"Failed: {', '.join(failed)}. See {store / 'logs'}. The other runs are compared.", style="red")
