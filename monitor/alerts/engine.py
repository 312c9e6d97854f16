"""AlertEngine: feeds rows to the rules and turns findings into transitions pending -> firing -> resolved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np

from monitor.alerts.judgement import Open, Verdict, judge
from monitor.alerts.rules import DEFAULT_RULES, Finding, Rule
from monitor.alerts.trends import mean
from monitor.alerts.window import BASELINE_ROWS, BEST_ROWS, START_ROWS, TREND_ROWS, Baseline, Best, Series, Window
from monitor.records import SEVERITY_RANK, Alert, AlertState, Severity

EVALUATED = "eval/"  # prefix of series with a value every so many steps: all of theirs are kept
_KINDS = 256  # kinds of rows whose rules are remembered


class _Rows:
    """The last rows of a series, all of an evaluated one. Views of them that were handed out never change."""

    def __init__(self, key: str, rows: Sequence[Sequence[Any]] = ()) -> None:
        self._most = None if key.startswith(EVALUATED) else TREND_ROWS
        self._begin, self._end = 0, len(rows)
        self._steps = np.array([int(step) for step, _ in rows], np.int64)
        self._values = np.array([float(value) for _, value in rows])
        self.last_step = int(self._steps[-1]) if rows else None

    def __len__(self) -> int:
        return self._end - self._begin

    @property
    def views(self) -> Series:
        """(steps int64 [n], values float64 [n])."""
        return self._steps[self._begin : self._end], self._values[self._begin : self._end]

    def append(self, step: int, value: float) -> None:
        if self._end == len(self._steps):
            self._grow()
        self._steps[self._end], self._values[self._end], self.last_step = step, value, step
        self._end += 1
        if self._most is not None and len(self) > self._most:
            self._begin += 1

    def go_back(self, step: int) -> None:
        """Leave out the rows from this step on."""
        self._end = self._begin + int(np.searchsorted(self.views[0], step))
        self.last_step = int(self._steps[self._end - 1]) if len(self) else None
        self._grow()  # what is appended next must not overwrite what views show

    def _grow(self) -> None:
        (steps, values), n = self.views, len(self)
        self._steps, self._values = np.empty(2 * n + 64, np.int64), np.empty(2 * n + 64)
        self._steps[:n], self._values[:n] = steps, values
        self._begin, self._end = 0, n


@dataclass(slots=True)
class _RuleState:
    state: str = "quiet"  # quiet, pending or firing
    first_step: int = 0
    severity: str = "info"  # the worst announced in this episode
    count: int = 0  # rows in a row towards firing, or towards resolving
    worse: int = 0  # rows in a row above the announced severity
    resolved: int | None = None  # step at which the last episode ended, and
    resolved_severity: str = "info"  # the worst that it announced


class AlertEngine:
    """Evaluates the rules on each step of one run; deterministic, O(window) per step and in memory.

    warmup_steps: steps after the first one that are not part of a baseline; rules that need a baseline are silent until
    its 20 values are complete. A pending alert that goes away before it fires is closed by a "resolved" transition too.
    A firing alert that gets worse announces "firing" again with the higher severity and the same first_step. After an
    alert has resolved, the rule's cooldown_steps must pass before it fires again, unless it is worse than it was.
    total_steps: of the run, for what the verdict says of stopping it.
    """

    def __init__(
        self, rules: Sequence[Rule] = DEFAULT_RULES, warmup_steps: int = 0, total_steps: int | None = None
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}.")
        self.rules = tuple(rule for rule in rules if rule.enabled)
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self.series = tuple(dict.fromkeys(key for rule in self.rules for key in (*rule.needs, *rule.uses)))
        self._first_step: int | None = None
        self.last_step: int | None = None  # the newest step with a value that a rule looks at
        self._series = {key: _Rows(key) for key in self.series}
        self._first_values: dict[str, list[float]] = {}
        self._baselines: dict[str, Baseline] = {}
        self._starts: dict[str, list[float]] = {}
        self._bests: dict[str, Best] = {}
        self._nonfinite: dict[str, int] = {}
        self._states = {rule.name: _RuleState() for rule in self.rules}
        self._rules_for: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Rule]] = {}

    @property
    def baseline(self) -> float:
        """Median entropy in nats of the first 20 rows after warm-up; nan until they are complete."""
        found = self._baselines.get("entropy")
        return math.nan if found is None else found.value

    def observe(self, step: int, scalars: Mapping[str, float]) -> list[Alert]:
        """The transitions that this row causes, in the order of the rules.

        scalars: keys of METRICS; those that no rule looks at are ignored. A rule is asked about rows that have all the
        series that it needs, finite unless it judges broken ones. A value of nan or inf adds nothing to its series. A
        step at or before an earlier one (a resumed run) replaces the rows from there on.
        """
        row = {key: float(value) for key, value in scalars.items() if key in self._series and value is not None}
        if not row:
            return []
        if self._first_step is None:
            self._first_step = step
        self.last_step = step
        known = {key: value for key, value in row.items() if math.isfinite(value)}
        for key in row:
            self._go_back(key, step)
            self._nonfinite[key] = 0 if key in known else self._nonfinite.get(key, 0) + 1
        for key, value in known.items():
            self._append(key, step, value)
        window = self.window()
        found: list[Alert] = []
        for rule in self._asked(tuple(row), tuple(known)):
            if self._states[rule.name].state == "quiet" and rule.is_clear(window):
                continue  # `_advance` would leave it quiet
            found += self._advance(rule, step, rule.check(window))
        return found

    def _asked(self, row: tuple[str, ...], known: tuple[str, ...]) -> list[Rule]:
        """The rules that a row with these series, and these of them finite, is for. Rows of a run are mostly alike."""
        if (row, known) not in self._rules_for:
            if len(self._rules_for) >= _KINDS:
                self._rules_for.clear()
            self._rules_for[row, known] = [
                rule for rule in self.rules if all(key in (row if rule.judges_broken else known) for key in rule.needs)
            ]
        return self._rules_for[row, known]

    def verdict(self, step_s: float | None = None) -> Verdict:
        """What there is to say of the run now. step_s: seconds of a step, for minutes and costs."""
        return judge(
            self.open(),
            self.window(),
            self.last_step,
            rules=self.rules,
            warmup_steps=self.warmup_steps,
            step_s=step_s,
            total_steps=self.total_steps,
        )

    def open(self) -> list[Open]:
        """The alerts that fire now, in the order of the rules."""
        window, found = self.window(), []
        for rule in self.rules:
            state = self._states[rule.name]
            finding = rule.check(window) if state.state == "firing" else None
            if finding is not None:
                found.append(Open(rule, state.first_step, cast(Severity, state.severity), finding))
        return found

    def window(self) -> Window:
        """The run as rules see it now."""
        return Window(
            series={key: rows.views for key, rows in self._series.items() if len(rows)},
            baselines=self._baselines,
            bests=self._bests,
            starts={key: sum(v) / START_ROWS for key, v in self._starts.items() if len(v) == START_ROWS},
            nonfinite=self._nonfinite,
        )

    def _go_back(self, key: str, step: int) -> None:
        rows = self._series[key]
        if rows.last_step is not None and rows.last_step < step:
            return
        rows.go_back(step)
        best = self._bests.get(key)
        if best is not None and max(best.high_step, best.low_step) >= step:
            del self._bests[key]

    def _append(self, key: str, step: int, value: float) -> None:
        rows = self._series[key]
        rows.append(step, value)
        if key.startswith(EVALUATED):
            return
        started = self._starts.setdefault(key, [])
        if len(started) < START_ROWS:
            started.append(value)
        begun = self._first_values.setdefault(key, [])
        first = self._first_step if self._first_step is not None else step
        if len(begun) < BASELINE_ROWS and step >= first + self.warmup_steps:
            begun.append(value)
            if len(begun) == BASELINE_ROWS:
                self._baselines[key] = Baseline.of(np.array(begun))
        if len(rows) >= BEST_ROWS:
            level = mean(rows.views[1][: -BEST_ROWS - 1 : -1])
            best = self._bests.get(key)
            if best is None:
                best = Best(level, step, level, step)
            elif level > best.high:
                best = replace(best, high=level, high_step=step)
            elif level < best.low:
                best = replace(best, low=level, low_step=step)
            self._bests[key] = best

    def _advance(self, rule: Rule, step: int, finding: Finding | None) -> list[Alert]:
        state = self._states[rule.name]
        if finding is None:
            return []
        if SEVERITY_RANK[finding.severity] > SEVERITY_RANK[rule.worst]:
            finding = replace(finding, severity=rule.worst)
        if state.state == "firing":
            return self._advance_firing(rule, state, step, finding)
        if not finding.breached or self._cools_down(rule, state, step, finding):
            was_pending, state.state, state.count = state.state == "pending", "quiet", 0
            return [_alert(rule, state, "resolved", step, finding)] if was_pending else []
        state.count += 1
        if state.count >= rule.for_rows:
            state.state, state.first_step, state.severity = "firing", step, finding.severity
            state.count = state.worse = 0
            return [_alert(rule, state, "firing", step, finding)]
        if state.state == "quiet":
            state.state, state.first_step, state.severity = "pending", step, finding.severity
            return [_alert(rule, state, "pending", step, finding)]
        return []

    def _cools_down(self, rule: Rule, state: _RuleState, step: int, finding: Finding) -> bool:
        worse = SEVERITY_RANK[finding.severity] > SEVERITY_RANK[state.resolved_severity]
        return state.resolved is not None and step - state.resolved < rule.cooldown_steps and not worse

    def _advance_firing(self, rule: Rule, state: _RuleState, step: int, finding: Finding) -> list[Alert]:
        state.count = 0 if finding.held or finding.breached else state.count + 1
        if state.count >= rule.for_rows:
            state.state, state.count = "quiet", 0
            state.resolved, state.resolved_severity = step, state.severity
            return [_alert(rule, state, "resolved", step, finding)]
        state.worse = state.worse + 1 if SEVERITY_RANK[finding.severity] > SEVERITY_RANK[state.severity] else 0
        if state.worse >= rule.for_rows:
            state.severity, state.worse = finding.severity, 0
            return [_alert(rule, state, "firing", step, finding)]
        return []

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after a restart, as plain JSON types, for a checkpoint."""
        return {
            "warmup_steps": self.warmup_steps,
            "first_step": self._first_step,
            "last_step": self.last_step,
            "series": {
                key: [list(row) for row in zip(*(column.tolist() for column in rows.views), strict=True)]
                for key, rows in self._series.items()
            },
            "first_values": {key: list(values) for key, values in self._first_values.items()},
            "starts": {key: list(values) for key, values in self._starts.items()},
            "bests": {key: asdict(best) for key, best in self._bests.items()},
            "nonfinite": dict(self._nonfinite),
            "rules": {name: asdict(state) for name, state in self._states.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; rules that it does not know start quiet. Raises KeyError for a foreign dict."""
        self.warmup_steps = int(state["warmup_steps"])
        self._first_step, self.last_step = state["first_step"], state["last_step"]
        self._series = {key: _Rows(key, state["series"].get(key, ())) for key in self.series}
        self._first_values = {key: list(values) for key, values in state["first_values"].items()}
        complete = {key: values for key, values in self._first_values.items() if len(values) == BASELINE_ROWS}
        self._baselines = {key: Baseline.of(np.array(values)) for key, values in complete.items()}
        self._starts = {key: list(values) for key, values in state.get("starts", {}).items()}
        self._bests = {key: Best(**best) for key, best in state["bests"].items()}
        self._nonfinite = dict(state["nonfinite"])
        saved = state["rules"]
        self._states = {rule.name: _RuleState(**saved.get(rule.name, {})) for rule in self.rules}


def _alert(rule: Rule, state: _RuleState, to: AlertState, step: int, finding: Finding) -> Alert:
    gone = to == "resolved"
    return Alert(
        rule=rule.name,
        severity=state.severity if gone else finding.severity,  # type: ignore[arg-type]
        state=to,
        step=step,
        first_step=state.first_step,
        value=finding.value,
        baseline=finding.baseline,
        threshold=finding.threshold,
        message=finding.message,
        action="" if gone else finding.action,
    )
