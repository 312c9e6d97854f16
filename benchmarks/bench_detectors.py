"""How often the alert rules are right on real runs: ours beside rlwatch and rl-doctor, from the corpus.

    python -m benchmarks.bench_detectors [--work FOLDER] [--part development test] [--peers PEERS]

Runs come from sample_runs/corpus (or, while it is being made, from FOLDER of benchmarks.corpus.make); what became of
them says benchmarks/corpus/labels.py from held-out evaluations alone. A run is warned in time if its first alert of
severity warning or worse comes before the step of damage. Rules are judged live: one step at a time, nothing of the
future. "ours" has every recorded series, "ours, training only" no evaluations, "ours, entropy and reward" those two.
PEERS: the folder with rows-PART.csv of benchmarks.corpus.peers (benchmarks/results/peers).

Writes benchmarks/results/detectors.csv, detectors_runs.csv (one row a run, to look a case up), the columns of it that
the dashboard shows to monitor/alerts/judged_runs.csv, and, for the development part, monitor/alerts/rates.json, which
the verdict cites. The test part is for a rule set that is settled: docs/log.md
says when it was looked at.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from benchmarks.corpus.labels import Outcome, outcome
from benchmarks.corpus.load import PARTS, Recorded, judged_runs, working_runs
from benchmarks.harness import RESULTS, write_rows
from monitor.alerts.judged_runs import COLUMNS, JUDGED_RUNS
from monitor.alerts.judgement import RATES
from monitor.alerts.replay import observe_all
from monitor.alerts.rules import RULES
from monitor.records import SEVERITY_RANK

LATE_DAMAGE = 30  # damage from this step on leaves a rule with a baseline of 20 rows the time to warn
OURS = {
    "ours": lambda key: True,
    "ours, training only": lambda key: not key.startswith("eval/"),
    "ours, entropy and reward": lambda key: key in ("step", "entropy", "reward"),
}
Warned = dict[str, tuple[str, int]]  # rule -> (worst severity, step of its first alert of severity warning or worse)


@dataclass(frozen=True, slots=True)
class Judged:
    """One run as one detector judged it. alerts: how many episodes of severity warning or worse."""

    run: str
    part: str
    outcome: Outcome
    warned: Warned
    alerts: int = 0

    @property
    def first(self) -> int | None:
        return min((step for _, step in self.warned.values()), default=None)

    @property
    def critical(self) -> bool:
        return any(severity == "critical" for severity, _ in self.warned.values())


def judge(run: Recorded, sees: Any) -> tuple[Warned, int, float]:
    """(what our rules warned of, episodes, seconds a step) on the series that `sees` lets through."""
    series: dict[str, Any] = {
        key: [None if math.isnan(value) else float(value) for value in values]
        for key, values in run.series.items()
        if key != "step" and sees(key)
    }
    series["step"] = [int(step) for step in run.series["step"]]
    warmup = int(run.about["config"]["weighting"]["warmup_steps"])
    began = time.perf_counter()
    _, alerts = observe_all(series, warmup_steps=warmup)
    seconds = (time.perf_counter() - began) / len(series["step"])
    warned: Warned = {}
    episodes = set()
    for alert in alerts:
        if alert.state == "firing" and SEVERITY_RANK[alert.severity] >= SEVERITY_RANK["warning"]:
            episodes.add((alert.rule, alert.first_step))
            severity, step = warned.get(alert.rule, (alert.severity, alert.step))
            worse = max(severity, alert.severity, key=SEVERITY_RANK.__getitem__)
            warned[alert.rule] = (worse, step)
    return warned, len(episodes), seconds


def peer_rows(folder: Path, part: str) -> dict[str, dict[str, Warned]]:
    """{detector: {run: what it warned of}} of a peer's rows."""
    found: dict[str, dict[str, Warned]] = defaultdict(dict)
    with (folder / f"rows-{part}.csv").open() as file:
        for row in csv.DictReader(file):
            warned = found[row["detector"]].setdefault(row["run"], {})
            if SEVERITY_RANK.get(row["severity"], 1) >= SEVERITY_RANK["warning"]:
                severity, step = warned.get(row["rule"], (row["severity"], int(row["step"])))
                warned[row["rule"]] = (severity, min(step, int(row["step"])))
    return found


def groups(judged: Sequence[Judged]) -> Iterable[tuple[str, list[Judged]]]:
    """The runs by outcome, and the damaged ones together and by when."""
    kinds = ("healthy", "stall", "no_signal", "unclear", "reward_lost", "diversity_lost")
    yield from ((kind, [one for one in judged if one.outcome.kind == kind]) for kind in kinds)
    damaged = [one for one in judged if one.outcome.damaged]
    yield "damaged", damaged
    late = [one for one in damaged if (one.outcome.damage_step or 0) >= LATE_DAMAGE]
    yield f"damaged from step {LATE_DAMAGE}", late


def row_of(detector: str, part: str, group: str, runs: Sequence[Judged]) -> dict[str, Any]:
    """Counts and rates of one detector on one group; the interval is Wilson's, 95 %.

    rate: of damaged runs the share warned in time, of others the share warned at all.
    """
    damaged = group.startswith(("damaged", "reward", "diversity"))
    in_time = [one for one in runs if one.first is not None and one.first < (one.outcome.damage_step or math.inf)]
    leads = [1 - (one.first or 0) / (one.outcome.damage_step or 1) for one in in_time] if damaged else []
    counted = len(in_time) if damaged else sum(one.first is not None for one in runs)
    interval = binomtest(counted, len(runs)).proportion_ci(method="wilson") if runs else (math.nan, math.nan)
    return {
        "detector": detector,
        "part": part,
        "group": group,
        "runs": len(runs),
        "warned": sum(one.first is not None for one in runs),
        "critical": sum(one.critical for one in runs),
        "in_time": len(in_time) if damaged else "",
        "late": sum(one.first is not None for one in runs) - len(in_time) if damaged else "",
        "silent": sum(one.first is None for one in runs),
        "rate": round(counted / len(runs), 3) if runs else "",
        "low": round(interval[0], 3) if runs else "",
        "high": round(interval[1], 3) if runs else "",
        "median_lead": round(float(np.median(leads)), 3) if leads else "",
        "alerts_a_run": round(float(np.mean([one.alerts for one in runs])), 2) if runs else "",
    }


def by_rule(judged: Sequence[Judged], part: str) -> list[dict[str, Any]]:
    """For each of our rules alone: a row for each group."""
    return [
        row_of(rule, part, group, [
            Judged(one.run, part, one.outcome, {rule: one.warned[rule]} if rule in one.warned else {}) for one in runs
        ])
        for rule in RULES
        for group, runs in groups(judged)
        if runs
    ]  # fmt: skip


def rates(judged: Sequence[Judged]) -> dict[str, dict[str, int]]:
    """{rule: runs in which it fired, and of them damaged or without a signal}; unclear ones count on no side."""
    found: dict[str, dict[str, int]] = {}
    for rule in RULES:
        fired = [one for one in judged if rule in one.warned and one.outcome.kind != "unclear"]
        bad = sum(one.outcome.damaged or one.outcome.kind == "no_signal" for one in fired)
        found[rule] = {"fired": len(fired), "bad": bad}
    return found


def run_rows(judged: Sequence[Judged], configs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "run": one.run,
            "part": one.part,
            "outcome": one.outcome.kind,
            "damage_step": one.outcome.damage_step if one.outcome.damaged else "",
            "first_warning": "" if one.first is None else one.first,
            "warned": " ".join(
                f"{rule}@{step}" for rule, (_, step) in sorted(one.warned.items(), key=lambda w: w[1][1])
            ),
            "model": configs[one.run]["model"],
            "task": configs[one.run]["task"],
            "weighting": configs[one.run]["weighting"]["kind"],
            "lr": configs[one.run]["optim"]["lr"],
            "epochs": configs[one.run]["optim"]["epochs"],
            "entropy_coef": configs[one.run]["loss"]["entropy_coef"],
            "temperature": configs[one.run]["rollout"]["temperature"],
        }
        for one in judged
    ]


def write_judged(rows: Sequence[Mapping[str, Any]]) -> None:
    """What the dashboard shows of the runs behind a rule's rates."""
    with JUDGED_RUNS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of benchmarks.corpus.make; none: sample_runs/corpus")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peers", type=Path, default=RESULTS / "peers", help="folder with rows-PART.csv")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []
    for part in options.part:
        runs = list(working_runs(options.work, part) if options.work else judged_runs(part))
        outcomes = {run.name: outcome(run.series) for run in runs}
        configs = {run.name: run.about["config"] for run in runs}
        costs = []
        for detector, sees in OURS.items():
            judged = []
            for run in runs:
                warned, episodes, seconds = judge(run, sees)
                judged.append(Judged(run.name, part, outcomes[run.name], warned, episodes))
                costs.append(seconds)
            rows += [row_of(detector, part, group, some) for group, some in groups(judged)]
            if detector == "ours":
                rows += by_rule(judged, part)
                seen += run_rows(judged, configs)
                if part == "development":
                    RATES.write_text(json.dumps(rates(judged), indent=1) + "\n")
        if (options.peers / f"rows-{part}.csv").exists():
            for detector, found in peer_rows(options.peers, part).items():
                judged = [Judged(name, part, outcomes[name], found.get(name, {})) for name in outcomes]
                rows += [row_of(detector, part, group, some) for group, some in groups(judged)]
        print(f"{part}: {len(runs)} runs; all rules take {1e3 * np.median(costs):.2f} ms a step (median)")
    write_rows(RESULTS / "detectors.csv", rows, ("numpy", "scipy"))
    write_rows(RESULTS / "detectors_runs.csv", seen, ("numpy", "scipy"))
    if set(options.part) == set(PARTS):
        write_judged(seen)


if __name__ == "__main__":
    main()
