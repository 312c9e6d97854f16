"""Wall times of a step, and the memory it took."""

from __future__ import annotations

import time

from monitor.signals.memory import peak_memory_gib


class StepClock:
    """Wall times of a step's parts, seconds. The hand-over to the recorder counts into the next step's figures."""

    def __init__(self) -> None:
        self._laps: dict[str, float] = {}
        self._handover = 0.0
        self._mark = 0.0

    def start(self) -> None:
        self._handover = self._laps.get("handover", 0.0)
        self._laps = {}
        self._mark = time.perf_counter()

    def skip(self) -> None:
        """Drops the time since the last lap (the evaluation): it counts as no part."""
        self._mark = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = now - self._mark
        self._mark = now

    def scalars(self, tokens: int) -> dict[str, float]:
        """The perf/ scalars of the step that is being recorded."""
        record_s = self._laps["record"] + self._handover
        step_s = self._laps["rollout"] + self._laps["update"] + record_s
        return {
            "perf/step_s": step_s,
            "perf/rollout_s": self._laps["rollout"],
            "perf/update_s": self._laps["update"],
            "perf/record_s": record_s,
            "perf/tokens_per_s": tokens / step_s,
            "perf/memory_gib": peak_memory_gib(),
        }
