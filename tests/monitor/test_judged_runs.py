"""The runs behind the rates: the file that the package ships says what the benchmark wrote and the verdict cites."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from monitor.alerts.judged_runs import COLUMNS, JUDGED_RUNS, JudgedRun, judged_runs
from monitor.alerts.judgement import measured_rates
from monitor.alerts.rules import RULES

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def one(outcome: str, damage_step: int | None, step: int) -> JudgedRun:
    return JudgedRun("c", "test", outcome, damage_step, {"reward_lost": step}, "builtin", "chain", "ict", "0.001")


@pytest.mark.parametrize(
    ("run", "worth"),
    [
        (one("reward_lost", 30, 29), "in time"),
        (one("reward_lost", 30, 30), "too late"),  # the damage was there to be seen already
        (one("diversity_lost", 30, 31), "too late"),
        (one("healthy", None, 5), "false alarm"),
        (one("stall", None, 5), "false alarm"),
        (one("no_signal", None, 5), "right"),
        (one("unclear", None, 5), "counted on no side"),
    ],
)
def test_what_a_warning_was_worth(run: JudgedRun, worth: str) -> None:
    assert run.judged("reward_lost") == worth


def test_the_rates_count_these_runs() -> None:
    for rule, rate in measured_rates().items():
        fired = [run for run in judged_runs() if rule in run.warned and run.part == "development"]
        worth = [run.judged(rule) for run in fired if run.outcome != "unclear"]
        assert {"fired": len(worth), "bad": len(worth) - worth.count("false alarm")} == rate, rule


def test_the_shipped_file_says_what_the_benchmark_wrote() -> None:
    with (RESULTS / "detectors_runs.csv").open() as written, JUDGED_RUNS.open() as shipped:
        told = [{name: row[name] for name in COLUMNS} for row in csv.DictReader(written)]
        assert list(csv.DictReader(shipped)) == told and len(told) == 175
    assert {rule for run in judged_runs() for rule in run.warned} <= set(RULES)
