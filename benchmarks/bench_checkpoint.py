"""How long a step waits for a checkpoint, written by the step itself and in the background.

    python benchmarks/bench_checkpoint.py

SmolLM2-135M with AdamW's moments, on a CPU. Both ways take turns in one process; the disk is that of the temporary
folder. Columns, medians over turns, seconds: pause_s, what the step waits; durable_s, from the step until the
checkpoint has its name; pause_share, pause_s of the background / pause_s of the other way in the same turn.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from against_trl import settings
from harness import RESULTS, no_options, write_rows

from monitor.alerts.engine import AlertEngine
from monitor.recorder import Recorder
from monitor.records import StepRecord
from trainer.config import CheckpointConfig
from trainer.runtime.action_state import ActionState
from trainer.runtime.build import prepare
from trainer.runtime.checkpoint import Checkpoints

MODEL, TURNS = "smollm2-135m", 5
WAYS = {"step": "never", "background": "always"}  # who writes -> checkpoint.background


def main() -> None:
    no_options(__doc__)
    parts = prepare(settings(MODEL, "uniform"))
    for parameter in parts.updater.trained:
        parameter.grad = torch.ones_like(parameter)
    parts.updater.optimizer.step()  # its moments
    pauses: dict[str, list[float]] = {name: [] for name in WAYS}
    durable: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder, Recorder(folder, "bench") as recorder:
        ways = {
            name: Checkpoints(
                Path(folder) / name, parts, recorder, AlertEngine(), CheckpointConfig(every=1, keep=1, background=way),
                ActionState(),
            )
            for name, way in WAYS.items()
        }  # fmt: skip
        for step in range(1, TURNS + 2):  # the first turn warms up
            for name, checkpoints in ways.items():
                begin = time.perf_counter()
                checkpoints.after(StepRecord(step, {}))
                pauses[name].append(time.perf_counter() - begin)
                checkpoints.finish()
                durable[name].append(time.perf_counter() - begin)
        size = sum(path.stat().st_size for path in (Path(folder) / "step").rglob("*") if path.is_file())
    shares = [a / b for a, b in zip(pauses["background"][1:], pauses["step"][1:], strict=True)]
    rows = [
        {
            "model": MODEL,
            "written_by": name,
            "mib": round(size / 2**20),
            "turns": TURNS,
            "pause_s": round(statistics.median(pauses[name][1:]), 3),
            "durable_s": round(statistics.median(durable[name][1:]), 3),
            "pause_share": round(statistics.median(shares), 3) if name == "background" else 1,
        }
        for name in WAYS
    ]
    write_rows(RESULTS / "checkpoint.csv", rows, ("torch", "safetensors"))


if __name__ == "__main__":
    main()
