"""The report of a comparison: one file that asks nobody, drawn by a real browser in both colour schemes."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from test_browser import until

from dashboard.figures.intervals import difference_intervals
from dashboard.figures.theme import DARK, LIGHT
from dashboard.report import main, page
from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord
from monitor.stats.comparison import load_comparison, paired_comparison, save_comparison
from monitor.store.tail import Tail

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """uniform and ict, three seeds each; 20 steps with evaluations at every tenth."""
    path = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    arms: dict[str, dict[int, str]] = {"uniform": {}, "ict:keep=0.3": {}}
    for arm, slope in zip(arms, (0.03, 0.015), strict=True):
        for seed in range(3):
            kind = arm.partition(":")[0]
            arms[arm][seed] = name = f"c-{kind}-s{seed}"
            info = RunInfo(name=name, model="builtin", task=EVIL, weighting=kind, seed=seed,
                           config={"weighting": {"kind": kind}, "task": "chain"})  # fmt: skip
            with Recorder(path, info) as recorder:
                for step in range(21):
                    scalars = {"entropy": float(np.exp(-slope * step)), "reward": slope * step, "perf/step_s": 1.0}
                    if step % 10 == 0:
                        scalars |= {
                            "eval/heldout/pass@1": slope * step + rng.normal(0, 0.01), "eval/heldout/distinct": 3.0,
                        }  # fmt: skip
                    recorder.record(StepRecord(step, scalars))
    tail = Tail(path)
    tail.poll()
    configs = {name: entry.info["config"] for name, entry in tail.runs.items()}
    save_comparison(path, paired_comparison(tail.cursor(), "c", arms, configs))
    tail.close()
    return path


@pytest.fixture(scope="module")
def report(store: Path) -> Path:
    assert main(["c", str(store)]) == 0
    return store / "comparisons" / "c.html"


def test_the_file_stands_alone_and_escapes_what_runs_say(report):
    text = report.read_text()
    outside_scripts = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"<\w+[^>]*\s(src|href)\s*=|@import|url\(", outside_scripts)
    assert EVIL not in text and "&lt;img src=x" in text
    assert "pass@1 against distinct answers" in text and "Options that differ" in text
    assert "c-ict-s2" in text and "p cannot be below 0.25" in text


@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_every_chart_in_its_colours_without_a_network(browser, report, dark):
    page = browser.contexts[dark].new_page()  # dark ones are phones
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or wrong.append(request.url))
    page.goto(report.as_uri())
    places = page.locator("[data-chart]").count()
    # pass@1 against distinct, four curves, and a difference of pass@1, distinct, reward, entropy and entropy kept
    assert places == 10
    until(page, lambda: page.evaluate("document.querySelectorAll('.main-svg:first-child').length") == places)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # nothing sticks out
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(14, 17, 23)" if dark else "rgb(255, 255, 255)")
    text = page.evaluate("document.querySelector('[data-chart]')._fullLayout.font.color")
    assert text == ("#e6e9ee" if dark else "#262b33")
    page.close()
    assert not wrong, wrong


def test_the_sentence_stands_first_and_in_the_colour_of_its_arm(store, report):
    (sentence,) = load_comparison(store, "c")["verdicts"].values()
    # .03 * 20 = .6 against .015 * 20 = .3, noise of .01 on each; 3 answers everywhere
    begins = "ict:keep=0.3 reached only pass@1 .29 where uniform reached .60 (-.31"
    assert sentence.startswith(begins) and "3.0 against 3.0 (+0.0 [+0.0, +0.0]); " in sentence
    shown = re.search(r'<p class="verdict" style="([^"]*)">(.*?)</p>', report.read_text())
    assert shown[1] == f"border-color:light-dark({LIGHT.accent},{DARK.accent})"
    assert unescape(re.sub("</?b>", "", shown[2])) == sentence and shown[2].startswith(f"<b>{begins}")
    assert shown.start() < report.read_text().index("Mean ± standard deviation")


def test_the_charts_hold_the_stored_figures(store):
    found = load_comparison(store, "c")
    empty = {"run": np.array([], object), "name": np.array([], object), "step": np.zeros(0), "value": np.zeros(0)}
    text = page(found, empty, {})
    charts = json.loads(re.search(r"const charts = (.*);\n", text)[1])
    kept = next(row for row in found["rows"] if row["figure"] == "entropy_kept" and row["arm"] != "uniform")
    # exp(-.015 * 20) - exp(-.03 * 20) = 0.741 - 0.549
    assert kept["difference"] == pytest.approx(0.192, abs=5e-4)
    drawn = [chart["data"][0]["x"] for chart in charts["light"]]
    assert [kept["difference"]] in drawn and len(charts["light"]) == len(charts["dark"]) == 5


def test_an_interval_reaches_from_low_to_high():
    row = {"arm": "ict", "difference": 0.2, "low": 0.1, "high": 0.5, "p": 0.25, "pairs": 3}
    fig = difference_intervals(LIGHT, "entropy", [row, row | {"arm": "b", "low": None, "high": None}],
                               {"ict": "#000000", "b": "#111111"})  # fmt: skip
    bar = fig.data[0].error_x
    assert (fig.data[0].x[0], bar.array[0], bar.arrayminus[0]) == pytest.approx((0.2, 0.3, 0.1))
    assert fig.data[1].error_x.array[0] == 0 and "p 0.25, of 3 pairs" in fig.data[0].hovertemplate


def test_an_unknown_comparison_is_told_by_the_command_line(store, capsys):
    from monitor.cli import main as rlvr

    assert rlvr(["report", "cc", str(store)]) == 2
    assert "No comparison 'cc'" in capsys.readouterr().err and rlvr(["report", "c", str(store / "no")]) == 2
