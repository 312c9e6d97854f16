"""What each action on an alert does to a run, against doing nothing: real runs, paired at the step of the alert.

    python -m benchmarks.study_actions --work FOLDER [--jobs 1] [--prone 24 --healthy 10]    trains, resumable
    python -m benchmarks.study_actions --work FOLDER --report                                writes the table

The settings are those of runs of the corpus's development part: collapse-prone ones, which lost rewards or answers
there and were warned of, and healthy ones. Each is trained anew with another seed, so no run is one whose outcome chose
it. At the first alert of severity warning or worse the run is saved. From there it goes on as it is ("nothing"), and
once for each action, through the product's own code (trainer/runtime/actions.py): same weights, optimizer, prompts and
random numbers, so that the arms of a pair differ in the action alone. A run without an alert is the same in all arms.
The action may act again at later alerts, up to its `times`.

Measured at the last step, or for "stop" at the alert's: held-out and out-of-distribution pass@1, pass@8 and the number
of distinct correct answers, on 24 prompts x 16 samples a split, at the temperature of the start.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.bench_detectors import OURS, judge
from benchmarks.corpus.grid import corpus_run
from benchmarks.corpus.labels import outcome
from benchmarks.corpus.load import packed_runs
from benchmarks.harness import RESULTS, provenance, write_rows
from monitor.alerts.actions import (
    Action,
    ClipHigher,
    GoBack,
    HoldEntropy,
    LowerLr,
    RaiseTemperature,
    Stop,
    SwitchWeighting,
)
from monitor.alerts.engine import AlertEngine
from monitor.records import Alert, StepRecord
from monitor.stats.paired import paired_difference
from trainer.config import ConfigError, TrainConfig

NOTHING = "nothing"
ARMS: dict[str, tuple[Action, ...]] = {  # in the order in which they are trained
    NOTHING: (),
    "stop": (Stop(),),
    "go_back, lower_lr": (GoBack(), LowerLr()),
    "lower_lr": (LowerLr(),),
    "hold_entropy": (HoldEntropy(),),
    "switch_weighting": (SwitchWeighting(weighting="entropy_budget"),),
    "clip_higher": (ClipHigher(),),
    "raise_temperature": (RaiseTemperature(),),
    "go_back": (GoBack(),),
}
MEASURES = tuple(f"{split}/{name}" for split in ("heldout", "ood") for name in ("pass@1", "pass@8", "distinct"))
ANOTHER_SEED = 10_000
STEPS = 90
TIME_LEFT = 20  # steps that the first alert must leave, so that an action can do something


class Silent:
    """Takes the place of the Recorder: keeps the events in memory."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def record(self, record: StepRecord, **tables: Any) -> None: ...

    def event(self, kind: str, message: str, step: int | None = None) -> None:
        self.events.append(f"{step}: {message}")

    def flush(self, timeout_s: float) -> bool:
        return True

    def busy(self, what: str) -> Any:
        return nullcontext()


def chosen(prone: int, healthy: int) -> list[tuple[int, str]]:
    """(number of the corpus, "prone" or "healthy"), mixed, so that a part of the study holds both."""
    found: dict[str, list[int]] = {"prone": [], "healthy": []}
    for run in packed_runs("development"):
        seen, number = outcome(run.series), int(run.about["number"])
        if seen.kind == "healthy":
            found["healthy"].append(number)
        elif seen.damaged:
            warned, _, _ = judge(run, OURS["ours"])
            first = min((step for _, step in warned.values()), default=None)
            if first is not None and first + TIME_LEFT <= STEPS:
                found["prone"].append(number)
    settings = [(n, "prone") for n in found["prone"][:prone]] + [(n, "healthy") for n in found["healthy"][:healthy]]
    return sorted(settings)


def settings_of(number: int) -> TrainConfig:
    config = corpus_run(number).config
    evaluation = config.eval.model_copy(update={"every": 20, "splits": ("heldout",)})
    checkpoint = config.checkpoint.model_copy(update={"every": 10, "keep": 1})
    return config.model_copy(
        update={"steps": STEPS, "seed": number + ANOTHER_SEED, "eval": evaluation, "checkpoint": checkpoint}
    )


def study(number: int, part: str, arm: str, work: Path) -> str:
    """Trains one setting in one arm and writes FOLDER/<number>/<arm>.json; the arms need the one that does nothing."""
    from trainer.runtime.actions import check_actions

    config, began, folder = settings_of(number), time.perf_counter(), work / f"{number:03d}"
    row: dict[str, Any] = {"arm": arm, "took": []}
    if arm == NOTHING:
        shutil.rmtree(folder, ignore_errors=True)
        last, at_alert, alerts = _until_the_end(config, folder)
        firing = next((alert for alert in alerts if _counts(alert)), None)
        row |= last | {
            "number": number, "part": part, "steps": config.steps, "seed": config.seed, "at_alert": at_alert,
            "alert_step": firing and firing.step, "rule": firing and firing.rule,
            "severity": firing and firing.severity, "alerts": [asdict(alert) for alert in alerts],
        }  # fmt: skip
    else:
        whole = json.loads((folder / f"{NOTHING}.json").read_text())
        last = {name: whole[name] for name in MEASURES if name in whole}
        alerts = [Alert(**alert) for alert in whole["alerts"]]
        try:
            check_actions(ARMS[arm], config)
        except ConfigError as refused:
            row["refused"] = str(refused)
        else:
            if not alerts:
                row |= last
            elif arm == "stop":
                row |= {"took": [f"{whole['alert_step']}: stop"], **whole["at_alert"]}
            else:
                row |= _from_the_alert(config, folder / "branch", folder / "arm", ARMS[arm], alerts)
    row |= {"seconds": round(time.perf_counter() - began), **provenance(("torch", "transformers"))}
    partial = folder / f"{arm}.partial"
    partial.write_text(json.dumps(row))
    partial.rename(folder / f"{arm}.json")
    return f"{number} {part} {arm}, {row['seconds']} s, pass@1 {row.get('heldout/pass@1')}, {row['took']}"


def _counts(alert: Alert) -> bool:
    return alert.state == "firing" and alert.severity != "info"


def _until_the_end(config: TrainConfig, folder: Path) -> tuple[dict[str, float], dict[str, float], Sequence[Alert]]:
    """Does nothing: (last measures, measures at the alert, its transitions). FOLDER/branch: the run then."""
    from trainer.runtime.actions import Actions
    from trainer.runtime.build import prepare

    parts, found = prepare(config), {}

    class Watching(Actions):
        """Takes no action; saves the run at the first alert."""

        def take(self, alerts: Sequence[Alert]) -> None:
            super().take(alerts)
            step = alerts[0].step
            if not found and any(map(_counts, alerts)) and step + TIME_LEFT <= config.steps:
                self.checkpoints.now(step)
                shutil.copytree(self.checkpoints.folder, folder / "branch")
                found.update(alerts=list(alerts), at=measures(parts))

    _train(config, parts, folder / "whole", (), Watching)
    return measures(parts), found.get("at", {}), found.get("alerts", ())


def _from_the_alert(
    config: TrainConfig, branch: Path, folder: Path, actions: Sequence[Action], alerts: Sequence[Alert]
) -> dict[str, Any]:
    from trainer.runtime.actions import Actions
    from trainer.runtime.build import prepare

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(branch, folder)
    parts = prepare(config)
    took = _train(config, parts, folder, actions, Actions, alerts)
    return {"took": took, **measures(parts)}


def _train(
    config: TrainConfig,
    parts: Any,
    folder: Path,
    wanted: Sequence[Action],
    kind: Any,
    alerts: Sequence[Alert] = (),
) -> list[str]:
    """Trains to the end, from the checkpoint in `folder` if there is one; returns the events."""
    from trainer.errors import NonFiniteError
    from trainer.runtime.action_state import ActionState
    from trainer.runtime.checkpoint import Checkpoints, resume
    from trainer.train import train

    recorder, state = Silent(), ActionState()
    engine = AlertEngine(warmup_steps=config.weighting.warmup_steps, total_steps=config.steps)
    done = resume(folder, parts, engine, state)
    checkpoints = Checkpoints(folder, parts, cast(Any, recorder), engine, config.checkpoint, state)
    if not done:
        checkpoints.now(0)  # as a run with an action that goes back does
    actions = kind(wanted, state, engine, parts, recorder, checkpoints)
    if alerts:
        actions.take(alerts)
    try:
        train(parts, cast(Any, recorder), first=done + 1, after=(actions.after, checkpoints.after))
    except NonFiniteError as error:
        recorder.events.append(str(error))
    return recorder.events


def measures(parts: Any) -> dict[str, float]:
    """The measures of the policy as it is now."""
    from trainer.evaluate import evaluate

    wide = {"prompts": 24, "samples": 16, "k": 8, "splits": ("heldout", "ood")}
    config = parts.config.model_copy(update={"eval": parts.config.eval.model_copy(update=wide)})
    found = evaluate(replace(parts, config=config), 1_000_000)
    return {name: found[f"eval/{name}"] for name in MEASURES if f"eval/{name}" in found}


def report(work: Path) -> None:
    """benchmarks/results/actions.csv: a row for each part, arm and measure, with the paired difference to nothing."""
    studies = [
        {arm: json.loads(path.read_text()) for arm in ARMS if (path := folder / f"{arm}.json").exists()}
        for folder in sorted(work.iterdir())
        if (folder / f"{NOTHING}.json").exists()
    ]
    write_runs(studies)
    rows = []
    for part in ("prone", "healthy"):
        own = [one for one in studies if one[NOTHING]["part"] == part]
        for arm in ARMS:
            pairs = [(one[NOTHING], one[arm]) for one in own if arm in one and "refused" not in one[arm]]
            for measure in MEASURES:
                known = [(old[measure], new[measure]) for old, new in pairs if measure in old and measure in new]
                if not known:
                    continue
                nothing, other = (np.array(values) for values in zip(*known, strict=True))
                gap = paired_difference(nothing, other)
                rows.append({
                    "part": part, "arm": arm, "measure": measure, "pairs": gap.n,
                    "alerted": sum(old["alert_step"] is not None for old, _ in pairs),
                    "acted": sum(any("was not possible" not in text for text in new["took"]) for _, new in pairs),
                    "nothing": f"{nothing.mean():.4f}", "mean": f"{other.mean():.4f}", "difference": f"{gap.mean:.4f}",
                    "low": f"{gap.low:.4f}", "high": f"{gap.high:.4f}", "p": f"{gap.p:.4f}",
                })  # fmt: skip
    write_rows(RESULTS / "actions.csv", rows, ("torch", "transformers", "scipy"))


def write_runs(studies: Sequence[Mapping[str, Any]]) -> None:
    """benchmarks/results/actions_runs.csv: one row for each run and arm, to look a case up."""
    keys = ("number", "part", "seed", "steps", "rule", "severity", "alert_step")
    with (RESULTS / "actions_runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*keys, "arm", *MEASURES, "took", "seconds", "commit"])
        for one in studies:
            for arm, row in one.items():
                took = row.get("refused") or "; ".join(row["took"])
                values = [f"{row[name]:.4f}" if name in row else "" for name in MEASURES]
                about = [one[NOTHING][key] for key in keys]
                writer.writerow([*about, arm, *values, took, row["seconds"], row["commit"]])


def _work(job: tuple[int, str, str, Path]) -> str:
    import torch

    torch.set_num_threads(1)
    return study(*job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the finished studies")
    parser.add_argument("--prone", type=int, default=24)
    parser.add_argument("--healthy", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="write the table of what is finished")
    options = parser.parse_args()
    if options.report:
        report(options.work)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    settings = chosen(options.prone, options.healthy)
    jobs = [(n, part, arm, options.work) for arm in ARMS for n, part in settings]
    jobs = [job for job in jobs if not (options.work / f"{job[0]:03d}" / f"{job[2]}.json").exists()]
    print(f"{len(settings)} settings, {len(jobs)} runs to train.", flush=True)
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=10) as pool:
        for line in pool.imap(_work, jobs):
            print(line, flush=True)


if __name__ == "__main__":
    main()
