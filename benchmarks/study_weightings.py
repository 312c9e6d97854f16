"""Does weighting tokens help? Arms x learning rates x seeds on the built-in tasks; rows for docs/reproduction.md.

    python -m benchmarks.study_weightings --work FOLDER [--jobs 2] [--part off-policy-test ...]     trains, resumable
    python -m benchmarks.study_weightings --work FOLDER --report                                    writes the rows

Every run is an ordinary `rlvr train` with the preset and the options of SETTINGS. Arms of one seed share base
policy, prompts and sampling seed. Runs that the folder or benchmarks/results/weightings_runs.csv hold are not trained
again, so the study goes on where it was cut off, also on another machine.

The parts, in the order in which they are trained:
- demo: the arms of the demo, and the budget without a ranking, at the usual rate, seeds 0 to 9.
- test: every arm at the setting's usual learning rate, seeds 0 to 4.
- rates: every arm at all three rates, seed 100, which serves no other purpose. An arm's best rate is the one with the
  highest pass@1 + distinct / 16, both held out, mean of the last three evaluations. The rule was written before any
  run.
- faster: uniform and ict_budget at twice the usual rate, seeds 0 to 2: where the budget loses.
- shares: both budgets at four shares of uniform's loss, at the usual rate, seed 100.
- best: arms whose best rate is not the usual one, at their best, seeds 0 to 4.

Evaluations: 40 prompts x 16 samples of each split, every 15 steps, at the rollouts' temperature.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.harness import RESULTS, write_rows
from benchmarks.weightings_tables import Curve, curve, summary
from monitor.queries.alerts import alert_log
from monitor.queries.series import scalar_series, series_of
from monitor.store.tail import Tail
from trainer.commands.train import parse_config
from trainer.compare.arms import parse_arm
from trainer.compare.jobs import Job, run_jobs, settle

ARMS = {  # name -> arm as `rlvr compare` writes it
    "uniform": "uniform",
    "ict 10 %": "ict:keep=0.1",
    "ict_undecided 10 %": "ict_undecided:keep=0.1",
    "random_undecided 10 %": "random_undecided:keep=0.1",
    "top_entropy 20 %": "top_entropy:keep=0.2",
    "entropy_budget .3": "entropy_budget:share=0.3",
    "ict_budget .3": "ict_budget:share=0.3",
    "ict_soft_budget .3": "ict_soft_budget:share=0.3",
    "random_budget .3": "random_budget:share=0.3",
    "opefo": "opefo",
    "entropy bonus": "uniform:loss.entropy_target=0.24",
    "temperature": "uniform:loss.entropy_target=0.24,loss.entropy_actuator=temperature",
    "clip-higher": "uniform:loss.clip_high=0.4",
    "KL": "uniform:loss.kl_coef=0.02",
}
SHARED = (
    "--steps", "150", "--eval.every", "15", "--eval.prompts", "40", "--eval.samples", "16", "--eval.k", "16",
    "--record.tokens-every", "1000", "--record.probe-every", "0", "--checkpoint.every", "0", "--threads", "1",
)  # fmt: skip
SETTINGS = {  # name -> preset and options; with two epochs a step's second update is off-policy
    "off-policy": ("demo", "--rollout.temperature", "0.6", "--optim.epochs", "2"),
    "on-policy": ("demo", "--rollout.temperature", "1", "--optim.epochs", "1"),
    "paths": ("paths", "--rollout.temperature", "0.6", "--optim.epochs", "2"),  # the second task
}
USUAL = {"off-policy": "1e-4", "on-policy": "3e-4", "paths": "1e-4"}
RATES = ("3e-5", "1e-4", "3e-4")
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (100,)
DEMO_SEEDS = tuple(range(10))
DEMO_ARMS = ("uniform", "ict_budget .3", "entropy_budget .3")
FASTER_LR, FASTER_SEEDS = "2e-4", (0, 1, 2)
SHARES = tuple(f"{kind} {share}" for kind in ("entropy_budget", "ict_budget") for share in (".1", ".3", ".5", ".7"))
NO_RATIO = {"clip-higher"}  # arms that are uniform with one update a step
PARTS = (
    "off-policy-demo", "off-policy-test", "paths-test", "on-policy-test", "off-policy-faster", "off-policy-shares",
    "off-policy-rates", "on-policy-rates", "off-policy-best", "on-policy-best",
)  # fmt: skip
FIGURES = tuple(
    f"{split}/{name}" for split in ("heldout", "ood", "multipath") for name in ("pass@1", "pass@16", "distinct")
)
TRAINING = ("entropy", "reward", "budget_share")  # mean over the steps since the last evaluation
COLUMNS = ("setting", "arm", "lr", "seed", "step", *FIGURES, *TRAINING, "first_warning", "commit")
ROWS = RESULTS / "weightings_runs.csv"


@dataclass(frozen=True)
class Run:
    """One run of the study."""

    setting: str
    arm: str
    lr: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting}-{parse_arm(self.text).slug}-lr{self.lr}-s{self.seed}"

    @property
    def text(self) -> str:
        """The arm as `rlvr compare` writes it."""
        kind, _, share = self.arm.partition(" ")
        return ARMS.get(self.arm) or f"{kind}:share=0{share}"

    def job(self, store: Path) -> Job:
        """The run as a process to start, given what the store holds of it. Raises ConfigError."""
        options = [*SETTINGS[self.setting], *SHARED, "--optim.lr", self.lr, "--seed", str(self.seed)]
        options += ["--comparison", f"{self.setting}-lr{self.lr}", "--store", str(store)]
        options += parse_arm(self.text).options()
        return settle(store, self.name, options, parse_config(options))


def part_of_study(name: str, best: dict[tuple[str, str], str]) -> Iterator[Run]:
    """The runs of one of PARTS, ordered by seed, so that a part that is cut off holds whole pairs."""
    setting, _, part = name.rpartition("-")
    usual = USUAL[setting]
    if part == "demo":
        for arms in (DEMO_ARMS[:2], DEMO_ARMS[2:]):
            yield from (Run(setting, arm, usual, seed) for seed in DEMO_SEEDS for arm in arms)
    elif part == "faster":
        yield from (Run(setting, arm, FASTER_LR, seed) for seed in FASTER_SEEDS for arm in DEMO_ARMS[:2])
    elif part == "shares":
        yield from (Run(setting, arm, usual, seed) for seed in TUNING_SEEDS for arm in SHARES)
    else:
        for seed in TUNING_SEEDS if part == "rates" else SEEDS:
            for arm in ARMS if setting != "on-policy" else (arm for arm in ARMS if arm not in NO_RATIO):
                lrs = {"rates": RATES, "test": (usual,)}.get(part, {best.get((setting, arm), usual)} - {usual})
                yield from (Run(setting, arm, lr, seed) for lr in lrs)


def score(rows: Sequence[dict[str, str]]) -> float:
    """pass@1 + distinct / 16, held out, mean of the last three evaluations of one run: what a rate is chosen by."""
    last = sorted(rows, key=lambda row: int(row["step"]))[-3:]
    return float(np.mean([float(row["heldout/pass@1"]) + float(row["heldout/distinct"]) / 16 for row in last]))


def best_rates(known: dict[Run, list[dict[str, str]]]) -> dict[tuple[str, str], str]:
    """{(setting, arm): its best rate} of the arms that have all their runs of the part "rates"."""
    found = {}
    for setting in SETTINGS:
        for arm in ARMS:
            runs = {lr: [Run(setting, arm, lr, seed) for seed in TUNING_SEEDS] for lr in RATES}
            if all(run in known for of in runs.values() for run in of):
                scores = {lr: np.mean([score(known[run]) for run in of]) for lr, of in runs.items()}
                found[setting, arm] = max(scores, key=lambda lr: scores[lr])
    return found


def finished_rows(path: Path) -> dict[Run, list[dict[str, str]]]:
    """{run: its rows} of a file of rows; {} where there is none."""
    found: dict[Run, list[dict[str, str]]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as source:
            for row in csv.DictReader(source):
                run = Run(row["setting"], row["arm"], row["lr"], int(row["seed"]))
                found.setdefault(run, []).append(row)
    return found


def collect(store: Path, runs: Sequence[Run]) -> dict[Run, list[dict[str, str]]]:
    """{run: a row for each evaluation} of the runs that the store holds and that are finished."""
    if not (store / "runs").exists():
        return {}
    tail = Tail(store)
    tail.poll()
    con, found = tail.cursor(), {}
    for run in runs:
        entry = tail.runs.get(run.name)
        if entry is None or entry.status != "finished":
            continue
        names = [*(f"eval/{name}" for name in FIGURES), *TRAINING]
        series = scalar_series(con, [run.name], names, max_points=10**9)
        log = alert_log(con, [run.name])
        warned = (log["state"] == "firing") & (log["severity"] != "info")
        first = str(int(log["step"][warned].min())) if warned.any() else ""
        steps, _ = series_of(series, run.name, f"eval/{FIGURES[0]}")
        commit = entry.info["environment"]["commit"][:7]
        found[run] = [
            {"setting": run.setting, "arm": run.arm, "lr": run.lr, "seed": str(run.seed), "step": str(int(step))}
            | {name: _at(series_of(series, run.name, f"eval/{name}"), step, step) for name in FIGURES}
            | {name: _at(series_of(series, run.name, name), before + 1, step) for name in TRAINING}
            | {"first_warning": first, "commit": commit}
            for before, step in zip([-1, *steps[:-1]], steps, strict=True)
        ]
    tail.close()
    return found


def known_runs(store: Path) -> dict[Run, list[dict[str, str]]]:
    """{run: its rows} of what is committed and what the store holds."""
    known = finished_rows(ROWS)
    for parts in (PARTS[:-2], PARTS[-2:]):  # which runs the last two have follows from the rates of the others
        known |= collect(store, [run for part in parts for run in part_of_study(part, best_rates(known))])
    return known


def _at(series: tuple[np.ndarray, np.ndarray], first: float, last: float) -> str:
    """Mean of the values from step `first` to `last`; "" where there is none."""
    steps, values = series
    inside = values[(steps >= first) & (steps <= last)]
    return f"{inside.mean():.5g}" if len(inside) else ""


def write(rows: dict[Run, list[dict[str, str]]]) -> None:
    """benchmarks/results: weightings_runs.csv, a row for each evaluation, and weightings.csv, arms against uniform."""
    best = best_rates(rows)
    order = {run: i for i, run in enumerate(run for part in PARTS for run in part_of_study(part, best))}
    with ROWS.open("w", newline="", encoding="utf-8") as sink:
        writer = csv.DictWriter(sink, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for run in sorted(rows, key=lambda run: order.get(run, len(order))):
            writer.writerows(rows[run])
    print(f"{len(rows)} runs in {ROWS}")
    found: list[dict[str, Any]] = []
    for setting, usual in USUAL.items():
        best_lrs = {arm: best[setting, arm] for arm in ARMS if (setting, arm) in best}
        for rate, lrs, seeds in (
            ("usual", dict.fromkeys(ARMS, usual), SEEDS),
            ("best", best_lrs, SEEDS),
            ("demo", dict.fromkeys(DEMO_ARMS if setting == "off-policy" else (), usual), DEMO_SEEDS),
            ("faster", dict.fromkeys(DEMO_ARMS[:2] if setting == "off-policy" else (), FASTER_LR), FASTER_SEEDS),
            ("shares", dict.fromkeys(("uniform", *SHARES) if setting == "off-policy" else (), usual), TUNING_SEEDS),
        ):
            known = {arm: of for arm, lr in lrs.items() if (of := _curves(rows, setting, arm, lr, seeds))}
            if "uniform" in known and len(known) > 1:
                found += summary(setting, rate, known, lrs)
    write_rows(RESULTS / "weightings.csv", found, ("torch", "transformers", "scipy"))


def _curves(
    rows: dict[Run, list[dict[str, str]]], setting: str, arm: str, lr: str, seeds: Sequence[int]
) -> dict[int, Curve]:
    """{seed: curve} of the runs that are finished."""
    runs = {seed: Run(setting, arm, lr, seed) for seed in seeds}
    return {seed: curve(rows[run]) for seed, run in runs.items() if run in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="store of the runs")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="write the rows of what is finished")
    options = parser.parse_args()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    failed: list[str] = []
    for part in options.part:
        known = known_runs(options.work)
        if options.report:
            write(known)
            return 0
        runs = [run for run in part_of_study(part, best_rates(known)) if run not in known]
        console.print(f"{part}: {len(runs)} runs to train.")
        (options.work / "runs").mkdir(parents=True, exist_ok=True)
        failed += run_jobs(options.work, [run.job(options.work) for run in runs], options.jobs, [], console)
        shutil.rmtree(options.work / "policies", ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
