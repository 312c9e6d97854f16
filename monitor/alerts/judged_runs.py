"""The real runs on which the rules were measured: what became of each, and which rules warned of it when."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

JUDGED_RUNS = Path(__file__).parent / "judged_runs.csv"  # written by benchmarks/bench_detectors.py
COLUMNS = ("run", "part", "outcome", "damage_step", "warned", "model", "task", "weighting", "lr")
Judged = Literal["in time", "too late", "right", "false alarm", "counted on no side"]


@dataclass(frozen=True, slots=True)
class JudgedRun:
    """One run of the corpus. warned: {rule: step of its first alert of severity warning or worse}.

    part: "development" or "test"; the rates that the verdict cites are of the first. outcome: of
    benchmarks/corpus/labels.py, from held-out evaluations alone: healthy, stall, no_signal, unclear, reward_lost or
    diversity_lost. damage_step: the first evaluation that shows the damage, None for a run without any.
    """

    run: str
    part: str
    outcome: str
    damage_step: int | None
    warned: Mapping[str, int]
    model: str
    task: str
    weighting: str
    lr: str

    def judged(self, rule: str) -> Judged:
        """What the warning of `rule` was worth, which must be among those of this run."""
        if self.damage_step is not None:
            return "in time" if self.warned[rule] < self.damage_step else "too late"
        if self.outcome == "unclear":
            return "counted on no side"
        return "right" if self.outcome == "no_signal" else "false alarm"


@cache
def judged_runs() -> tuple[JudgedRun, ...]:
    """Every run of the corpus; none where the package came without the file."""
    try:
        with JUDGED_RUNS.open(newline="") as file:
            return tuple(_run(row) for row in csv.DictReader(file))
    except OSError:
        return ()


def _run(row: Mapping[str, str]) -> JudgedRun:
    warned = (one.partition("@") for one in row["warned"].split())
    return JudgedRun(
        row["run"], row["part"], row["outcome"], int(row["damage_step"]) if row["damage_step"] else None,
        {rule: int(step) for rule, _, step in warned}, row["model"], row["task"], row["weighting"], row["lr"],
    )  # fmt: skip
