"""What one new step costs on the Run page of a long run: bytes to the browser, server CPU, time until it is seen.

Run: python benchmarks/bench_run_page.py [--steps 5000] [--live 60]

The run is real in its values: those of sample_runs/uniform-s0, over and over. A real server and a real Chromium show it
while --live further steps are recorded, one a second: as long as the rarest of the page's figures takes to be made
anew. The page is scrolled to the top, then to the bottom. A check without news is measured when the page has settled.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from harness import RESULTS, write_rows

from dashboard.launch import start, stop
from monitor.queries.frames import Frame, frame
from monitor.recorder import Recorder
from monitor.records import Histogram, RunInfo, StepRecord
from monitor.store.tail import Tail

SAMPLES = Path(__file__).resolve().parent.parent / "sample_runs"
RUN, TITLES = "uniform-s0", ("Mean entropy", "Entropy of tokens")  # a chart at the top, and one far below
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
NEWEST = """title => { const p = [...document.querySelectorAll('.rlvr-plot')]
    .find(n => n.getAttribute('aria-label') === title);
    return p && p._fullData ? Number(Array.from(p._fullData[0].x).pop()) : -1; }"""


def recorded() -> list[tuple[dict[str, float], tuple[Histogram, ...]]]:
    """The scalars and histograms of every step of the sample run."""
    tail = Tail(SAMPLES)
    tail.poll()
    con = tail.cursor()
    scalars = frame(con, "SELECT step, name, value FROM steps WHERE run = ? AND rank = 0", [RUN])
    kept = frame(con, "SELECT * FROM histograms WHERE run = ? AND rank = 0", [RUN])
    tail.close()
    return [
        (
            {str(scalars["name"][i]): float(scalars["value"][i]) for i in (scalars["step"] == step).nonzero()[0]},
            tuple(_histogram(kept, i) for i in (kept["step"] == step).nonzero()[0]),
        )
        for step in sorted(set(kept["step"]))
    ]


def _histogram(rows: Frame, i: int) -> Histogram:
    names = ("metric", "split", "edges_id", "counts", "n", "n_nonfinite", "sum", "sumsq", "min", "max")
    return Histogram(*(rows[name][i] for name in names))


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--live", type=int, default=60)
    options = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("This benchmark needs a browser: pip install playwright, and Chromium (see tests/dashboard/conftest.py).")
        return 2
    known, rows = recorded(), []
    with (
        tempfile.TemporaryDirectory() as folder,
        Recorder(folder, RunInfo(name="long", task="chain"), flush_s=0.0, queue_steps=options.steps) as recorder,
    ):

        def record(step: int) -> None:
            scalars, histograms = known[step % len(known)]
            recorder.record(StepRecord(step, scalars, histograms))

        for step in range(1, options.steps + 1):
            record(step)
        recorder.flush()
        server, url = start(Path(folder))
        try:
            with sync_playwright() as driver:
                chromium = os.environ.get("RLVR_CHROMIUM") or "/usr/bin/chromium"
                page = driver.chromium.launch(executable_path=chromium, args=FLAGS).new_page(
                    viewport={"width": 1440, "height": 900}
                )
                received: list[int] = []
                page.on("websocket", lambda ws: ws.on("framereceived", lambda data: received.append(len(data))))
                began = time.monotonic()
                page.goto(f"{url}/run?run=long")
                newest = options.steps
                for where, title in zip(("top", "bottom"), TITLES, strict=True):
                    scroll = "document.querySelector('.stMain').scrollTo(0, {})"
                    page.wait_for_selector(".rlvr-plot", timeout=120_000)
                    page.evaluate(scroll.format("0" if where == "top" else "1e6"))
                    _until(page, title, newest)
                    print(f"{where}: drawn {time.monotonic() - began:.1f} s after the page was asked for")
                    page.wait_for_timeout(8000)
                    spent, idle = cpu_s(server.pid), time.monotonic()
                    page.wait_for_timeout(10_000)
                    nothing = (cpu_s(server.pid) - spent) / (time.monotonic() - idle) * 0.5
                    seen, spent, before = [], cpu_s(server.pid), sum(received)
                    for _ in range(options.live):
                        newest += 1
                        due = time.monotonic() + 1.0
                        record(newest)
                        recorder.flush()
                        seen.append(_until(page, title, newest))
                        page.wait_for_timeout(max(0.0, 1000 * (due - time.monotonic())))
                    rows.append({
                        "what": f"one new step, page at its {where}", "steps": options.steps, "live": options.live,
                        "kib_per_step": round((sum(received) - before) / 1024 / options.live, 1),
                        "server_cpu_ms_per_step": round(1000 * (cpu_s(server.pid) - spent) / options.live, 1),
                        "server_cpu_ms_per_check": round(1000 * nothing, 1),
                        "seen_median_s": round(statistics.median(seen), 2), "seen_max_s": round(max(seen), 2),
                        "load": round(os.getloadavg()[0], 1),
                    })  # fmt: skip
                    print(rows[-1])
        finally:
            stop(server)
    write_rows(RESULTS / "run_page.csv", rows, ("duckdb", "plotly", "streamlit", "numpy"))
    return 0


def _until(page, title: str, step: int) -> float:
    """Seconds until the chart shows `step`, which was written just before; for a binned chart, until it has come."""
    began = time.monotonic()
    while time.monotonic() - began < 120:
        shown = page.evaluate(NEWEST, title)
        if shown >= step or (title == TITLES[1] and shown > 0):
            return time.monotonic() - began
        page.wait_for_timeout(20)
    raise SystemExit(f"The chart {title!r} did not show step {step} within 120 s; it is at {shown}.")


if __name__ == "__main__":
    sys.exit(main())
