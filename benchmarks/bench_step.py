"""Seconds per training step of the demo's settings, and the share that recording takes.

    python benchmarks/bench_step.py

Medians over the steps after warm-up of a run without evaluation, one CPU thread, one process at a time; "record_s" is
the time that recording took from the training thread (statistics, host copy, texts, hand-over).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from harness import RESULTS, write_rows

from monitor.cli import main as rlvr
from monitor.store.reader import open_store

PRESET = Path(__file__).parent.parent / "trainer" / "presets" / "demo.toml"
QUERY = """SELECT name, median(value) FROM steps WHERE run = ? AND step > 8 AND (name IN ('response_length', 'tokens')
    OR (name LIKE 'perf/%' AND name NOT IN ('perf/queue', 'perf/memory_gib'))) GROUP BY name"""


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("uniform", "ict", "random"):
            options = ["--weighting.kind", kind, "--run", kind, "--store", folder, "--steps", "30", "--eval.every", "0"]
            if rlvr(["train", str(PRESET), *options]) != 0:
                raise SystemExit(f"{kind} did not finish")
        with open_store(folder) as store:
            for kind in ("uniform", "ict", "random"):
                found = {str(name): float(value) for name, value in store.sql(QUERY, [kind]).rows}
                share = found["perf/record_s"] / found["perf/step_s"]
                state = store.run(kind)
                tokens = store.sql("SELECT count(*) FROM tokens WHERE run = ?", [kind]).rows[0][0]
                size = {"store_bytes": state.bytes, "tokens_recorded": tokens, "bytes_per_token": state.bytes / tokens}
                rows.append(
                    {"weighting": kind, "recording_share": round(share, 4)}
                    | {key.removeprefix("perf/"): round(value, 4) for key, value in sorted(found.items())}
                    | {key: round(value, 2) for key, value in size.items()}
                )
    write_rows(RESULTS / "step.csv", rows, ("torch", "transformers"))


if __name__ == "__main__":
    main()
