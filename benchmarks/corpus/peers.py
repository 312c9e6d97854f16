"""rlwatch 0.5.1 and rl-doctor 0.2.0 on the corpus, live: at their defaults and at their best tuning.

    python -m venv PEERS
    PEERS/bin/python -m pip install rlwatch==0.5.1 rldoctor==0.2.0
    python -m benchmarks.corpus.peers --peers PEERS --part development --tune
    python -m benchmarks.corpus.peers --peers PEERS --part test

PEERS is an environment of the peers' own: ours needs neither. The runs are those of sample_runs/corpus, or with --work
FOLDER those that `make.py` has finished there. The first command chooses the settings on the development part and
writes them to peers.json; the second applies them. Both write PEERS/rows-PART.csv: run, detector, rule, severity and
step of everything that a peer told its user.

Each run is fed record by record, with every metric that the peer knows and the run has (`peer_process.py`). A run is
warned from the first warning or worse of any rule. Tuned are the settings that the peers document and that bear on
these runs, each detector's switch among them: as many damaged runs as possible warned before the damage, with at most
5 % (and, apart, 1 %) of the healthy runs warned. Runs of other outcomes (`labels.py`: no_signal, stall, unclear) are
judged too, but count on neither side.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.corpus.choosing import Choice, Labels, choose
from benchmarks.corpus.labels import Outcome, outcome
from benchmarks.corpus.load import Recorded, judged_runs, working_runs
from benchmarks.corpus.peer_process import VERSIONS

CHOSEN = Path(__file__).with_name("peers.json")
PROCESS = Path(__file__).with_name("peer_process.py")
RUNS_A_PROCESS = 8  # what is judged is kept after so many
LIMITS = {"tuned": 0.05, "tuned, 1 %": 0.01}  # share of the healthy runs that may be warned

Series = Mapping[str, np.ndarray]
Settings = dict[str, Any]  # see peer_process.py
DEFAULTS: Settings = {"rules": {}, "off": [], "monitor": {}}

# The peers' names of our metrics. rlwatch: the arguments of log_step, the advantages' deviation and the single rewards
# aside, which the corpus lacks. rl-doctor: the keys that TRL logs, and one of its names of a held-out score.
METRICS = {
    "rlwatch": {
        "entropy": "entropy", "kl_divergence": "kl", "reward_mean": "reward", "reward_std": "reward_std",
        "loss": "loss", "learning_rate": "lr", "clip_fraction": "clip_share", "grad_norm": "grad_norm",
    },
    "rldoctor": {
        "reward": "reward", "reward_std": "reward_std", "frac_reward_zero_std": "zero_variance_share",
        "entropy": "entropy", "kl": "kl", "clip_ratio/region_mean": "clip_share", "clip_ratio/low_mean":
        "clip_share_low", "clip_ratio/high_mean": "clip_share_high", "grad_norm": "grad_norm", "learning_rate": "lr",
        "loss": "loss", "completions/mean_length": "response_length", "completions/clipped_ratio": "truncated_share",
        "eval/accuracy": "eval/heldout/pass@1",
    },
}  # fmt: skip


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of the values, {} (the defaults) first."""
    return [{}, *(dict(zip(values, some, strict=True)) for some in itertools.product(*values.values()))]


def together(*names: str, values: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Settings that move together: a warning and its critical."""
    return [{}, *(dict(zip(names, some, strict=True)) for some in values)]


# What is tried for each rule, beside switching it off. rlwatch's are fields of its configuration; a warning comes at
# half of consecutive_steps. rl-doctor's are the constants that its README offers, named as in its modules.
RULES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "rlwatch": {
        "entropy_collapse": grid(
            threshold=(0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.01),
            consecutive_steps=(2, 6, 10, 20, 30), warmup_steps=(20, 1),
        ),
        "kl_explosion": grid(
            sigma_multiplier=(3, 4, 5, 6, 8, 12, 20), rolling_window=(20, 50, 100), warmup_steps=(10, 20, 50),
            baseline_mode=("rolling", "frozen"),
        ),
        "reward_hacking": grid(variance_multiplier=(1.5, 2, 3, 4, 6, 10), warmup_steps=(20, 30, 50)),
        "gradient_norm_spike": grid(
            sigma_multiplier=(3, 4, 5, 6, 8, 12, 20), rolling_window=(20, 50, 100), warmup_steps=(10, 20, 50),
            baseline_mode=("frozen", "rolling"),
        ),
        "reward_mean_drift": grid(
            consecutive_steps=(3, 4, 5, 6, 8, 10), warmup_steps=(1, 10, 20, 50),
            min_drift_magnitude=(0.05, 0.1, 0.2, 0.3),
        ),
    },
    "rldoctor": {
        "advantage_collapse": together("_WARN", "_CRIT", values=[(0.6, 0.8), (0.7, 0.85), (0.8, 0.9), (0.9, 0.95)]),
        "entropy_collapse": grid(_FLOOR_FRAC=(0.01, 0.02, 0.05, 0.2, 0.3, 0.5)),
        "reward_hacking": together("_GAP_WARN", "_GAP_CRIT", values=[(0.5, 1.0), (1.0, 2.0), (2.0, 4.0)]),
        "length_pathology": together(
            "_TRUNC_WARN", "_TRUNC_CRIT", values=[(0.1, 0.2), (0.2, 0.4), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9)]
        ),
        "clip_saturation": together("_CLIP_WARN", "_CLIP_CRIT", values=[(0.02, 0.05), (0.05, 0.1), (0.1, 0.2)]),
        "kl_drift": together(
            "_KL_HIGH", "_KL_EXTREME", "_KL_FLAT",
            values=[(0.5, 2.0, 0.0), (0.02, 0.05, 0.0), (0.05, 0.2, 0.0), (0.1, 0.5, 0.0), (1.0, 4.0, 0.0)],
        ),
        "gradient_pathology": together(
            "_SPIKE_SIGMA", "_VANISH_RATIO", "_ZERO_STEP_WARN",
            values=[(8, 0.02, 0.4), (8, 0.1, 0.4), (12, 0.05, 0.4), (20, 0.02, 0.7), (5, 0.1, 0.2)],
        ),
        "plateau": together(
            "_WINDOW_FRAC", "_MIN_WINDOW", values=[(0.2, 12), (0.5, 12), (0.7, 12), (0.35, 20), (0.5, 30)]
        ),
    },
}  # fmt: skip

# How often rl-doctor looks, from when on, and what it interrupts for. All of it follows from one run that looks often.
MONITORS: dict[str, list[dict[str, Any]]] = {
    "rlwatch": [{}],
    "rldoctor": grid(check_every=(1, 5, 10, 25), min_steps=(8, 15, 20, 30, 40, 60), alert_at=("WARNING", "CRITICAL")),
}
LOOKS_OFTEN: dict[str, dict[str, Any]] = {"rlwatch": {}, "rldoctor": {"check_every": 1, "min_steps": 8}}
RLDOCTOR_DEFAULTS = {"check_every": 25, "min_steps": 60, "alert_at": "WARNING"}


class Found(NamedTuple):
    """What a peer found at one step: said to its user, or found again and kept quiet."""

    rule: str
    severity: str  # "warning" or "critical"
    step: int
    seen: int  # records so far
    said: bool


@dataclass(frozen=True, slots=True)
class PeerRun:
    """A run as the peers get it, and what became of it."""

    name: str
    outcome: Outcome
    config: dict[str, Any]
    records: dict[str, list[dict[str, float]]]  # by peer


def labels_of(runs: Sequence[PeerRun]) -> Labels:
    damages = [np.inf if run.outcome.damage_step is None else float(run.outcome.damage_step) for run in runs]
    return Labels(np.array(damages), np.array([run.outcome.kind == "healthy" for run in runs]))


class PeersError(RuntimeError):
    """The peers do not run in their environment: it is not there, holds other versions, or they raised."""


def read_runs(work: Path | None, part: str) -> list[PeerRun]:
    """The finished runs of one part, or the packed ones; those of the other part are not read."""
    return [peer_run(recorded) for recorded in (working_runs(work, part) if work else judged_runs(part))]


def peer_run(recorded: Recorded) -> PeerRun:
    records = {peer: records_of(recorded.series, names) for peer, names in METRICS.items()}
    return PeerRun(recorded.name, outcome(recorded.series), trl_config(recorded.about["config"]), records)


def records_of(series: Series, names: Mapping[str, str]) -> list[dict[str, float]]:
    """One record a step under the peer's names; missing values are left out, and so are steps without any."""
    columns = dict(series)
    if "clip_share_low" in series and "clip_share_high" in series:
        columns["clip_share"] = series["clip_share_low"] + series["clip_share_high"]
    records = []
    for row, step in enumerate(series["step"]):
        values = {theirs: float(columns[ours][row]) for theirs, ours in names.items() if ours in columns}
        known = {theirs: value for theirs, value in values.items() if not np.isnan(value)}
        if known:
            records.append({"step": int(step), **known})
    return records


def trl_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What rl-doctor's callback takes from a trainer's arguments, under TRL's names."""
    rollout, loss = config["rollout"], config["loss"]
    return {
        "algorithm": "grpo",
        "num_generations": rollout["group_size"],
        "learning_rate": config["optim"]["lr"],
        "beta": loss["kl_coef"],
        "epsilon": loss["clip_low"],
        "epsilon_high": loss["clip_high"],
        "max_completion_length": rollout["max_new_tokens"],
        "entropy_coef": loss["entropy_coef"],
    }


def judge(peers: Path, peer: str, runs: Sequence[PeerRun], settings: Sequence[Settings]) -> list[list[list[Found]]]:
    """What the peer finds in each run with each of the settings: [run][setting]. Kept under PEERS."""
    requests = [
        json.dumps({"peer": peer, "records": run.records[peer], "config": run.config, "settings": settings})
        for run in runs
    ]
    kept, version = peers / "judged", PROCESS.read_text()
    paths = [
        kept / f"{peer}-{run.name}-{hashlib.sha256((version + request).encode()).hexdigest()[:16]}.json"
        for run, request in zip(runs, requests, strict=True)
    ]
    missing = [(path, request) for path, request in zip(paths, requests, strict=True) if not path.exists()]
    for start in range(0, len(missing), RUNS_A_PROCESS):
        some = missing[start : start + RUNS_A_PROCESS]
        answers = ask(peers, [request for _, request in some])
        kept.mkdir(exist_ok=True)
        for (path, _), answer in zip(some, answers, strict=True):
            path.write_text(answer)
    return [[[Found(*found) for found in one] for one in json.loads(path.read_text())] for path in paths]


def ask(peers: Path, requests: Sequence[str]) -> list[str]:
    """The answer of `peer_process.py` to each request."""
    python = peers / "bin" / "python"
    if not python.exists():
        raise PeersError(how_to_install(peers, f"there is no {python}"))
    done = subprocess.run(
        [python, "-P", PROCESS], input="".join(f"{request}\n" for request in requests), capture_output=True, text=True
    )
    if done.returncode:
        raise PeersError(how_to_install(peers, done.stderr.strip()[-2000:]))
    return done.stdout.splitlines()


def how_to_install(peers: Path, why: str) -> str:
    wanted = " ".join(f"{name}=={version}" for name, version in VERSIONS.items())
    return (
        f"The peers do not run in {peers}: {why}. They need an environment of their own. Make it with\n"
        f"    python -m venv {peers}\n    {peers}/bin/python -m pip install {wanted}"
    )


def first_warning(found: Sequence[Found], monitor: Mapping[str, Any]) -> float:
    """Step of the first warning under the monitor's settings, infinite without. found: of one rule at every look."""
    every, least = monitor.get("check_every", 1), monitor.get("min_steps", 0)
    enough = {"critical"} if monitor.get("alert_at") == "CRITICAL" else {"warning", "critical"}
    steps = (one.step for one in found if one.seen >= least and one.seen % every == 0 and one.severity in enough)
    return float(min(steps, default=np.inf))


def variants(peer: str) -> list[Settings]:
    """Settings that together try all of RULES: number i gives each rule its own i, as no rule hears another."""
    rules = RULES[peer]
    return [
        {"rules": {rule: tries[i] for rule, tries in rules.items() if i < len(tries)}, "off": [],
         "monitor": LOOKS_OFTEN[peer]}
        for i in range(max(map(len, rules.values())))
    ]  # fmt: skip


def tune(peers: Path, peer: str, runs: Sequence[PeerRun]) -> dict[str, Settings]:
    """The best settings for each of LIMITS, on these runs."""
    rules = RULES[peer]
    found = [  # [run][setting][rule]
        [{rule: [one for one in of_setting if one.rule == rule] for rule in rules} for of_setting in of_run]
        for of_run in judge(peers, peer, runs, variants(peer))
    ]
    labels, best = labels_of(runs), dict[str, tuple[Choice, dict[str, Any]]]()
    for monitor in MONITORS[peer]:
        looks = (RLDOCTOR_DEFAULTS if peer == "rldoctor" else {}) | monitor
        first = {
            rule: np.array([[first_warning(of_run[i][rule], looks) for of_run in found] for i in range(len(tries))])
            for rule, tries in rules.items()
        }
        for name, at_most in LIMITS.items():
            choice = choose(first, labels, at_most)
            if name not in best or choice.rank > best[name][0].rank:
                best[name] = choice, monitor
    return {name: chosen_settings(peer, choice, monitor) for name, (choice, monitor) in best.items()}


def chosen_settings(peer: str, choice: Choice, monitor: Mapping[str, Any]) -> Settings:
    """The choice as settings for the peer; rules outside RULES keep their defaults."""
    used = {rule: RULES[peer][rule][i] for rule, i in choice.settings.items() if i is not None}
    return {
        "rules": {rule: values for rule, values in used.items() if values},
        "off": [rule for rule, i in choice.settings.items() if i is None],
        "monitor": dict(monitor),
    }


def figures(labels: Labels, found: Sequence[Sequence[Found]]) -> dict[str, float | int | None]:
    """Of what was said: damaged runs warned in time and late, healthy ones warned, median lead where in time."""
    warned = np.array([min((float(one.step) for one in of_run if one.said), default=np.inf) for of_run in found])
    damaged, in_time = np.isfinite(labels.damage), warned < labels.damage
    early = damaged & in_time
    lead = 1 - warned[early] / labels.damage[early]
    return {
        "damaged": int(damaged.sum()),
        "in_time": int(early.sum()),
        "late": int((damaged & ~in_time & np.isfinite(warned)).sum()),
        "healthy": int(labels.healthy.sum()),
        "healthy_warned": int(np.isfinite(warned[labels.healthy]).sum()),
        "median_lead": round(float(np.median(lead)), 3) if lead.size else None,
    }


def rows_of(detector: str, runs: Sequence[PeerRun], found: Sequence[Sequence[Found]]) -> list[dict[str, Any]]:
    """What was said, as rows; a run without any has none."""
    return [
        {"run": run.name, "detector": detector, "rule": one.rule, "severity": one.severity, "step": one.step}
        for run, of_run in zip(runs, found, strict=True)
        for one in of_run
        if one.said
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the runs; none: sample_runs/corpus")
    parser.add_argument("--peers", type=Path, required=True, help="environment with rlwatch and rldoctor")
    parser.add_argument("--part", choices=("development", "test"), required=True)
    parser.add_argument("--tune", action="store_true", help="choose settings anew (development part only)")
    options = parser.parse_args(arguments)
    if options.tune and options.part != "development":
        parser.error("--tune with --part test would choose settings on the runs that judge them. Use development.")
    if not options.tune and not CHOSEN.exists():
        parser.error(f"{CHOSEN} is missing: it holds the tuned settings. Make it with --part development --tune.")
    runs = read_runs(options.work, options.part)
    if not runs:
        where = options.work or "sample_runs/corpus"
        parser.error(f"{where} holds no runs of the {options.part} part (c000.npz, ...).")
    try:
        report = compare(options.peers, runs, tuning=options.tune)
    except PeersError as error:
        parser.exit(1, f"{error}\n")
    path = options.peers / f"rows-{options.part}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["run", "detector", "rule", "severity", "step"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(report)
    print(f"{len(report)} rows of {len(runs)} runs in {path}")


def compare(peers: Path, runs: Sequence[PeerRun], *, tuning: bool) -> list[dict[str, Any]]:
    """Rows of both peers, at defaults and tuned; the tuned settings come from peers.json, or go there."""
    chosen = {} if tuning else json.loads(CHOSEN.read_text())["settings"]
    rows, told = [], {}
    for peer in METRICS:
        tuned = tune(peers, peer, runs) if tuning else chosen[peer]
        chosen[peer] = tuned
        arms = {peer: DEFAULTS} | {f"{peer} {name}": settings for name, settings in tuned.items()}
        found = judge(peers, peer, runs, list(arms.values()))
        for i, name in enumerate(arms):
            of_arm = [of_run[i] for of_run in found]
            told[name] = figures(labels_of(runs), of_arm)
            rows += rows_of(name, runs, of_arm)
            print(name, json.dumps(told[name]))
    if tuning:
        names = [run.name for run in runs]
        CHOSEN.write_text(json.dumps({"settings": chosen, "figures": told, "runs": names}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
