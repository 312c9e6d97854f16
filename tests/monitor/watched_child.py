"""A run of another trainer: no engine; 1 nat for 25 steps, then a collapse. Waits for a line before each part."""

from __future__ import annotations

import sys

from monitor.recorder import Recorder
from monitor.records import StepRecord


def entropies() -> list[float]:
    return [1.0 + 0.001 * (i % 3) for i in range(25)] + [0.9 * 0.8**i for i in range(15)]


if __name__ == "__main__":
    recorder = Recorder(sys.argv[1], "theirs", flush_s=0.0)
    values = entropies()
    for part in (range(25), range(25, 40)):
        sys.stdin.readline()
        for step in part:
            recorder.record(StepRecord(step, {"entropy": values[step], "reward": 0.5}))
        recorder.flush()
        print(part.stop, flush=True)
    sys.stdin.readline()  # killed here
