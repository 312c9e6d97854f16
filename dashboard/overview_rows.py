"""The rows of the Overview: what there is to say of every run in one line.

A row is made anew only when its run changed, and then only of the steps that are new: a run of 5,000 steps costs the
same as one of 50. So the page follows one live run among hundreds of ended ones at the cost of the live one.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dashboard.alert_rows import NO_MARKS, MarksReader
from monitor.alerts.marks import Marks
from monitor.alerts.trends import TINY_NATS, fit_trend, median, steps_to
from monitor.alerts.window import BASELINE_ROWS, LEVEL_ROWS, SLOPE_ROWS
from monitor.queries.alerts import alert_log, alert_spans, verdicts
from monitor.queries.frames import n_rows, select
from monitor.queries.series import new_scalars
from monitor.store.runs import busy_with
from monitor.store.tail import RunEntry, Tail

PASS = "eval/heldout/pass@"
BINS = 40  # a sparkline has this many points, and up to twice as many while it grows
FLOOR = 0.1  # share of the baseline that messages and verdicts call the floor
FARTHEST = 10_000  # steps; a floor farther away is not told
SEVERITIES = ("critical", "warning", "info")
LIVE = ("running", "stalled")
HEALTHY = ("healthy", "too early", "")


@dataclass(slots=True)
class Course:
    """A series in constant memory: its beginning, its last rows, and means over equal stretches. Grows by `add`.

    first: its first BASELINE_ROWS finite values after warm-up. steps, values: its last SLOPE_ROWS finite rows.
    sums, counts: of the finite values in stretches of `width` rows each; fewer than 2 BINS stretches.
    """

    warmup_steps: int = 0
    first: np.ndarray = field(default_factory=lambda: np.empty(0))
    steps: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    values: np.ndarray = field(default_factory=lambda: np.empty(0))
    rows: int = 0
    width: int = 1
    sums: np.ndarray = field(default_factory=lambda: np.zeros(2 * BINS))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(2 * BINS))

    def add(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Take in rows that follow those so far. steps [n], values [n]; nan and inf are skipped."""
        finite = np.isfinite(values)
        steps, values = steps[finite], values[finite].astype(np.float64)
        if not len(values):
            return
        wanted = BASELINE_ROWS - len(self.first)
        self.first = np.concatenate([self.first, values[steps > self.warmup_steps][:wanted]])
        self.steps = np.concatenate([self.steps, steps])[-SLOPE_ROWS:]
        self.values = np.concatenate([self.values, values])[-SLOPE_ROWS:]
        while self.rows + len(values) > 2 * BINS * self.width:
            self.sums = np.concatenate([self.sums.reshape(-1, 2).sum(1), np.zeros(BINS)])
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS)])
            self.width *= 2
        stretches = (self.rows + np.arange(len(values))) // self.width
        np.add.at(self.sums, stretches, values)
        np.add.at(self.counts, stretches, 1)
        self.rows += len(values)

    @property
    def baseline(self) -> float:
        """Median of `first`; nan until they are complete. The alert rules take the same."""
        return median(self.first) if len(self.first) == BASELINE_ROWS else math.nan

    @property
    def level(self) -> float:
        """Median of the last 5 values; nan without any. The alert rules take the same."""
        return median(self.values[-LEVEL_ROWS:]) if len(self.values) else math.nan

    def means(self) -> np.ndarray:
        """Mean of each stretch so far."""
        used = self.counts > 0
        return np.asarray(self.sums[used] / self.counts[used])

    def steps_to_floor(self) -> float:
        """Steps until the level is FLOOR of the baseline, by a line through the logarithms of the last rows.

        0 if it is there; nan if the line does not clearly fall, or not within FARTHEST steps.
        """
        target = FLOOR * self.baseline
        if not target > 0:
            return math.nan
        if self.level <= target:
            return 0.0
        trend = fit_trend(self.steps, np.log(np.maximum(self.values, TINY_NATS)))
        left = steps_to(self.level, target, trend.slope) if trend.direction == "falling" else math.inf
        return left if left <= FARTHEST else math.nan


@dataclass(slots=True)
class _Digest:
    """What is remembered of a run between two readings."""

    attempts: tuple[object, ...] = ()  # newest attempt, time of creation: where these differ the steps may be others
    version: int = -1
    step: int = -1
    entropy: Course = field(default_factory=Course)
    reward: Course = field(default_factory=Course)
    passes: dict[int, float] = field(default_factory=dict)  # newest value of pass@k by k
    stamps: tuple[int, ...] = ()
    verdict: tuple[str, str] = ("", "")
    spans: list[tuple[str, str, int, bool]] = field(default_factory=list)  # rule, severity, first step, fires
    marks: Marks = NO_MARKS
    row: dict[str, Any] = field(default_factory=dict)


class OverviewRows:
    """The rows of a store's runs. Threads may share it."""

    def __init__(self, tail: Tail) -> None:
        self._tail = tail
        self._lock = threading.Lock()
        self._digests: dict[str, _Digest] = {}
        self._marks = MarksReader(tail.store)

    def read(self) -> dict[str, dict[str, Any]]:
        """{run: row}, ready for JSON. A row stays the same object until its run, or what people said of it, changes."""
        with self._lock:
            entries = dict(self._tail.runs)
            for gone in self._digests.keys() - entries.keys():
                del self._digests[gone]
            self._take_in([entry for entry in entries.values() if self._of(entry).version != entry.version])
            for entry in entries.values():
                digest = self._digests[entry.name]
                marks = self._marks.read(entry.name) if digest.spans else NO_MARKS
                if marks is not digest.marks or digest.version != entry.version:
                    digest.version, digest.marks = entry.version, marks
                    digest.row = _row(entry, digest, self._no_steps(entry) if digest.step < 0 else "")
            return {name: self._digests[name].row for name in entries}

    def _of(self, entry: RunEntry) -> _Digest:
        newest = max((int(beat.get("attempt", 0)) for beat in entry.heartbeats), default=0)
        attempts = (newest, entry.info.get("created"))
        known = self._digests.get(entry.name)
        if known is None or known.attempts != attempts:
            warmup = entry.info.get("warmup_steps")
            warmup = warmup if isinstance(warmup, int) else 0
            known = _Digest(attempts, entropy=Course(warmup), reward=Course(warmup))
            self._digests[entry.name] = known
        return known

    def _take_in(self, changed: Sequence[RunEntry]) -> None:
        if not changed:
            return
        con, names = self._tail.cursor(), [entry.name for entry in changed]
        fresh = new_scalars(con, {name: self._digests[name].step for name in names}, ("entropy", "reward"), PASS)
        for run, name, (steps, values) in ((run, *one) for run, of in fresh.items() for one in of.items()):
            self._digests[run].step = max(self._digests[run].step, int(steps[-1]))
            if name.startswith(PASS):
                if name.removeprefix(PASS).isdigit():
                    self._digests[run].passes[int(name.removeprefix(PASS))] = float(values[-1])
            else:
                course = self._digests[run].entropy if name == "entropy" else self._digests[run].reward
                course.add(steps, values)
        spans = alert_spans(alert_log(con, names))
        for name in names:
            mine = select(spans, spans["run"] == name)
            keys = ("rule", "severity", "first_step")
            columns = (*(mine[key] for key in keys), np.isnan(mine["end_step"]))
            self._digests[name].spans = [
                (str(rule), str(severity), int(first), bool(fires))
                for rule, severity, first, fires in zip(*columns, strict=True)
            ]
        told = [entry for entry in changed if self._digests[entry.name].stamps != entry.stamps[1:3]]
        said = verdicts(con, [entry.name for entry in told])
        by_run = {str(said["run"][i]): (str(said["health"][i]), str(said["sentence"][i])) for i in range(n_rows(said))}
        for entry in told:
            self._digests[entry.name].stamps = entry.stamps[1:3]  # of alerts and events
            self._digests[entry.name].verdict = by_run.get(entry.name, ("", ""))

    def _no_steps(self, entry: RunEntry) -> str:
        """Why a run shows no steps, in a word or two."""
        if any(name.startswith("steps/") for name in self._tail.quarantined().get(entry.name, ())):
            return "no steps that can be read"
        return "no steps yet" if entry.status in LIVE else "no steps"


def _row(entry: RunEntry, digest: _Digest, no_steps: str) -> dict[str, Any]:
    """One run as the table shows it. Numbers that are not known are None; no_steps: why it has none."""
    info, entropy = entry.info, digest.entropy
    fires = [one for one in digest.spans if one[3]]
    open_ = [one for one in fires if not digest.marks.has_seen(one[0], one[2])]
    firing = [sum(one[1] == severity for one in open_) for severity in SEVERITIES]
    health, sentence = digest.verdict
    beat = max(entry.heartbeats, key=lambda beat: float(beat.get("last_step_ts") or 0), default={})
    config = info.get("config") or {}
    live = entry.status in LIVE
    baseline = entropy.baseline
    passes = {k: value for k, value in digest.passes.items() if k > 1}
    seed = _text(info.get("seed", 0 if info else None))
    about = [_text(info.get("task")), _text(info.get("weighting")), f"seed {seed}", _text(info.get("model"))]
    return {
        "run": entry.name,
        "about": " · ".join(part for part in about if part) if info else "its run.json is missing or cannot be read",
        "weighting": _text(info.get("weighting")),
        "seed": seed,
        "comparison": _text(info.get("comparison")),
        "status": entry.status,
        "busy": (busy_with(entry.heartbeats) if entry.status == "running" else None) or "",
        "health": health,
        "said": shortened(sentence),
        "sentence": sentence,
        "entropy": _number(entropy.level),
        "share": _number(entropy.level / baseline if baseline > 0 else math.nan),
        "spark": [round(100 * float(mean) / baseline) for mean in entropy.means()] if baseline > 0 else [],
        "floor": _number(entropy.steps_to_floor()) if live else None,
        "reward": _number(digest.reward.level),
        "pass1": _number(digest.passes.get(1, math.nan)),
        "passk": _number(passes[max(passes)]) if passes else None,
        "k": max(passes, default=None),
        "step": digest.step if digest.step >= 0 else None,
        "no_steps": no_steps,
        "planned": config["steps"] if isinstance(config.get("steps"), int) else None,
        "created": _number(float(info.get("created") or math.nan)),
        "last": _number(float(beat.get("last_step_ts") or math.nan)),
        "firing": firing,
        "seen": len(fires) - len(open_),
        "resolved": len(digest.spans) - len(fires),
        "rank": _rank(live, entry.status, health, firing, bool(fires)),
    }


def _rank(live: bool, status: str, health: str, firing: Sequence[int], fires: bool) -> int:
    """Place by attention, first the lowest: runs that still train, worst first, as they can be saved; then the ended.

    An alert that somebody has seen does not count any more.
    """
    worst = next((place for place, count in enumerate(firing) if count), 3)
    if not fires and health in SEVERITIES:  # said by an engine whose alerts are not in the store
        worst = SEVERITIES.index(health)
    if status in ("stalled", "crashed", "failed"):
        worst = min(worst, 1)
    return worst + (0 if live else 10)


def shortened(sentence: str) -> str:
    """A verdict without its cure and its numbers in brackets: 'Entropy is collapsing since step 42'."""
    text = sentence.split(": ")[0]
    while " (" in text and ")" in text.partition(" (")[2]:
        before, _, rest = text.partition(" (")
        text = before + rest.partition(")")[2]
    return text.rstrip(".")


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _number(value: float) -> float | None:
    """As JSON can hold it, with six digits."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


# --- what a configuration says, for grouping ---


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"optim.lr": "0.001"}: a configuration's options with dotted names, values as JSON or plain text."""
    found: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        else:
            found[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return found


def group_keys(configs: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The options in which the runs differ, sorted: only these can split them."""
    seen: dict[str, set[str]] = {}
    have: dict[str, int] = {}
    for config in configs.values():
        for key, value in config.items():
            seen.setdefault(key, set()).add(value)
            have[key] = have.get(key, 0) + 1
    return sorted(key for key, values in seen.items() if len(values) > 1 or have[key] < len(configs))


@dataclass(frozen=True, slots=True)
class Sent:
    """What goes to the browser: all rows as they were once, and those that differ now, so that a step sends one row."""

    base_id: str
    base: str
    patch: dict[str, dict[str, Any]]


class Sender:
    """Keeps the base that browsers hold, and makes a new one when too much of it is out of date."""

    MOST = 24  # rows in a patch

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bases: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {}
        self._made = 0

    def send(self, rows: Mapping[str, dict[str, Any]], group: str, value: Callable[[str], str]) -> Sent:
        """group: the option by which the reader groups, "" for none; value: its value for a run."""
        with self._lock:
            found = self._bases.get(group)
            if found is not None and found[2].keys() == rows.keys():
                patch = {name: row for name, row in rows.items() if found[2][name] is not row}
                if len(patch) <= self.MOST:
                    return Sent(found[0], found[1], {n: _with(row, group, value) for n, row in patch.items()})
            self._made += 1
            base_id = f"{os.getpid()}-{self._made}"
            text = json.dumps({name: _with(row, group, value) for name, row in rows.items()}, separators=(",", ":"))
            self._bases = dict(list(self._bases.items())[-8:]) | {group: (base_id, text, dict(rows))}
            return Sent(base_id, text, {})


def _with(row: dict[str, Any], group: str, value: Callable[[str], str]) -> dict[str, Any]:
    return row | {"value": value(row["run"])} if group else row


def compare_sides(entries: Sequence[RunEntry]) -> tuple[list[str], list[str], list[str]]:
    """(baseline runs, the others, runs left out) of ticked runs: two weightings, uniform first, random last.

    Runs of one weighting alone: the first against the others.
    """
    kinds: dict[str, list[str]] = {}
    for entry in entries:
        kinds.setdefault(str(entry.info.get("weighting") or ""), []).append(entry.name)
    order = sorted(kinds, key=lambda kind: (kind != "uniform", kind == "random"))
    if len(order) == 1:
        first, *rest = kinds[order[0]]
        return [first], rest, []
    return kinds[order[0]], kinds[order[1]], [name for kind in order[2:] for name in kinds[kind]]
