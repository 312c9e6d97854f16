"""AlertEngine: feeds rows to the rules and turns findings into transitions pending -> firing -> resolved."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from monitor.alerts.rules import DEFAULT_RULES, Finding, Rule
from monitor.alerts.window import BASELINE_ROWS, TREND_ROWS, Window, baseline_noise
from monitor.records import SEVERITY_RANK, Alert, AlertState, finite

SERIES = ("entropy", "reward", "response_length")  # the keys that rules may look at


@dataclass(slots=True)
class _RuleState:
    state: str = "quiet"  # quiet, pending or firing
    first_step: int = 0
    severity: str = "info"  # the worst announced in this episode
    count: int = 0  # rows in a row towards firing, or towards resolving
    worse: int = 0  # rows in a row above the announced severity


class AlertEngine:
    """Evaluates the rules on each step of one run; deterministic, O(window) per step and in memory.

    warmup_steps: steps after the first one that are not part of the baseline; rules are silent until the baseline of
    20 rows is complete. A pending alert that goes away before it fires is closed by a "resolved" transition too.
    A firing alert that gets worse announces "firing" again with the higher severity and the same first_step.
    """

    def __init__(self, rules: Sequence[Rule] = DEFAULT_RULES, warmup_steps: int = 0) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}.")
        self.rules = tuple(rules)
        self.warmup_steps = warmup_steps
        self._first_step: int | None = None
        self._rows: deque[tuple[int, dict[str, float]]] = deque(maxlen=TREND_ROWS)
        self._first_entropies: list[float] = []
        self._baseline, self._noise = math.nan, 0.0
        self._nonfinite_rows = 0
        self._states = {rule.name: _RuleState() for rule in self.rules}

    @property
    def baseline(self) -> float:
        """Median entropy in nats of the first 20 rows after warm-up; nan until they are complete."""
        return self._baseline

    def observe(self, step: int, scalars: Mapping[str, float]) -> list[Alert]:
        """The transitions that this row causes, in the order of the rules.

        scalars: keys of METRICS; a row without "entropy" is ignored, one with nan or inf counts as non-finite and
        leaves the series alone. A step at or before an earlier one (a resumed run) replaces the rows from there on.
        """
        entropy = scalars.get("entropy")
        if entropy is None:
            return []
        if self._first_step is None:
            self._first_step = step
        if math.isfinite(entropy):
            self._append(step, {key: float(scalars[key]) for key in SERIES if scalars.get(key) is not None})
        else:
            self._nonfinite_rows += 1
        window = self._window()
        return [alert for rule in self.rules for alert in self._advance(rule, step, rule.check(window))]

    def _append(self, step: int, row: dict[str, float]) -> None:
        self._nonfinite_rows = 0
        while self._rows and self._rows[-1][0] >= step:
            self._rows.pop()
        self._rows.append((step, row))
        first = self._first_step if self._first_step is not None else step
        if len(self._first_entropies) < BASELINE_ROWS and step >= first + self.warmup_steps:
            self._first_entropies.append(row["entropy"])
            self._set_baseline()

    def _set_baseline(self) -> None:
        complete = len(self._first_entropies) == BASELINE_ROWS
        entropies = np.array(self._first_entropies)
        self._baseline = float(np.median(entropies)) if complete else math.nan
        self._noise = baseline_noise(entropies) if complete else 0.0

    def _window(self) -> Window:
        rows = list(self._rows)
        keys = [key for key in SERIES if any(key in row for _, row in rows)]
        return Window(
            steps=np.array([step for step, _ in rows], np.int64),
            columns={key: np.array([row.get(key, math.nan) for _, row in rows]) for key in keys},
            baseline=self._baseline,
            noise=self._noise,
            nonfinite_rows=self._nonfinite_rows,
        )

    def _advance(self, rule: Rule, step: int, finding: Finding | None) -> list[Alert]:
        state = self._states[rule.name]
        if finding is None:
            return []
        if state.state == "firing":
            return self._advance_firing(rule, state, step, finding)
        if not finding.breached:
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

    def _advance_firing(self, rule: Rule, state: _RuleState, step: int, finding: Finding) -> list[Alert]:
        state.count = 0 if finding.held or finding.breached else state.count + 1
        if state.count >= rule.for_rows:
            state.state, state.count = "quiet", 0
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
            "rows": [[step, finite(row)] for step, row in self._rows],
            "first_entropies": list(self._first_entropies),
            "nonfinite_rows": self._nonfinite_rows,
            "rules": {name: asdict(state) for name, state in self._states.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; rules that it does not know start quiet. Raises KeyError for a foreign dict."""
        self.warmup_steps = int(state["warmup_steps"])
        self._first_step = state["first_step"]
        self._rows.clear()
        for step, row in state["rows"]:
            self._rows.append((int(step), {k: math.nan if v is None else float(v) for k, v in row.items()}))
        self._first_entropies = [float(value) for value in state["first_entropies"]]
        self._set_baseline()
        self._nonfinite_rows = int(state["nonfinite_rows"])
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
