"""The Compare page: any number of arms, what makes a comparison doubtful, and files to save."""

from __future__ import annotations

import csv
import io
import json
import re
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import simulated
from test_browser import PATIENCE_S, opened, plot, until
from test_pages import open_page, told, words
from test_replay import numbers

from dashboard import data
from dashboard.launch import start, stop
from monitor.store.reader import open_store

ARMS = {"uniform": (0, 1), "ict": (0, 1), "random": (1,)}


@pytest.fixture(scope="module")
def arms_store(tmp_path_factory) -> Path:
    """Three arms of one comparison; the control has one seed."""
    path = tmp_path_factory.mktemp("arms")
    for weighting, seeds in ARMS.items():
        for seed in seeds:
            simulated.record_run(path, f"{weighting}-s{seed}", weighting, steps=20, fire=15, seed=seed)
    return path


def test_all_arms_of_a_comparison_are_shown_and_stand_in_the_address(monkeypatch, arms_store: Path) -> None:
    app = open_page(monkeypatch, arms_store, "compare")
    assert [box.value for box in app.multiselect] == [["uniform-s0", "uniform-s1"], ["ict-s0", "ict-s1"], ["random-s1"]]
    sentences = "".join(map(told, app.info)).replace("\u2060", "")
    assert "ict against uniform, 2 pairs" in sentences and "random against uniform, 1 pair" in sentences
    assert list(app.dataframe[0].value.columns) == [
        "figure", "uniform", "ict", "random", "ict minus uniform", "random minus uniform"
    ]  # fmt: skip
    assert "Seeds that only random or uniform has are in no pair: 0." in words(app).replace("\u2060", "")
    assert app.query_params["c"] in ("random-s1", ["random-s1"])
    app.multiselect[2].set_value([]).run()
    assert len(app.multiselect) == 2 and "c" not in app.query_params


def test_an_arm_can_be_added(monkeypatch, arms_store: Path) -> None:
    app = open_page(monkeypatch, arms_store, "compare", a="uniform-s0", b="ict-s0")
    assert [box.value for box in app.multiselect] == [["uniform-s0"], ["ict-s0"]]
    next(button for button in app.button if button.label == "Add an arm").click().run()
    assert len(app.multiselect) == 3
    app.multiselect[2].set_value(["random-s1"]).run()
    assert [box.value for box in app.multiselect] == [["uniform-s0"], ["ict-s0"], ["random-s1"]]
    assert "random" in list(app.dataframe[0].value.columns)


def test_it_says_where_two_runs_part(monkeypatch, arms_store: Path, tmp_path: Path) -> None:
    app = open_page(monkeypatch, arms_store, "compare", a="uniform-s0", b="ict-s0")
    assert "ict and uniform differ in entropy, reward or loss: seed 0: 1." in words(app).replace("\u2060", "")
    for name in ("one", "two"):
        simulated.record_run(tmp_path, name, "uniform", steps=5, fire=4, seed=0)
    app = open_page(monkeypatch, tmp_path, "compare", a="one", b="two")
    assert "seed 0: nowhere" in words(app)


def test_an_arms_line_is_smoothed_before_it_is_thinned(monkeypatch, arms_store: Path) -> None:
    two = ["uniform-s0", "uniform-s1"]
    app = open_page(monkeypatch, arms_store, "compare", a=",".join(two), b="ict-s0", smooth="5 steps")
    sent = [json.loads(one.proto.json) for one in app.get("bidi_component") if one.proto.component_name == "rlvr_chart"]
    traces = json.loads(next(chart["figure"] for chart in sent if chart["title"] == "Entropy"))["data"]
    drawn = {trace["name"]: numbers(trace["y"]) for trace in traces if trace.get("name")}
    # the mean m + (y - m) / 3 of the arm's values: of one run its own, of two their mean
    for name, runs in (("ict", ["ict-s0"]), ("uniform, mean of 2", two)):
        values = np.mean([data.followed(run).series("entropy")[1] for run in runs], 0)
        expected = list(accumulate(values, lambda mean, value: mean + (value - mean) / 3))
        np.testing.assert_allclose(drawn[name], values, rtol=1e-6)
        np.testing.assert_allclose(drawn[f"{name}, mean of 5 steps"], expected, rtol=1e-6)
    assert {*two} <= drawn.keys() and f"{two[0]}, mean of 5 steps" not in drawn


def test_a_saved_series_has_every_value_of_the_store(monkeypatch, arms_store: Path) -> None:
    app = open_page(monkeypatch, arms_store, "run", run="ict-s0")
    next(button for button in app.button if button.label == "Prepare all series as CSV").click().run()
    saved = app.get("download_button")
    assert len(saved) == 1 and saved[0].label.startswith("Save ict")
    made = app.session_state["made_all series as CSV"][1].decode()
    rows = list(csv.DictReader(io.StringIO(made)))
    with open_store(arms_store) as store:
        sql = "SELECT step, name, value FROM steps WHERE run = 'ict-s0' ORDER BY step, name"
        stored = {(int(step), name): value for step, name, value in store.sql(sql).rows}
    found = {(int(row["step"]), key): float(row[key]) for row in rows for key in row if key != "step" and row[key]}
    assert found == stored and len(rows) == 20
    assert rows[0]["eval/heldout/pass@1"] == "" and rows[9]["eval/heldout/pass@1"] != ""  # at every tenth step


def test_a_comparison_is_saved_as_curves_and_as_a_report(monkeypatch, arms_store: Path) -> None:
    app = open_page(monkeypatch, arms_store, "compare")
    next(button for button in app.button if button.label == "Prepare curves as CSV").click().run()
    rows = list(csv.reader(io.StringIO(app.session_state["made_curves as CSV"][1].decode())))
    assert rows[0] == ["arm", "run", "step", "name", "value"]
    entropy = [float(value) for arm, run, _, name, value in rows[1:] if (run, name) == ("random-s1", "entropy")]
    np.testing.assert_array_equal(entropy, data.followed("random-s1").series("entropy")[1])
    assert {arm for arm, *_ in rows[1:]} == set(ARMS)
    next(button for button in app.button if button.label == "Prepare report as HTML").click().run()
    page = app.session_state["made_report as HTML"][1].decode()
    assert page.startswith("<!") and "random against ict against uniform" in page and "Differences to uniform" in page


def test_a_chart_is_saved_as_picture_with_its_title(browser, arms_store: Path) -> None:
    process, address = start(arms_store)
    try:
        with opened(browser, f"{address}/compare") as page:
            until(page, lambda: plot(page, "Entropy", "p.data.length"))
            chart = page.locator(".rlvr-plot[aria-label='Entropy']")
            chart.scroll_into_view_if_needed()
            chart.hover()
            with page.expect_download(timeout=PATIENCE_S * 1000) as download:
                chart.locator("[data-title='Save as SVG']").click()
            assert download.value.suggested_filename == "entropy.svg"
            svg = Path(download.value.path()).read_text()
            assert "Entropy, nats" in svg and svg.startswith("<svg")
            with page.expect_download(timeout=PATIENCE_S * 1000) as download:
                chart.locator("[data-title='Save as PNG']").click()
            png = Path(download.value.path()).read_bytes()
            assert png[:8] == b"\x89PNG\r\n\x1a\n"
            width = int.from_bytes(png[16:20], "big")
            assert width == 2 * chart.evaluate("node => node.offsetWidth")
            assert re.fullmatch(r"entropy\.png", download.value.suggested_filename)
    finally:
        stop(process)


def test_curves_stand_over_steps_tokens_or_hours(browser, arms_store: Path) -> None:
    process, address = start(arms_store)
    try:
        with opened(browser, f"{address}/compare?a=uniform-s0,uniform-s1&b=ict-s0&over=hours") as page:
            until(page, lambda: plot(page, "Entropy", "p.data.length"))
            # a step takes .4 s; 20 steps
            ends = plot(page, "Entropy", "p._fullData.map(t => t.x[t.x.length - 1])")
            assert ends == pytest.approx([20 * 0.4 / 3600] * len(ends))
            assert plot(page, "Entropy", "p._fullLayout.xaxis.title.text") == "hours of training"
            page.get_by_role("radio", name="step", exact=True).click()
            until(page, lambda: (plot(page, "Entropy", "p._fullData.map(t => t.x[t.x.length - 1])") or [0])[0] == 20)
    finally:
        stop(process)
