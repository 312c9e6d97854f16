"""What one redraw of the run page costs at 1,300 steps: poll, queries, figures, JSON. Overview of 301 runs; long runs.

Of the Overview, in headless Chromium before the real server: the first page, and how long a step of the one live run
takes from the end of `flush()` to the page while the 300 others stand still. Of ten runs of 5,000 steps: how long the
pages that show all of them take until their data is on the screen, from a server that has read nothing and from one
that has. Of the Tokens page: how long until a step of 16 rollouts of 500 tokens is on the screen, and another one after
it. Needs playwright and Chromium (RLVR_CHROMIUM, else /usr/bin/chromium).

Run: python benchmarks/bench_dashboard.py [--only redraw overview long tokens]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import RESULTS, write_rows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "dashboard"))
import numpy as np
import simulated
from conftest import CHROMIUM, FLAGS

from dashboard.figures import distributions
from dashboard.figures.lines import Line, lines
from dashboard.figures.theme import LIGHT
from dashboard.launch import start, stop
from monitor.queries.distributions import count_matrix, quantile_series
from monitor.queries.rollouts import tokens_of_step
from monitor.queries.series import scalar_series, series_of
from monitor.recorder import Recorder
from monitor.store.tail import Tail

STEPS, RUN, REPEATS = 1300, "ict-s0", 15
RUNS, RUN_STEPS, LIVE_STEPS = 300, 120, 40  # of the Overview: ended runs, steps of each, steps of the live one
LONG_RUNS, LONG_STEPS, LONG_REPEATS = 10, 5000, 7
TOKEN_STEPS = 7
LONG_PAGES = {  # (page, what is waited for) -> what says that it is on the screen
    ("overview", "every row"): "() => [...document.querySelectorAll('.rlvr-runs tbody tr')].filter(row => "
    f"row.textContent.includes('{LONG_STEPS:,} of')).length === 2",  # the seeds of an arm are one row
    ("compare", "verdict"): "() => document.querySelector('[data-testid=stAlert]')",
    ("compare", "six charts"): "() => document.querySelectorAll('.rlvr-plot .main-svg:first-child').length >= 6",
}  # fmt: skip


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


def record_many(store: Path) -> None:
    """RUNS ended runs: copies of six under other names, because readers name a run by its folder."""
    made = []
    for seed in range(3):
        for weighting in ("uniform", "ict"):
            fire = 60 if weighting == "uniform" else None
            made.append(f"first-{weighting}-s{seed}")
            simulated.record_run(store, made[-1], weighting, seed=seed, steps=RUN_STEPS, fire=fire, flush_s=5.0)
    for number in range(RUNS):
        of, name = made[number % 6], f"sweep{number // 6:02d}-{made[number % 6].removeprefix('first-')}"
        folder = shutil.copytree(store / "runs" / of, store / "runs" / name, symlinks=True)
        for path in [folder / "run.json", *folder.glob("heartbeat*.json")]:
            found = json.loads(path.read_text()) | {"run" if "heartbeat" in path.name else "name": name}
            path.write_text(json.dumps(found | ({"comparison": f"sweep{number // 6:02d}"} if "name" in found else {})))
    for name in made:
        shutil.rmtree(store / "runs" / name)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_overview(store: Path) -> dict[str, Any]:
    """One row: the Overview of RUNS ended runs and a live one."""
    from playwright.sync_api import sync_playwright

    server, url = start(store)
    try:
        with sync_playwright() as driver, Recorder(store, simulated.info("live", "ict", 9, 999), flush_s=0.0) as live:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport={"width": 1440, "height": 900})

            def record_live(number: int) -> None:
                live.record(*simulated.step(number, weighting="ict", seed=9, total=999))
                live.flush()

            def shown(number: int) -> None:
                page.wait_for_function(
                    "step => [...document.querySelectorAll('.rlvr-runs tbody tr')].some(row => "
                    "row.textContent.startsWith('live') && row.textContent.includes(`${step} of 999`))",
                    arg=number, timeout=120_000, polling=10,
                )  # fmt: skip

            for number in range(1, 31):
                record_live(number)
            paints = []
            for _ in range(4):  # the first by a server that has read nothing yet
                began = time.perf_counter()
                page.goto(url)
                shown(30)
                paints.append(time.perf_counter() - began)
            received: list[int] = []
            session = page.context.new_cdp_session(page)
            session.send("Network.enable")
            session.on(
                "Network.webSocketFrameReceived", lambda event: received.append(len(event["response"]["payloadData"]))
            )
            page.reload()
            shown(30)
            page.wait_for_timeout(3000)
            quiet = cpu_s(server.pid)
            page.wait_for_timeout(10_000)
            quiet = (cpu_s(server.pid) - quiet) / 10
            received.clear()
            began, spent, delays = time.perf_counter(), cpu_s(server.pid), []
            for number in range(31, 31 + LIVE_STEPS):
                record_live(number)
                ready = time.perf_counter()
                shown(number)
                delays.append(time.perf_counter() - ready)
                page.wait_for_timeout(max(0.0, 1000 * (number - 30 - (time.perf_counter() - began))))
            spent = cpu_s(server.pid) - spent - quiet * (time.perf_counter() - began)
            nodes = page.evaluate("document.querySelectorAll('*').length")
            browser.close()
    finally:
        stop(server)
    delays.sort()
    row = {
        "runs": RUNS + 1, "steps": LIVE_STEPS, "nodes": nodes, "first_page_s": round(paints[0], 2),
        "next_page_s": round(statistics.median(paints[1:]), 2),
        "step_to_page_median_s": round(statistics.median(delays), 2),
        "step_to_page_p95_s": round(delays[int(0.95 * len(delays))], 2), "step_to_page_max_s": round(delays[-1], 2),
        "kib_for_a_step": round(0.75 * sum(received) / 1024 / LIVE_STEPS, 1),  # payloads are told in base64
        "server_cpu_ms_for_a_step": round(1000 * spent / LIVE_STEPS, 1),
        "server_cpu_ms_for_a_quiet_s": round(1000 * quiet, 1), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    print(row)
    return row


def overview() -> None:
    with tempfile.TemporaryDirectory() as folder:
        record_many(Path(folder))
        write_rows(RESULTS / "dashboard_overview.csv", [measure_overview(Path(folder))], ("duckdb", "streamlit"))


def record_long(store: Path) -> None:
    """LONG_RUNS ended runs of LONG_STEPS steps, half of each weighting: two of them and copies as other seeds."""
    for weighting in ("uniform", "ict"):
        first = f"{weighting}-s0"
        with Recorder(store, simulated.info(first, weighting, 0, LONG_STEPS), queue_steps=4 * LONG_STEPS) as recorder:
            for number in range(1, LONG_STEPS + 1):
                recorder.record(simulated.step(number, weighting=weighting, seed=0, total=LONG_STEPS)[0])
                while number % 50 == 0 and recorder.queue_depth > 500:
                    time.sleep(0.01)
        for seed in range(1, LONG_RUNS // 2):
            name = f"{weighting}-s{seed}"
            folder = shutil.copytree(store / "runs" / first, store / "runs" / name, symlinks=True)
            for path in [folder / "run.json", *folder.glob("heartbeat*.json")]:
                found = json.loads(path.read_text())
                found |= {"run": name} if "heartbeat" in path.name else {"name": name, "seed": seed}
                path.write_text(json.dumps(found))


def measure_long(store: Path) -> list[dict[str, Any]]:
    """A row for each page: seconds until its data is on the screen."""
    from playwright.sync_api import sync_playwright

    rows = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for (name, what), shown in LONG_PAGES.items():
            began = time.perf_counter()  # of the first page: with the start of the server, which reads ahead
            server, url = start(store)
            try:
                page = browser.new_page(viewport={"width": 1440, "height": 900})
                times, spent = list[float](), 0.0
                for _ in range(1 + LONG_REPEATS):
                    page.goto(f"{url}/{name}" if name != "overview" else url)
                    page.wait_for_function(shown, timeout=120_000, polling=10)
                    times.append(time.perf_counter() - began)
                    spent = spent or cpu_s(server.pid)
                    page.wait_for_timeout(1500)
                    began = time.perf_counter()
                nodes = page.evaluate("document.querySelectorAll('*').length")
                page.close()
            finally:
                stop(server)
            row = {
                "page": name, "shown": what, "runs": LONG_RUNS, "steps": LONG_STEPS, "nodes": nodes,
                "start_and_first_page_s": round(times[0], 2), "server_cpu_until_then_s": round(spent, 2),
                "warm_page_median_s": round(statistics.median(times[1:]), 2),
                "warm_page_max_s": round(max(times[1:]), 2), "load": round(os.getloadavg()[0], 1),
            }  # fmt: skip
            print(row)
            rows.append(row)
        browser.close()
    return rows


def long_runs() -> None:
    with tempfile.TemporaryDirectory() as folder:
        record_long(Path(folder))
        write_rows(RESULTS / "dashboard_long.csv", measure_long(Path(folder)), ("duckdb", "plotly", "streamlit"))


def record_tokens(store: Path) -> None:
    """A run of TOKEN_STEPS steps of 16 rollouts of 500 tokens, one group."""
    import rlvr_monitor

    class Words:
        def decode(self, ids: list[int]) -> str:
            return " ".join(simulated.WORDS[i % len(simulated.WORDS)].strip() for i in ids)

    rng = np.random.default_rng(0)
    with rlvr_monitor.init(store=store, run="wide", tokenizer=Words()) as monitor:
        for _ in range(TOKEN_STEPS):
            monitor.step(
                logprobs=-rng.random((16, 500)), entropies=rng.random((16, 500)),
                token_ids=rng.integers(0, 900, (16, 500)), mask=np.ones((16, 500), bool),
                group_ids=np.zeros(16, int), rewards=rng.random(16).round(), prompts=["prompt"] * 16,
            )  # fmt: skip


def measure_tokens(store: Path) -> list[dict[str, Any]]:
    """Seconds until 8,000 tokens are on the screen, of a page that is opened and of a step that is chosen on it."""
    from playwright.sync_api import sync_playwright

    shown = "() => document.querySelectorAll('.rlvr-tokens span').length === 8000"
    drawn = "document.querySelector('.rlvr-rollouts').rlvrRollouts.data.id"
    opened, chosen = list[float](), list[float]()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        server, url = start(store)
        try:
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            for number in range(TOKEN_STEPS):
                began = time.perf_counter()
                page.goto(f"{url}/tokens?run=wide&step={number + 1}")
                page.wait_for_function(shown, timeout=120_000, polling=10)
                opened.append(time.perf_counter() - began)
                page.wait_for_timeout(1500)
            for _ in range(TOKEN_STEPS - 1):
                before, began = page.evaluate(drawn), time.perf_counter()
                page.get_by_role("slider").first.press("ArrowLeft")
                page.wait_for_function(f"before => {drawn} !== before", arg=before, timeout=120_000, polling=10)
                page.wait_for_function(shown, timeout=120_000, polling=10)
                chosen.append(time.perf_counter() - began)
                page.wait_for_timeout(1500)
        finally:
            stop(server)
        browser.close()
    load = round(os.getloadavg()[0], 1)
    return [
        {
            "what": what, "tokens": 8000, "times": len(times), "median_s": round(statistics.median(times), 2),
            "max_s": round(max(times), 2), "load": load,
        }
        for what, times in (("page opened", opened[1:]), ("step chosen", chosen))
    ]  # fmt: skip


def tokens() -> None:
    with tempfile.TemporaryDirectory() as folder:
        record_tokens(Path(folder))
        write_rows(RESULTS / "dashboard_tokens.csv", measure_tokens(Path(folder)), ("duckdb", "streamlit"))


def redraw() -> None:
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


PARTS = {"redraw": redraw, "overview": overview, "long": long_runs, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), default=[], help="parts to measure; all unless some are named"
    )
    for part in parser.parse_args().only or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
