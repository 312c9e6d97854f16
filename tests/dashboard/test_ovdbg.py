"""The rows of the Overview: their values, that they are made of new steps alone, and what goes to the browser."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import simulated
from test_browser import PATIENCE_S, opened, until
from test_pages import open_page, table_rows, told

from dashboard import overview_rows
from dashboard.launch import start, stop
from dashboard.overview_rows import (
    BINS,
    Course,
    OverviewRows,
    Sender,
    compare_sides,
    flat,
    group_keys,
    shortened,
)
from monitor.alerts.marks import acknowledge
from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord
from monitor.store.tail import RunEntry, Tail


def course(values: np.ndarray, *parts: int, warmup: int = 0) -> Course:
    """A course that takes `values` at steps 1, 2, ... in pieces that end at `parts`."""
    made, steps = Course(warmup), np.arange(1, len(values) + 1)
    for piece in np.split(np.arange(len(values)), parts):
        made.add(steps[piece], values[piece])
    return made


def test_a_course_knows_baseline_level_and_floor() -> None:
    # constant 1 for 30 steps, then exp(-0.1 k): the median of the last 5 of k = 1..15 is that of k = 13
    values = np.r_[np.ones(30), np.exp(-0.1 * np.arange(1, 16))]
    made = course(values)
    assert made.baseline == 1.0 and made.level == pytest.approx(math.exp(-1.3))
    # the last 20 rows are 5 ones and the 15 that fall: the floor of 0.1 is ln(10) = 2.303 below, 1.003 below the level
    slope = np.polyfit(np.arange(20), np.log(values[-20:]), 1)[0]
    assert made.steps_to_floor() == pytest.approx((math.log(0.1) + 1.3) / slope)
    assert course(np.r_[np.ones(30), np.full(5, 0.09)]).steps_to_floor() == 0.0
    assert math.isnan(course(np.ones(40)).steps_to_floor())


def test_a_baseline_begins_after_warm_up_and_waits_until_it_is_complete() -> None:
    values = np.r_[np.full(5, 9.0), np.full(20, 2.0)]
    assert math.isnan(course(values[:24], warmup=5).baseline)
    assert course(values, warmup=5).baseline == 2.0
    assert course(np.r_[np.nan, np.inf, np.full(20, 3.0)]).baseline == 3.0
    assert math.isnan(Course().level) and not len(Course().means())


@pytest.mark.parametrize("n", [1, 2 * BINS, 2 * BINS + 1, 1000, 5000])
def test_a_course_is_the_same_in_one_piece_and_step_by_step(n: int) -> None:
    values = np.random.default_rng(n).exponential(1.0, n)
    whole, single = course(values), course(values, *range(1, n))
    assert np.array_equal(whole.first, single.first) and np.array_equal(whole.values, single.values)
    np.testing.assert_allclose(whole.means(), single.means(), rtol=1e-12)
    width = whole.width
    expected = [values[at : at + width].mean() for at in range(0, n, width)]  # means over stretches of equal length
    np.testing.assert_allclose(whole.means(), expected, rtol=1e-12)
    assert len(expected) <= 2 * BINS and (n <= 2 * BINS or len(expected) >= BINS)


def record(store: Path, name: str, steps: range, *, resume: bool = False, **info) -> None:
    with Recorder(store, RunInfo(name=name, **info), resume=resume, flush_s=0.0) as recorder:
        for step in steps:
            recorder.record(StepRecord(step, {"entropy": 0.8, "reward": 0.25, "eval/heldout/pass@1": step / 100,
                                              "eval/heldout/pass@8": 0.5, "eval/heldout/pass@4": 0.4}))  # fmt: skip


def test_rows_hold_what_was_recorded(tmp_path: Path) -> None:
    record(tmp_path, "a", range(1, 31), weighting="ict", seed=3, comparison="c", config={"steps": 40})
    tail = Tail(tmp_path, 0.0)
    tail.poll()
    row = OverviewRows(tail).read()["a"]
    assert row["about"] == "ict · seed 3" and row["status"] == "finished" and row["rank"] == 13
    assert (row["entropy"], row["share"], row["reward"]) == (0.8, 1.0, 0.25)
    assert (row["pass1"], row["passk"], row["k"]) == (0.3, 0.5, 8)  # newest, and of the largest k
    assert (row["step"], row["planned"]) == (30, 40)
    assert row["spark"] == [100] * 30 and row["floor"] is None
    assert json.loads(json.dumps(row)) == row
    tail.close()


def test_only_new_steps_of_changed_runs_are_read(tmp_path: Path, monkeypatch) -> None:
    record(tmp_path, "old", range(1, 31))
    with Recorder(tmp_path, RunInfo(name="live"), flush_s=0.0) as recorder:
        for step in range(1, 26):
            recorder.record(StepRecord(step, {"entropy": 0.8, "reward": 0.5}))
        recorder.flush()
        tail = Tail(tmp_path, 0.0)
        tail.poll()
        rows = OverviewRows(tail)
        first = rows.read()
        asked = []
        monkeypatch.setattr(
            overview_rows,
            "new_scalars",
            lambda con, after, *rest: asked.append(dict(after)) or new_scalars(con, after, *rest),
        )
        assert rows.read() == first and not asked
        recorder.record(StepRecord(26, {"entropy": 0.4, "reward": 0.5}))
        recorder.flush()
        tail.poll()
        second = rows.read()
        assert asked == [{"live": 25}]
        assert second["old"] is first["old"] and second["live"]["step"] == 26
        assert second["live"]["spark"] == [*first["live"]["spark"], 50]
    tail.close()


new_scalars = overview_rows.new_scalars


def test_a_resumed_run_is_read_anew(tmp_path: Path) -> None:
    record(tmp_path, "a", range(1, 31))
    tail = Tail(tmp_path, 0.0)
    tail.poll()
    rows = OverviewRows(tail)
    assert rows.read()["a"]["step"] == 30
    time.sleep(0.15)  # beyond the grain of an mtime
    record(tmp_path, "a", range(11, 13), resume=True)
    tail.poll()
    row = rows.read()["a"]
    assert row["step"] == 12 and len(row["spark"]) == 0  # 12 rows are left: no baseline yet
    tail.close()


def test_an_alert_that_was_seen_does_not_ask_for_attention(store: Path, tmp_path: Path) -> None:
    simulated.record_run(tmp_path, "u", "uniform", steps=40, fire=25)
    tail = Tail(tmp_path, 0.0)
    tail.poll()
    rows = OverviewRows(tail)
    before = rows.read()["u"]
    assert before["firing"] == [1, 0, 0] and before["rank"] == 10
    acknowledge(tmp_path, "u", "entropy_collapse", 25)
    after = rows.read()["u"]
    assert after["firing"] == [0, 0, 0] and after["seen"] == 1 and after["rank"] == 13
    tail.close()


def test_runs_that_train_come_first_and_the_worst_of_them() -> None:
    ranks = [
        overview_rows._rank(live, status, health, firing, any(firing))
        for live, status, health, firing in [
            (True, "running", "critical", [1, 0, 0]),
            (True, "running", "warning", [0, 2, 0]),
            (True, "stalled", "", [0, 0, 0]),
            (True, "running", "healthy", [0, 0, 0]),
            (False, "finished", "critical", [1, 0, 0]),
            (False, "crashed", "", [0, 0, 0]),
            (False, "finished", "", [0, 0, 1]),
            (False, "finished", "healthy", [0, 0, 0]),
        ]
    ]
    assert ranks == [0, 1, 1, 3, 10, 11, 12, 13]


def test_a_sentence_is_shortened_to_what_happens() -> None:
    assert shortened(
        "Entropy is collapsing since step 42 (0.599 to 0.138), about 21 steps (95 % interval 21 to 22, 10 min) to its "
        "floor of 0.0599: go back before the fall and lower the learning rate."
    ) == "Entropy is collapsing since step 42, about 21 steps to its floor of 0.0599"  # fmt: skip
    assert shortened("Nothing is wrong at step 9: reward 1 (50 % of its start).") == "Nothing is wrong at step 9"
    assert shortened("An open (bracket") == "An open (bracket" and shortened("") == ""


def test_options_that_differ_can_group() -> None:
    configs = {"a": flat({"optim": {"lr": 1e-3}, "seed": 0, "task": "chain"}), "b": flat({"seed": 1, "task": "chain"})}
    assert configs["a"] == {"optim.lr": "0.001", "seed": "0", "task": "chain"}
    assert group_keys(configs) == ["optim.lr", "seed"]


def test_a_step_sends_one_row() -> None:
    rows = {f"r{i}": {"run": f"r{i}", "step": 1} for i in range(100)}
    sender = Sender()
    first = sender.send(rows, "", str)
    assert json.loads(first.base) == rows and first.patch == {}
    rows = rows | {"r7": {"run": "r7", "step": 2}}
    second = sender.send(rows, "", str)
    assert (second.base_id, second.patch) == (first.base_id, {"r7": {"run": "r7", "step": 2}})
    grouped = sender.send(rows, "optim.lr", lambda run: f"lr of {run}")
    assert json.loads(grouped.base)["r7"] == {"run": "r7", "step": 2, "value": "lr of r7"}
    assert sender.send(rows, "", str).base_id == first.base_id  # other readers keep theirs
    many = {name: dict(row) for name, row in rows.items()}
    third = sender.send(many, "", str)
    assert third.base_id != first.base_id and third.patch == {}
    assert sender.send(dict(list(many.items())[:50]), "", str).base_id != third.base_id  # a run was deleted


def test_ticked_runs_become_two_sides() -> None:
    def run(name: str, weighting: str) -> RunEntry:
        return RunEntry(name, {"weighting": weighting})

    runs = [run("i0", "ict"), run("u0", "uniform"), run("r0", "random"), run("i1", "ict"), run("u1", "uniform")]
    assert compare_sides(runs) == (["u0", "u1"], ["i0", "i1"], ["r0"])
    assert compare_sides([runs[0], runs[3]]) == (["i0"], ["i1"], [])


def test_the_url_names_the_option_to_group_by(monkeypatch, store: Path) -> None:
    assert "value" not in table_rows(open_page(monkeypatch, store, "overview"))["ict-s0"]
    rows = table_rows(open_page(monkeypatch, store, "overview", group="weighting.kind"))
    assert {name: row["value"] for name, row in rows.items()} == {"uniform-s0": "uniform", "ict-s0": "ict"}
    app = open_page(monkeypatch, store, "overview", group="no such option")
    assert told(app.markdown[0]) == "### 2 runs" and "value" not in table_rows(app)["ict-s0"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Six runs: two comparisons of two weightings, one with two seeds; and 60 others without a comparison."""
    path = tmp_path_factory.mktemp("sweep")
    for comparison, kind, seed in [("c", "uniform", 0), ("c", "uniform", 1), ("c", "ict", 0), ("d", "uniform", 0)]:
        info = {
            "weighting": kind,
            "seed": seed,
            "comparison": comparison,
            "config": {"optim": {"lr": 0.1 * (seed + 1)}},
        }
        record(path, f"{comparison}-{kind}-s{seed}", range(1, 31), **info)
    for number in range(60):
        record(path, f"other-{number:02d}", range(1, 3))
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark-phone"])
def test_the_table_in_a_browser(browser, sweep: Path, dark: bool) -> None:
    process, url = start(sweep)
    try:
        with opened(browser, url, dark=dark) as page:
            rows = page.locator(".rlvr-runs tbody tr:not(.rlvr-space)")
            page.locator(".rlvr-name").first.wait_for(timeout=PATIENCE_S * 1000)
            assert page.locator(".rlvr-count").inner_text() == "64 runs"
            assert page.evaluate("document.querySelectorAll('*').length") < 3000 and rows.count() < 40
            wide = page.evaluate(
                "[...document.querySelectorAll('.stMain, .rlvr-runs')].filter(n => n.scrollWidth > innerWidth).length"
            )
            assert not wide, "something is wider than the screen"
            page.get_by_label("Filter runs").fill("ict")  # at once, and in the URL
            until(page, lambda: page.locator(".rlvr-count").inner_text() == "1 of 64 runs")
            assert "filter=ict" in page.url
            page.get_by_label("Filter runs").fill("no such run")
            until(page, lambda: rows.count() == 0)
            assert "No run matches" in page.locator(".rlvr-none").inner_text()
            page.get_by_label("Filter runs").fill("uniform")
            fold = page.get_by_role("button", name="c · uniform")
            assert fold.get_attribute("aria-expanded") == "false"
            fold.press("Enter")
            page.get_by_role("link", name="c-uniform-s1").wait_for(timeout=PATIENCE_S * 1000)
            fold.press("ArrowDown")
            assert page.evaluate("document.activeElement.textContent") == "c-uniform-s0"
            page.get_by_label("Group by").select_option("optim.lr")
            page.get_by_role("button", name=re.compile(r"optim.lr = 0\.2")).wait_for(timeout=PATIENCE_S * 1000)
            assert "group=optim.lr" in page.url
            page.get_by_label("Tick optim.lr = 0.1").check()
            until(page, lambda: page.url.count("tick=") == 2)
            kept = page.url
        with opened(browser, kept, dark=dark) as page:  # elsewhere the address shows the same
            until(page, lambda: page.locator(".rlvr-picked span").count())
            assert page.locator(".rlvr-picked span").inner_text() == "2 runs ticked"
            assert page.get_by_label("Filter runs").input_value() == "uniform"
            page.get_by_label("Tick optim.lr = 0.2").check()
            page.get_by_role("button", name="Compare", exact=True).click()
            page.wait_for_url("**/compare?*", timeout=PATIENCE_S * 1000)
            page.go_back()
            try:
                page.locator(".rlvr-name").first.wait_for(timeout=15000)
            except Exception:
                print("AFTER", page.url, page.evaluate("history.length"), page.inner_text("body")[:400])
                page.screenshot(path="/tmp/back.png", full_page=True)
                raise
            assert page.get_by_label("Filter runs").input_value() == "uniform"
            page.get_by_role("button", name=re.compile(r"optim.lr = 0\.2")).press("Enter")
            page.get_by_role("link", name="c-uniform-s1").click()
            page.wait_for_url("**/run?run=c-uniform-s1*", timeout=PATIENCE_S * 1000)
    finally:
        stop(process)
