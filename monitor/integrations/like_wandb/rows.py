"""Rows of a log become steps of a run."""

from __future__ import annotations

import fnmatch
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from monitor.integrations.like_wandb.names import STEPS, Names
from monitor.integrations.like_wandb.values import flat, is_table, number, recorded_histogram, samples_of, step_of
from monitor.recorder import Recorder
from monitor.records import Histogram, SampleTable, StepRecord

SETTLE_S = 2.0  # a step that gets nothing more for so long is recorded, although the next has not begun


@dataclass(slots=True)
class _Step:
    """What has been logged of a step so far. number: None while rows wait for the first one that has a step."""

    number: int | None
    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    samples: SampleTable | None = None
    touched: float = 0.0


class Rows:
    """Gives the rows of a log to a Recorder, all of one step together.

    The step of a row is the caller's own, else the first whole number in it of: columns that `define_metric` named as
    a step, STEPS, and a column of steps in a table. A row without any belongs to the step before. Before the first
    step it waits for that if `define_metric` named a column of steps; else its step is its count. A step is recorded
    when the next one begins, when nothing more came for SETTLE_S, and at the end.

    opened: gives the Recorder, when it is first needed. left_out: gets a name and what its value is, for what is not
    recorded.
    """

    def __init__(self, opened: Callable[[], Recorder | None], left_out: Callable[[str, str], None]) -> None:
        self._opened, self._left_out = opened, left_out
        self.names = Names(lambda text: self._note("name", text))
        self._lock = threading.RLock()
        self._now: _Step | None = None
        self._newest: int | None = None  # the newest step that a row had of its own
        self._step_metrics: dict[str, str] = {}  # pattern of names: the column of their step
        self._done = threading.Event()
        self._settling: threading.Thread | None = None

    def define(self, pattern: str, step_metric: str | None) -> None:
        """Names that fit the pattern have their step in that column."""
        if step_metric:
            self._step_metrics[pattern] = step_metric

    def add(self, row: Mapping[Any, Any], count: int, step: int | None) -> None:
        """Takes a row. count: how many there were before. step: the caller's own number, if it gave one."""
        values = flat(row)
        with self._lock:
            number_ = self._step_of(values, count) if step is None else step
            now = self._now
            if now is not None and now.number is None:
                now.number = number_
            elif now is not None and now.number != number_:
                self._emit()
            now = self._now = self._now or _Step(number_)
            self._collect(now, values)
            now.touched = time.monotonic()
            if self._settling is None:
                self._settling = threading.Thread(target=self._settle, name="rlvr-rows", daemon=True)
                self._settling.start()

    def flush(self) -> None:
        """Records what there is of the step."""
        with self._lock:
            self._emit()

    def close(self) -> None:
        self._done.set()
        self.flush()

    def _settle(self) -> None:
        while not self._done.wait(SETTLE_S / 4):
            with self._lock:
                now = self._now
                if now is not None and now.number is not None and time.monotonic() - now.touched > SETTLE_S:
                    self._emit()

    def _step_of(self, values: Mapping[str, Any], count: int) -> int | None:
        metrics = [column for pattern, column in self._step_metrics.items() if any(
            fnmatch.fnmatchcase(name, pattern) for name in values)]  # fmt: skip
        candidates = [values.get(column) for column in (*metrics, *STEPS)]
        candidates += [step_of(value) for value in values.values() if is_table(value)]
        for candidate in candidates:
            found = number(candidate)
            if found is not None and math.isfinite(found) and found >= 0 and found == int(found):
                self._newest = int(found)
                return self._newest
        return self._newest if self._newest is not None or self._step_metrics else count

    def _collect(self, now: _Step, values: Mapping[str, Any]) -> None:
        scalars: dict[str, float] = {}
        for name, value in values.items():
            found = number(value)
            if name in STEPS or value is None or name in self._step_metrics.values():
                continue
            if found is not None:
                scalars[name] = found
            elif histogram := recorded_histogram(name, value):
                now.histograms[name] = histogram
            elif is_table(value) and (samples := samples_of(value)) is not None:
                now.samples = samples
            else:
                self._left_out(name, type(value).__name__)
        self.names.see(scalars)
        for name, found in scalars.items():
            key = self.names[name]
            if key is not None:
                now.scalars[key] = found

    def _emit(self) -> None:
        now, self._now = self._now, None
        recorder = None if now is None else self._opened()
        if now is not None and recorder is not None and (now.scalars or now.histograms or now.samples is not None):
            record = StepRecord(now.number or 0, now.scalars, tuple(now.histograms.values()))
            recorder.record(record, samples=now.samples)

    def _note(self, kind: str, text: str) -> None:
        recorder = self._opened()
        if recorder is not None:
            recorder.event(kind, text, None if self._now is None else self._now.number)
