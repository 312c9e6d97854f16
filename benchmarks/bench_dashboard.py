"""What one redraw of the run page costs at 1,300 steps: poll, queries, figures, JSON.

Run: python benchmarks/bench_dashboard.py
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import RESULTS, no_options, write_rows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "dashboard"))
import simulated

from dashboard.figures import distributions
from dashboard.figures.lines import Line, lines
from dashboard.figures.theme import LIGHT
from monitor.queries.distributions import count_matrix, quantile_series
from monitor.queries.rollouts import tokens_of_step
from monitor.queries.series import scalar_series, series_of
from monitor.recorder import Recorder
from monitor.store.tail import Tail

STEPS, RUN, REPEATS = 1300, "ict-s0", 15


def record(store: Path) -> None:
    """A run of about 130 segments per table, ten steps in each."""
    with Recorder(store, simulated.info(RUN, "ict", 0, STEPS), flush_s=0.0, queue_steps=4 * STEPS) as recorder:
        for number in range(1, STEPS + 1):
            record, tokens, samples = simulated.step(number, weighting="ict", seed=0, total=STEPS)
            recorder.record(record, tokens, samples)
            while number % 10 == 0 and recorder.queue_depth:
                time.sleep(0.0005)


def measure(what: str, call: Callable[[], object], repeats: int = REPEATS) -> dict[str, object]:
    """Median and worst wall time in ms, and the median CPU time, which a busy machine changes less."""
    wall, cpu = [], []
    for _ in range(repeats):
        began, spent = time.perf_counter(), time.process_time()
        call()
        wall.append(1000 * (time.perf_counter() - began))
        cpu.append(1000 * (time.process_time() - spent))
    row = {"what": what, "steps": STEPS, "repeats": repeats, "median_ms": round(statistics.median(wall), 2),
           "max_ms": round(max(wall), 2), "cpu_ms": round(statistics.median(cpu), 2)}  # fmt: skip
    print(row)
    return row


def main() -> None:
    no_options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        record(store)
        rows = [measure("first poll, all segments", lambda: Tail(store).poll(), 3)]
        tail = Tail(store, min_interval_s=0.0)
        tail.poll()
        con = tail.cursor()
        rows.append(measure("poll without news", tail.poll))
        keys = ("reward", "entropy", "renyi2", "kl", "grad_norm", "response_length")
        rows.append(measure("query: six series", lambda: scalar_series(con, [RUN], keys)))
        rows.append(measure("query: entropy fan", lambda: quantile_series(con, RUN, "entropy", "all", 1000)))
        rows.append(measure("query: deviation heatmap", lambda: count_matrix(con, RUN, "deviation", "all", 300)))
        rows.append(measure("query: tokens of one rollout", lambda: tokens_of_step(
            con, tail.files(RUN, "tokens", STEPS // 2), STEPS // 2, [3])))  # fmt: skip
        series = scalar_series(con, [RUN], keys)
        line = Line("entropy", *series_of(series, RUN, "entropy"), LIGHT.accent)
        fan = quantile_series(con, RUN, "entropy", "all", 1000)
        cells = count_matrix(con, RUN, "deviation", "all", 300)
        for name, build in (
            ("line", lambda: lines(LIGHT, "entropy", [line])),
            ("entropy fan", lambda: distributions.entropy_fan(LIGHT, fan, LIGHT.accent)),
            ("deviation heatmap", lambda: distributions.histogram_map(LIGHT, cells, "deviation")),
        ):
            rows.append(measure(f"figure: {name}", build))
            rows.append(measure(f"json: {name}", build().to_json))
    write_rows(RESULTS / "dashboard.csv", rows, ("duckdb", "plotly", "streamlit", "numpy"))


if __name__ == "__main__":
    main()
