"""What a comparison shows, in one sentence for each arm: variety kept, quality reached, and how far it is shown.

A difference counts as shown only if its interval excludes 0. Two figures are judged: the variety, which is the number
of distinct correct answers, or pass@k where the task has no canonical forms, or the entropy; and the quality, which is
held-out pass@1, or the reward where nothing was evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = Mapping[str, Any]

PASS, DISTINCT, ENTROPY, REWARD = "eval/heldout/pass@1", "eval/heldout/distinct", "entropy", "reward"
# the floor and the critical share of the alert reward_lost
LEAST_REACHED = 0.10  # a run that never reached this pass@1 has nothing to lose
LOST_SHARE = 0.50  # of the pass@1 that it reached: at or below, a run has lost its reward
NOT_SHOWN = "no difference is shown"


def comparison_verdict(comparison: Mapping[str, Any], arm: str) -> str:
    """The sentence about one arm against the baseline, from the rows of `monitor.stats.comparison`.

    Numbers are means over the pairs, at the last step. Where pass@1 differs, the sentence adds what is left at equal
    pass@1, unless that is the pass@1 of the untrained policy. With fewer than three pairs there is no interval, and it
    only gives the numbers. A run has lost its reward if its last pass@1 is at most half of the level that it reached,
    and that was at least .10; the level is the one at which the pair is compared at equal pass@1. Example:
    "ict kept 13.1 of 16 distinct answers where uniform kept 7.4 (+5.7 [+4.1, +7.0]), at pass@1 .90 against .85 (+.05
    [-.01, +.10], no difference is shown); 5 pairs."
    """
    baseline = str(comparison["baseline"])
    for name, whose in ((arm, "it"), (baseline, baseline)):
        if not comparison["arms"][name]:
            return f"{arm}: no run of {whose} finished, so nothing is compared."
    if not comparison["arms"][arm].keys() & comparison["arms"][baseline].keys():
        return f"{arm}: it has no seed in common with {baseline}, so nothing is compared."
    last, equal = _paired_rows(comparison, arm, "last"), _paired_rows(comparison, arm, "equal")
    variety = next((key for key in (DISTINCT, *filter(_is_pass_at_k, last), ENTROPY) if key in last), None)
    quality = next((key for key in (PASS, REWARD) if key in last), None)
    main = variety or quality
    if main is None:
        return f"{arm}: neither entropy nor reward is recorded for it and {baseline}, so nothing is compared."
    figure = _figure(main, comparison)
    pairs, few, lost = last[main]["pairs"], last[main]["low"] is None, _lost(comparison, arm, last.get(PASS))
    counted = f"{pairs} pair" if pairs == 1 else f"{pairs} pairs"
    aside = quality if quality != main and not lost else None  # told beside the main figure

    parts = [f"{lost}: {_against(last[PASS], _figure(PASS, comparison))}"] if lost else []
    if few:
        parts.append(f"{counted}: too few to tell" if lost else f"{arm} against {baseline}, {counted}: too few to tell")
        clauses = [_against(last[key], _figure(key, comparison)) for key in (main, aside) if key is not None]
    elif aside is not None and _direction(last[aside]) and not _direction(last[main]):  # what is shown comes first
        parts.append(_claim(last[aside], _figure(aside, comparison), arm, baseline, named=False))
        clauses = [_claim(last[main], figure, arm, baseline, named=True)]
    else:
        clauses = [_claim(last[main], figure, arm, baseline, named=bool(lost))]
        clauses += [f"at {_against(last[aside], _figure(aside, comparison))}"] if aside is not None else []
    parts.append(", ".join(clauses))
    if main in equal and PASS in last and (few or lost or _direction(last[PASS])) and not _untrained(equal):
        level = _share(float(np.mean(list(comparison["levels"][arm].values()))))
        parts.append(f"at equal pass@1 ({level}) {_against(equal[main], figure)}")
    return "; ".join(parts if few else [*parts, counted]) + "."


def comparison_verdicts(comparison: Mapping[str, Any]) -> dict[str, str]:
    """{arm: its sentence} of every arm but the baseline."""
    return {arm: comparison_verdict(comparison, arm) for arm in comparison["arms"] if arm != comparison["baseline"]}


def headline(sentence: str) -> tuple[str, str]:
    """(what is shown in bold, the rest): the sentence up to its first semicolon, and from there on."""
    head, semicolon, rest = sentence.partition("; ")
    return head, semicolon + rest


@dataclass(frozen=True, slots=True)
class _Figure:
    """How a figure is written."""

    name: str
    verb: str  # of the arm that has this much
    amount: str  # template with the name
    short: str  # template without it
    number: Callable[[float, str], str]  # (value, sign: "" or "+") -> text
    more: str  # what an arm is that has a higher value
    less: str


def _figure(key: str, comparison: Mapping[str, Any]) -> _Figure:
    if key == DISTINCT:
        samples = comparison.get("samples")  # an old stored comparison does not say
        of = f" of {samples}" if samples else ""
        return _Figure("distinct answers", "kept", f"{{}}{of} distinct answers", f"{{}}{of}", _count, "more", "fewer")
    if key == ENTROPY:
        return _Figure("entropy", "kept", "an entropy of {} nats", "{} nats", _plain, "more", "less")
    if key == REWARD:
        return _Figure("reward", "reached", "reward {}", "{}", _plain, "better", "worse")
    name = key.rpartition("/")[2]
    return _Figure(name, "reached", f"{name} {{}}", "{}", _share, "better", "worse")


def _share(value: float, sign: str = "") -> str:
    """.90, -.05, 1.00: two decimals, without the leading zero."""
    return f"{value:{sign}.2f}".replace("0.", ".")


def _count(value: float, sign: str = "") -> str:
    return f"{value:{sign}.1f}"


def _plain(value: float, sign: str = "") -> str:
    return f"{value:{sign}.2f}"


def _is_pass_at_k(key: str) -> bool:
    return key.startswith("eval/heldout/pass@") and key != PASS


def _paired_rows(comparison: Mapping[str, Any], arm: str, when: str) -> dict[str, Row]:
    """{figure: row} of what is paired with the baseline."""
    rows = (row for row in comparison["rows"] if row["arm"] == arm and row["when"] == when)
    return {row["figure"]: row for row in rows if row.get("difference") is not None}


def _untrained(equal: Mapping[str, Row]) -> bool:
    """Whether arm and baseline are both at step 0 where they are compared at equal pass@1, in every pair."""
    step = equal["step"]
    return bool(step["baseline_mean"] == 0 and step["difference"] == 0)


def _direction(row: Row) -> int:
    """1 or -1 where the interval lies above or below 0, else 0: no difference is shown."""
    if row["low"] is None:
        return 0
    return int(row["low"] > 0) - int(row["high"] < 0)


def _difference(row: Row, figure: _Figure) -> str:
    """+5.7 [+4.1, +7.0], or without the interval where there is none."""
    text = figure.number(row["difference"], "+")
    if row["low"] is None:
        return text
    return f"{text} [{figure.number(row['low'], '+')}, {figure.number(row['high'], '+')}]"


def _pair_of_numbers(row: Row, figure: _Figure) -> tuple[str, str]:
    """The arm's and the baseline's mean, both over the seeds that they share."""
    base = row["baseline_mean"]
    return figure.number(base + row["difference"], ""), figure.number(base, "")


def _against(row: Row, figure: _Figure) -> str:
    """pass@1 .90 against .85 (+.05 [-.01, +.10], no difference is shown)."""
    mine, theirs = _pair_of_numbers(row, figure)
    word = {0: NOT_SHOWN, 1: figure.more, -1: figure.less}[_direction(row)]
    judged = "" if row["low"] is None else f", {word}"
    return f"{figure.amount.format(mine)} against {theirs} ({_difference(row, figure)}{judged})"


def _claim(row: Row, figure: _Figure, arm: str, baseline: str, named: bool) -> str:
    """ict kept 13.1 of 16 distinct answers where uniform kept 7.4 (...), if the interval excludes 0.

    named: the sentence has named the arm already.
    """
    (mine, theirs), way, gap = _pair_of_numbers(row, figure), _direction(row), _difference(row, figure)
    if not way:
        lead = "" if named else f"{arm} against {baseline}: "
        return f"{lead}no difference in {figure.name} is shown, {figure.short.format(mine)} against {theirs} ({gap})"
    only = " only" if way < 0 else ""
    what = f"{figure.verb}{only} {figure.amount.format(mine)}"
    return f"{arm} {what} where {baseline} {figure.verb} {theirs} ({gap})"


def _lost(comparison: Mapping[str, Any], arm: str, row: Row | None) -> str:
    """Who lost the reward that was reached, e.g. "ict lost its reward in 2 of 5 runs"; "" if nobody did."""
    if row is None:
        return ""
    baseline = comparison["baseline"]
    levels = comparison["levels"].get(arm, {})
    of_base = next(r for r in comparison["rows"] if (r["when"], r["figure"], r["arm"]) == ("last", PASS, baseline))
    mine, theirs = (_count_lost(each["values"], levels) for each in (row, of_base))
    n = len(levels)
    if mine and theirs:
        return f"{arm} lost its reward in {mine} of {n} runs and {baseline} in {theirs}"
    some = mine or theirs
    where = f" in {some} of {n} runs" if some < n else ""
    if mine:
        return f"{arm} lost its reward{where}"
    return f"{arm} kept its reward where {baseline} lost it{where}" if theirs else ""


def _count_lost(values: Mapping[str, float | None], levels: Mapping[str, float]) -> int:
    """How many seeds end at or below half of the level that they reached."""
    ends = [(values.get(seed), level) for seed, level in levels.items() if level is not None and level >= LEAST_REACHED]
    return sum(end is not None and end <= LOST_SHARE * level for end, level in ends)
