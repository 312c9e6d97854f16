"""Replay: the Run page as it stood after a step, with nothing later, standing still and playing."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest
from test_browser import PATIENCE_S, opened, plot, until
from test_pages import open_page, told
from test_pages import words as words_of

from dashboard.launch import start, stop
from dashboard.views import glance, replay
from monitor.alerts import AlertEngine
from monitor.alerts.outlook import outlook, window_of
from monitor.alerts.replay import evaluate_alerts, verdict
from monitor.queries.followed import Followed, Past
from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord
from monitor.store.tail import Tail

STEPS, FALL = 80, 40  # of the run, and the step from which its entropy falls


def series() -> dict[str, list[Any]]:
    """Entropy that stands at .6 and is lost from FALL on, by 6 % a step; reward that does not move."""
    rng = np.random.default_rng(0)
    steps = np.arange(1, STEPS + 1)
    entropy = 0.6 * np.exp(0.02 * rng.standard_normal(STEPS) - 0.06 * np.maximum(0, steps - FALL))
    return {"step": steps.tolist(), "entropy": entropy.tolist(), "reward": (0.4 + 0 * steps).tolist()}


def cut(step: int) -> dict[str, list[Any]]:
    return {name: values[:step] for name, values in series().items()}


@pytest.fixture(scope="module")
def lost(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("lost")
    made = series()
    with Recorder(store, RunInfo(name="lost", config={"steps": STEPS}), engine=AlertEngine()) as recorder:
        for i, step in enumerate(made["step"]):
            recorder.record(StepRecord(step, {key: made[key][i] for key in ("entropy", "reward")}))
            if step % 30 == 0:
                recorder.event("checkpoint", f"Saved as step-{step}.", step)
            recorder.flush()
    return store


def words(app: AppTest) -> str:
    return "\n".join([words_of(app), *map(told, app.success)])


def numbers(sent: Any) -> np.ndarray:
    if isinstance(sent, dict):
        return np.frombuffer(base64.b64decode(sent["bdata"]), sent["dtype"]).astype(float)
    return np.asarray(sent, float)


def ends(app: AppTest) -> list[float]:
    """The last x of every curve, mark and shape that the page sent, but for what is projected ahead."""
    found = list[float]()
    for one in app.get("bidi_component"):
        sent = json.loads(one.proto.json) if one.proto.json else {}
        if one.proto.component_name == "rlvr_chart":
            figure = json.loads(sent["figure"])
            found += [
                numbers(trace["x"]).max() for trace in figure["data"] if len(numbers(trace.get("x", [])))
                and not (trace.get("hoverinfo") == "skip" and "meta" not in trace)
            ]  # fmt: skip
            found += [shape["x1"] for shape in figure["layout"].get("shapes", ()) if shape.get("xref") != "paper"]
        elif one.proto.component_name == "rlvr_old_points":
            found += [
                numbers(trace["x"]).max() for chart in sent.values() for trace in json.loads(chart["traces"]) if trace
            ]
    return found


@pytest.mark.parametrize("step", [10, FALL, 58, 70, STEPS])
def test_at_a_step_the_page_says_what_was_to_be_said_of_the_run_so_far(monkeypatch, lost: Path, step: int) -> None:
    app = open_page(monkeypatch, lost, "run", run="lost", replay=str(step))
    health = verdict(cut(step)).health
    assert health == {10: "too early", FALL: "healthy", 58: "info"}.get(step, "critical")
    said = "Too early" if health == "too early" else f"**{health.capitalize()}:**"
    assert said in words(app), words(app)
    window = window_of({key: (np.array(cut(step)["step"]), np.array(cut(step)[key])) for key in ("entropy", "reward")})
    # how old a word was, and where the run is now, nobody knew then
    spoken = re.search(r":small\[As of step (\d+)(.*?)\]", words(app))
    assert (spoken is None) == (health == "too early")
    if spoken is not None:
        older = int(spoken.group(1)) < step
        assert spoken.group(2) == f" · the newest word when the run was at step {step}" * older
    ahead = outlook(window)
    assert (ahead is None) == (step == 10)
    if ahead is not None:
        status = "finished" if step == STEPS else "running"
        assert f"**Entropy** {glance._entropy(ahead, window, status)}" in words(app)
    fired = evaluate_alerts(cut(step))
    assert [box.label for box in app.expander] == ([f"Alerts: {len(fired)} firing"] if fired else [])
    # the newest point is that of the step itself, and none is later
    assert max(ends(app)) == step
    assert all(int(n) <= step for n in re.findall(r"[Aa]s of step (\d+)", words(app)))
    marks = app.dataframe[0].value["step"].dropna() if app.dataframe else np.zeros(0)
    assert (marks <= step).all()


def test_the_last_alert_of_the_whole_run_is_not_there_before_it_fires(monkeypatch, lost: Path) -> None:
    first = min(alert["step"] for alert in evaluate_alerts(series()))
    app = open_page(monkeypatch, lost, "run", run="lost", replay=str(first - 1))
    assert not app.expander and "Healthy" in words(app)
    app = open_page(monkeypatch, lost, "run", run="lost", replay=str(first))
    assert len(app.expander) == 1


def test_a_step_outside_of_the_run_is_its_first_or_last(monkeypatch, lost: Path) -> None:
    for wanted, step in (("0", 1), ("x", 1), ("9999", STEPS)):
        app = open_page(monkeypatch, lost, "run", run="lost", replay=wanted)
        assert app.slider[0].value == step and max(ends(app)) == step


def test_the_control_is_in_the_address_and_leaving_shows_the_whole_run(monkeypatch, lost: Path) -> None:
    def press(app: AppTest, label: str) -> AppTest:
        return next(button for button in app.button if button.label == label).click().run()

    def shown(name: str) -> str:
        value = app.query_params.get(name, "")
        return value[-1] if isinstance(value, list) else value

    app = open_page(monkeypatch, lost, "run", run="lost")
    assert not app.slider and max(ends(app)) == STEPS
    app = press(app, "Replay")
    assert shown("play") == "on" and shown("speed") == "5"  # 79 steps in 30 s or less
    app = press(app, "Pause")
    assert not shown("play") and 1 <= int(shown("replay")) <= 60
    app = app.slider[0].set_value(33).run()
    assert shown("replay") == "33" and max(ends(app)) == 33
    app = press(app, "Leave the replay")
    assert not any(map(shown, replay.PARAMETERS)) and max(ends(app)) == STEPS


def test_a_tape_plays_by_the_clock(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(replay.time, "monotonic", lambda: now[0])
    tape = replay.Tape("run", 10, 40, 5, 0, 100.0)
    assert tape.now == 10
    now[0] = 101.5
    assert tape.now == 17  # 1.5 s at 5 steps a second are 7 whole steps
    now[0] = 200.0
    assert tape.now == 40
    assert replay.Tape("run", 10, 40, 5, 0).now == 10


def test_a_run_as_it_stood_has_nothing_later(lost: Path) -> None:
    tail = Tail(lost)
    tail.poll()
    run = Followed("lost")
    run.look(tail.cursor(), 0)
    past = Past(run, 33)
    assert past.newest_step == 33 and past.series("entropy")[0].tolist() == list(range(1, 34))
    np.testing.assert_allclose(past.series("entropy")[1], series()["entropy"][:33])
    assert Past(run, 0).keys == [] and Past(run, 0).newest_step == -1
    assert Past(run, 10**6).keys == run.keys


def test_a_replay_plays_in_the_browser_and_goes_back(browser, lost: Path) -> None:
    newest = "Math.max(...p._fullData.filter(t => t.name === 'Entropy').flatMap(t => Array.from(t.x)))"
    process, url = start(lost)
    try:
        with opened(browser, f"{url}/run?run=lost&replay=25&speed=2&play=on") as page:
            until(page, lambda: plot(page, "Mean entropy", "p._fullData.length"))
            plot(page, "Mean entropy", "p.rlvrMarked = true")
            entries = page.evaluate("history.length")
            seen = set[int]()

            def has_ended() -> bool:
                shown = plot(page, "Mean entropy", newest)
                seen.update([] if shown is None else [shown])
                return STEPS in seen

            until(page, has_ended)
            assert len(seen) > 4 and min(seen) >= 25, "it grew by and by"
            assert plot(page, "Mean entropy", "p.rlvrMarked"), "on the same chart"
            until(page, lambda: page.get_by_role("button", name=re.compile(r"\bPlay$")).count())
            until(page, lambda: "&play=" not in page.url and f"replay={STEPS}" in page.url)
            assert page.evaluate("history.length") <= entries, "a playing replay fills the history"
            slider = page.get_by_role("slider")
            slider.focus()
            page.keyboard.press("Home")
            until(page, lambda: "replay=1&" in page.url + "&")
            until(page, lambda: plot(page, "Mean entropy", newest) == 1)
            for _ in range(12):  # a chart may be made anew meanwhile, as others leave the page at this step
                page.wait_for_timeout(100)
                assert plot(page, "Mean entropy", newest) in (1, None), "points of the former replay came back"
            until(page, lambda: plot(page, "Mean entropy", newest) == 1)
            page.get_by_role("button", name=re.compile(r"\bPlay$")).click()
            until(page, lambda: plot(page, "Mean entropy", newest) > 3)
            page.get_by_role("button", name="Pause").click(timeout=PATIENCE_S * 1000)
            until(page, lambda: page.get_by_role("button", name=re.compile(r"\bPlay$")).count())
            page.wait_for_timeout(1500)
            stands = plot(page, "Mean entropy", newest)
            assert f"replay={stands}&" in page.url + "&"
            page.wait_for_timeout(1500)
            assert plot(page, "Mean entropy", newest) == stands < STEPS
    finally:
        stop(process)
