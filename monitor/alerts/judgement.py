"""The verdict: one sentence on a run that a person can act on, and the evidence of each of its clauses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from monitor.alerts.rules import Finding, Rule
from monitor.alerts.trends import TINY_NATS, fit_trend, reach
from monitor.alerts.window import BASELINE_ROWS, Window
from monitor.metrics import metric
from monitor.records import SEVERITY_RANK, Severity, finite

Health = Literal["too early", "healthy", "info", "warning", "critical"]
RATES = (
    Path(__file__).parent / "rates.json"
)  # how often each rule was right on real runs; benchmarks/bench_detectors.py
_PROJECTED_ROWS = 20
FARTHEST = 10_000  # steps; a floor farther away is not told


@dataclass(frozen=True, slots=True)
class Clause:
    """One claim of a verdict and what it rests on: the series, the steps that were looked at, the number.

    kind: "what", "since", "sure", "floor", "cost", "also" or "do". series and steps are None where a claim rests on no
    series of the run.
    """

    kind: str
    text: str
    series: str | None = None
    first_step: int | None = None
    last_step: int | None = None
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """health: the worst severity that fires now, "healthy", or "too early". step: the last one that was judged.

    sentence: what is happening, since when, how long to the floor, what to do. clauses: each claim with its evidence,
    those of the sentence and more. rules: the rules that fire, worst first.
    """

    health: Health
    step: int | None
    sentence: str
    clauses: tuple[Clause, ...] = ()
    rules: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dict(finite(asdict(self)))


@dataclass(frozen=True, slots=True)
class Open:
    """An alert that fires now: since which step, at which severity, and what its rule finds of the newest row."""

    rule: Rule
    first_step: int
    severity: Severity
    finding: Finding

    @property
    def series(self) -> str:
        """The series that the finding's numbers are of."""
        return self.finding.series or self.rule.watches


def judge(
    fires: Sequence[Open],
    window: Window,
    step: int | None,
    *,
    rules: Sequence[Rule],
    warmup_steps: int = 0,
    step_s: float | None = None,
    total_steps: int | None = None,
) -> Verdict:
    """The verdict at `step` from the alerts that fire and the window. rules: all that were asked.

    step_s: seconds of a step, for minutes and costs; total_steps: of the run, for what stopping now would save.
    """
    if not fires or step is None:
        return _quiet(window, step, rules, warmup_steps)
    fires = sorted(fires, key=lambda one: (-SEVERITY_RANK[one.severity], one.first_step))
    worst, others = fires[0], fires[1:]
    rule, finding = worst.rule, worst.finding
    what = Clause("what", finding.message, worst.series, *_span(window, worst.series), finding.value)
    since = Clause("since", f"{rule.says} since step {worst.first_step} ({worst.severity}).", worst.series,
                   worst.first_step, step, finding.value)  # fmt: skip
    floor = _floor(rule, worst, window, step_s)
    cost = _cost(worst, step, step_s, total_steps)
    clauses = [since, what, _sure(rule), floor, cost]
    if others:
        told = ", ".join(f"{one.rule.name} since step {one.first_step} ({one.severity})" for one in others)
        clauses.append(Clause("also", f"Also: {told}."))
    clauses.append(Clause("do", finding.action))
    sentence = f"{rule.says} since step {worst.first_step}{_numbers(worst)}"
    sentence += f", {_first_small(floor.text)}" if floor else ""
    sentence += f": {rule.cure}."
    names = tuple(one.rule.name for one in fires)
    return Verdict(worst.severity, step, sentence, tuple(clause for clause in clauses if clause), names)


def _quiet(window: Window, step: int | None, rules: Sequence[Rule], warmup_steps: int) -> Verdict:
    known = max((len(window.last(key)[1]) for key in window.series if not key.startswith("eval/")), default=0)
    if step is None or not window.baselines:
        needed = f"{BASELINE_ROWS} rows after {warmup_steps} warm-up steps"
        return Verdict("too early", step, f"Too early to judge: {known} rows, and a baseline takes {needed}.")
    clauses = [
        Clause(
            "what",
            f"{key} is {window.level(key):.3g}, it began at {window.baseline(key):.3g} and is {window.trend(key)}.",
            key,
            *_span(window, key),
            window.level(key),
        )
        for key in ("entropy", "reward")
        if key in window.baselines
    ]
    told = " and ".join(
        f"{key} {window.level(key):.3g}"
        + (f" ({window.level(key) / window.baseline(key):.0%} of its start)" if window.baseline(key) > 0 else "")
        for key in ("reward", "entropy")
        if key in window.baselines
    )
    judged = sum(all(key in window.series for key in rule.needs) for rule in rules)
    clauses.append(Clause("sure", f"{judged} of {len(rules)} rules had the series that they need."))
    return Verdict("healthy", step, f"Nothing is wrong at step {step}: {told}; none of {judged} rules fires.",
                   tuple(clauses))  # fmt: skip


def _numbers(fires: Open) -> str:
    """' (1 to 0.2)', with the label of the series before where a rule finds things in several; shares in percent."""
    value, base = fires.finding.value, fires.finding.baseline
    if not (math.isfinite(value) and math.isfinite(base)):
        return ""
    told = metric(fires.series)
    named = f"{told.label[:1].lower()}{told.label[1:]} " if fires.finding.series else ""
    form = ".0%" if told.unit == "share" else ".3g"
    return f" ({named}{base:{form}} to {value:{form}})"


def _span(window: Window, key: str) -> tuple[int | None, int | None]:
    steps = window.last(key)[0]
    return (int(steps[0]), int(steps[-1])) if len(steps) else (None, None)


def _floor(rule: Rule, fires: Open, window: Window, step_s: float | None) -> Clause | None:
    """When the watched series reaches the rule's floor: a line through its last rows, in logarithms as levels decay.

    The interval follows from the slope's standard error, widened for correlated steps: 95 %.
    """
    steps, values = window.last(fires.series, _PROJECTED_ROWS)
    base = fires.finding.baseline
    if rule.floor is None or not base > 0 or len(steps) < _PROJECTED_ROWS // 2:
        return None
    target, level = rule.floor * base, window.level(fires.series)
    if level <= target:
        text = f"It is at its floor of {target:.3g} ({rule.floor:.0%} of {base:.3g})."
        return Clause("floor", text, fires.series, int(steps[0]), int(steps[-1]), 0.0)
    trend = fit_trend(steps, np.log(np.maximum(values, TINY_NATS)))
    soonest, left, slowest = reach(level, target, trend)
    if trend.direction != "falling" or left > FARTHEST:
        return None
    latest = f"{math.ceil(slowest)}" if slowest < FARTHEST else "never"
    minutes = f", {duration(left * step_s)}" if step_s else ""
    text = (
        f"About {math.ceil(left)} steps (95 % interval {math.ceil(soonest)} to {latest}{minutes}) to its floor of "
        f"{target:.3g}."
    )
    return Clause("floor", text, fires.series, int(steps[0]), int(steps[-1]), left)


def _cost(fires: Open, step: int, step_s: float | None, total_steps: int | None) -> Clause | None:
    """Steps and time since the alert fired, and what is left to save."""
    spent = step - fires.first_step
    text = f"{spent} steps{_in_time(spent, step_s)} were trained since it fired"
    if total_steps is None or total_steps <= step:
        return Clause("cost", text + ".", None, fires.first_step, step, float(spent)) if spent else None
    left = total_steps - step
    text += f"; stopping now saves {left} steps{_in_time(left, step_s)}."
    return Clause("cost", text, None, fires.first_step, step, float(left))


def _sure(rule: Rule) -> Clause:
    rate = measured_rates().get(rule.name)
    if not rate or not rate["fired"]:
        return Clause("sure", f"How often {rule.name} is right on real runs was not measured: too few fired it.")
    return Clause("sure", f"Of {rate['fired']} real runs in which {rule.name} fired, {rate['bad']} came to harm.",
                  value=rate["bad"] / rate["fired"])  # fmt: skip


@cache
def measured_rates() -> dict[str, dict[str, int]]:
    """{rule: {"fired": runs, "bad": of them damaged or without a learning signal}} of the corpus of real runs."""
    try:
        return dict(json.loads(RATES.read_text()))
    except (OSError, ValueError):
        return {}


def _in_time(steps: float, step_s: float | None) -> str:
    return f" ({duration(steps * step_s)})" if step_s else ""


def duration(seconds: float) -> str:
    """'40 s', '3 min', '2.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _first_small(text: str) -> str:
    return text[0].lower() + text[1:].rstrip(".")
