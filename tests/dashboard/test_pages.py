"""Every page, run by Streamlit's own AppTest: stores that are whole, empty, missing, damaged or unknown in the URL."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from dataclasses import replace
from functools import partialmethod
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated
from streamlit.testing.v1 import AppTest

from dashboard import data
from dashboard.figures.spent import SPENT
from dashboard.shown_arms import Arm, default_arms, doubts, figures_table
from dashboard.views import glance, shared
from dashboard.views import run as run_view
from monitor.alerts import AlertEngine
from monitor.alerts.marks import acknowledge, mute
from monitor.integrations.files.importing import Importer
from monitor.queries.alerts import alert_log
from monitor.queries.frames import n_rows
from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord
from monitor.store.tail import RunEntry, Tail

PAGES = ("overview", "run", "compare", "tokens")
OTHERS = ("method", "alerts", "sql")
SCRIPT = "from dashboard.app import main\nmain()\n"
pytestmark = pytest.mark.filterwarnings(
    "ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning"  # AppTest leaves its script folder to the end
)


def open_page(monkeypatch, store: Path, page: str, **parameters: str) -> AppTest:
    """The page as a server that has just started shows it: an older one may be a fifth of a second behind the store."""
    data._tail.clear()
    monkeypatch.setenv(data.STORE_VARIABLE, str(store))
    app = AppTest.from_string(SCRIPT, default_timeout=60)
    app.run()
    app._page_hash = shared.PAGES[page]._script_hash  # AppTest.switch_page knows only pages that are files
    for name, value in parameters.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception, app.exception
    return app


def words(app: AppTest) -> str:
    elements = (*app.markdown, *app.caption, *app.error, *app.info, *app.warning)
    return "\n".join([*(told(element) for element in elements), *map(str, table_rows(app).values())])


def table_rows(app: AppTest) -> dict[str, dict[str, Any]]:
    """The rows that the Overview's table was handed; none on other pages."""
    sent = [element.proto for element in app.get("bidi_component")]
    base = next((json.loads(one.json) for one in sent if one.component_name == "rlvr_runs_base"), {"rows": "{}"})
    patch = next((json.loads(one.json)["patch"] for one in sent if one.component_name == "rlvr_runs"), {})
    return json.loads(base["rows"]) | patch


def told(element) -> str:
    """What a reader sees of an element with Markdown."""
    return unescape(str(element.value))


@pytest.mark.parametrize("page", PAGES)
def test_pages_of_a_recorded_store(monkeypatch, store: Path, page: str) -> None:
    app = open_page(monkeypatch, store, page)
    assert not app.error and not app.warning


@pytest.mark.parametrize("page", (*PAGES, *OTHERS))
def test_a_missing_store_says_what_to_do(monkeypatch, tmp_path: Path, page: str) -> None:
    app = open_page(monkeypatch, tmp_path / "nowhere", page)
    assert "No store at" in app.error[0].value and "rlvr train" in words(app)


@pytest.mark.parametrize("page", (*PAGES, *OTHERS))
def test_an_empty_store_says_what_to_do(monkeypatch, tmp_path: Path, page: str) -> None:
    app = open_page(monkeypatch, tmp_path, page)
    assert "No runs in" in app.info[0].value and "rlvr train" in words(app)


@pytest.mark.parametrize("page", PAGES)
def test_a_run_without_steps(monkeypatch, tmp_path: Path, page: str) -> None:
    expected = {"overview": "no steps yet", "run": "no steps yet", "compare": "needs two runs", "tokens": "no rollouts"}
    with Recorder(tmp_path, simulated.info("waiting", "ict", 0, 10)):
        assert expected[page] in words(open_page(monkeypatch, tmp_path, page))
    over = {"overview": "'no steps'", "run": "It ended before the first one was written"}
    assert over.get(page, expected[page]) in words(open_page(monkeypatch, tmp_path, page))


@pytest.mark.parametrize("page", ["overview", "run"])
def test_a_run_whose_steps_and_description_cannot_be_read(monkeypatch, store: Path, tmp_path: Path, page: str) -> None:
    shutil.copytree(store, tmp_path / "torn", symlinks=True)
    run = tmp_path / "torn/runs/ict-s0"
    for segment in (run / "data/steps/g0").glob("*.parquet"):
        segment.write_bytes(segment.read_bytes()[:100])
    (run / "run.json").write_text('{"name": "ic')
    shown = words(open_page(monkeypatch, tmp_path / "torn", page, run="ict-s0"))
    assert "no steps that can be read" in shown and "its run.json is missing or cannot be read" in shown
    assert "no steps yet" not in shown and ("seed 0" in shown) == (page == "overview")  # of the other run


@pytest.mark.parametrize("page", (*PAGES, *OTHERS))
def test_torn_segments_are_reported_and_the_rest_shown(monkeypatch, store: Path, tmp_path: Path, page: str) -> None:
    shutil.copytree(store, tmp_path / "torn", symlinks=True)
    segment = next((tmp_path / "torn/runs/ict-s0/data/alerts/g0").glob("*.parquet"))
    segment.write_bytes(segment.read_bytes()[:100])
    app = open_page(monkeypatch, tmp_path / "torn", page)
    assert "1 file could not be read" in told(app.warning[0]) and segment.name in told(app.warning[0])


def test_torn_histograms_are_reported_once_a_page_reads_them(monkeypatch, store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "torn", symlinks=True)
    segment = next((tmp_path / "torn/runs/ict-s0/data/histograms/g0").glob("*.parquet"))
    segment.write_bytes(segment.read_bytes()[:100])
    assert not open_page(monkeypatch, tmp_path / "torn", "overview").warning
    before = data.poll()
    app = open_page(monkeypatch, tmp_path / "torn", "run", run="ict-s0")
    assert data.poll() > before  # so the page draws itself again
    assert "1 file could not be read" in told(app.run().warning[0]) and segment.name in told(app.warning[0])


@pytest.mark.parametrize("page", (*PAGES, *OTHERS))
@pytest.mark.parametrize("config", [None, {"eval": True, "weighting": "mine", "steps": "many"}, {"eval": {"k": None}}])
def test_a_run_json_of_nulls_or_of_another_trainer_leaves_every_page_standing(
    monkeypatch, store: Path, tmp_path: Path, page: str, config: object
) -> None:
    shutil.copytree(store, tmp_path / "odd", symlinks=True)
    for run in ("uniform-s0", "ict-s0"):
        path = tmp_path / "odd/runs" / run / "run.json"
        info = json.loads(path.read_text())
        nulls = dict.fromkeys(info) if config is None else {}
        path.write_text(json.dumps(info | nulls | {"config": config, "seed": None}))
    open_page(monkeypatch, tmp_path / "odd", page)


def test_torn_tokens_leave_the_page_standing(monkeypatch, store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "torn", symlinks=True)
    for table in ("tokens", "samples"):
        for segment in (tmp_path / "torn/runs/ict-s0/data" / table / "g0").glob("*.parquet"):
            segment.write_bytes(b"")
    app = open_page(monkeypatch, tmp_path / "torn", "tokens", run="ict-s0")
    assert "no rollouts stored" in words(app)


def test_an_unknown_run_is_answered_with_the_nearest(monkeypatch, store: Path) -> None:
    for page in ("run", "tokens"):
        app = open_page(monkeypatch, store, page, run="ict-s1")
        assert told(app.error[0]) == "No run 'ict-s1' in this store. Did you mean 'ict-s0'?"
    app = open_page(monkeypatch, store, "compare", a="uniform-s0", b="itc-s0")
    assert "Did you mean 'ict-s0'" in told(app.error[0])


def test_the_url_holds_the_state(monkeypatch, store: Path) -> None:
    app = open_page(
        monkeypatch, store, "tokens", run="uniform-s0", step="7", colour="weight", show="correct", group="1"
    )
    pickers = {box.label: box.value for box in app.selectbox}
    assert pickers["Run"] == "uniform-s0" and pickers["Prompt"] == 1
    assert app.select_slider[0].value == 7
    app.select_slider[0].set_value(9).run()
    assert app.query_params["step"] == "9" and app.query_params["run"] == "uniform-s0"
    next(box for box in app.selectbox if box.label == "Run").set_value("ict-s0").run()
    assert app.query_params["run"] == "ict-s0" and app.query_params["step"] == "9"


def test_a_step_without_rollouts_falls_to_the_nearest(monkeypatch, store: Path) -> None:
    app = open_page(monkeypatch, store, "tokens", run="ict-s0", step="1000")
    assert "Step 1000 has no stored rollouts" in words(app) and app.select_slider[0].value == 40


def test_compare_picks_the_pair_by_itself(monkeypatch, store: Path) -> None:
    app = open_page(monkeypatch, store, "compare")
    assert [box.value for box in app.multiselect] == [["uniform-s0"], ["ict-s0"]]
    # the last evaluation of both: 3 - 1.5 answers, pass@1 near .25 + .4
    assert re.fullmatch(
        r"\*\*ict against uniform, 1 pair: too few to tell\*\*; 1\.5 distinct answers against 1\.5 \(\+0\.0\), "
        r"pass@1 \.6[5-7] against \.6[5-7] \([+-]\.0[0-2]\); at equal pass@1 \(\.6[5-7]\) .*",
        told(app.info[0]).replace("\u2060", ""),
    )
    assert "runs still train" not in words(app)
    figures = app.dataframe[0].value
    assert list(figures.columns) == ["figure", "uniform", "ict", "ict minus uniform"]
    assert "pass@1, heldout" in set(figures["figure"])
    differing = app.dataframe[2].value
    assert list(differing["option"]) == ["weighting.kind"] and list(differing["ict"]) == ["ict"]
    app.multiselect[1].set_value([]).run()
    assert "at least one run to compare" in app.info[0].value


def test_compare_says_that_runs_still_train_and_pairs_only_different_seeds(monkeypatch, tmp_path: Path) -> None:
    for name, kind in (("u", "uniform"), ("u-2", "uniform")):
        with Recorder(tmp_path, RunInfo(name=name, weighting=kind, seed=0)) as recorder:
            recorder.record(StepRecord(1, {"entropy": 0.5, "reward": 0.5}))
    with Recorder(tmp_path, RunInfo(name="i", weighting="ict", seed=0), flush_s=0.0) as recorder:
        recorder.record(StepRecord(1, {"entropy": 0.75, "reward": 0.25}))
        recorder.flush()
        app = open_page(monkeypatch, tmp_path, "compare", a="u", b="i")
        assert told(app.info[0]) == (  # .75 - .5 and .25 - .5
            "**ict against uniform, 1 pair: too few to tell**; an entropy of 0.75 nats against 0.50 (+0.25), "
            "reward 0.25 against 0.50 (-0.25)."
        )
        assert "1 of 2 runs still train." in words(app)
    app = open_page(monkeypatch, tmp_path, "compare", a="u,u-2", b="i")
    assert "too few to tell" not in words(app) and "One side has two runs of one seed" in words(app)


def test_alerts_stand_on_overview_and_run(monkeypatch, store: Path) -> None:
    rows = table_rows(open_page(monkeypatch, store, "overview"))
    assert rows["uniform-s0"]["firing"] == [1, 0, 0] and rows["uniform-s0"]["resolved"] == 0
    assert rows["ict-s0"]["firing"] == [0, 0, 0] and rows["ict-s0"]["resolved"] == 1
    assert "entropy_collapse since step 25" in listed(open_page(monkeypatch, store, "run", run="uniform-s0"))
    assert "entropy_collapse step 12 to 20, resolved" in listed(open_page(monkeypatch, store, "run", run="ict-s0"))


def listed(app: AppTest) -> str:
    """The list of a run's alerts as a reader sees it."""
    (box,) = app.expander
    return unescape(re.sub(r"<[^>]+>", "", " ".join(str(element.proto.body) for element in box.get("html"))))


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Path:
    """Three runs that our own engine judged: one collapses, one is sound, one is young."""
    path = tmp_path_factory.mktemp("judged")
    for name, steps, fall in (("collapses", 70, 0.06), ("sound", 30, 0.0), ("young", 5, 0.0)):
        with Recorder(path, RunInfo(name=name), engine=AlertEngine()) as recorder:
            for step in range(1, steps + 1):
                entropy = 0.8 * math.exp(-fall * max(0, step - 25))  # a baseline of 20 steps first
                recorder.record(StepRecord(step, {"entropy": entropy, "reward": 0.5}))
    return path


def test_a_run_begins_with_its_verdict(monkeypatch, judged: Path) -> None:
    app = open_page(monkeypatch, judged, "run", run="collapses")
    (banner,) = app.error
    # 0.8 falls by 6 % a step from step 25 on. The median of the last 5 rows is the value of step 68:
    # 0.8 exp(-0.06 * 43) = 0.0606. The floor is a tenth of 0.8.
    assert told(banner).startswith("**Critical:** Entropy is collapsing since step ")
    assert "(0.8 to 0.0606), it is at its floor of 0.08" in told(banner)
    assert ":small[As of step 70 · just now]" in told(banner)
    assert told(open_page(monkeypatch, judged, "run", run="sound").success[0]).startswith(
        "**Healthy:** Nothing is wrong"
    )
    assert told(open_page(monkeypatch, judged, "run", run="young").info[0]).startswith("Too early to judge: 5 rows")


def test_an_alert_lists_its_transitions_with_their_own_numbers(monkeypatch, judged: Path) -> None:
    app = open_page(monkeypatch, judged, "run", run="collapses")
    tail = Tail(judged)
    tail.poll()
    log = alert_log(tail.cursor(), ["collapses"])
    tail.close()
    fired = [i for i in range(n_rows(log)) if log["state"][i] == "firing"]
    assert [log["severity"][i] for i in fired] == ["info", "critical"]  # a steep fall first
    assert app.expander[0].label.endswith("1 firing")
    shown, places = listed(app), []
    for i, what in zip(fired, ("info", "turned critical"), strict=True):
        numbers = f"value {log['value'][i]:.4g}, baseline 0.8, threshold {log['threshold'][i]:.4g}"
        line = f"Step {log['step'][i]} · {what} · {numbers}{log['message'][i]}"
        assert line in shown
        places.append(shown.index(line))
    assert places == sorted(places)


def test_pages_say_which_alerts_were_seen_and_which_rules_are_muted(monkeypatch, judged: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(judged, tmp_path / "marked"))
    assert "seen" not in listed(open_page(monkeypatch, store, "run", run="collapses"))
    (first,) = map(int, re.findall(r"since step (\d+)", listed(open_page(monkeypatch, store, "run", run="collapses"))))
    acknowledge(store, "collapses", "entropy_collapse", first)
    mute(store, "collapses", "entropy_collapse", None)
    assert f"since step {first} · seen · muted" in listed(open_page(monkeypatch, store, "run", run="collapses"))
    row = table_rows(open_page(monkeypatch, store, "overview"))["collapses"]
    assert row["firing"] == [0, 0, 0] and row["seen"] == 1


def test_the_overview_says_which_runs_are_not_healthy(monkeypatch, judged: Path) -> None:
    app = open_page(monkeypatch, judged, "overview")
    assert "1 critical" in words(app) and "warning" not in [told(element) for element in app.markdown]
    rows = table_rows(app)
    assert rows["collapses"]["health"] == "critical"
    assert re.fullmatch(r"Entropy is collapsing since step \d+, it is at its floor of 0\.08", rows["collapses"]["said"])
    assert (rows["sound"]["health"], rows["sound"]["said"]) == ("healthy", "Nothing is wrong at step 30")
    assert (rows["young"]["health"], rows["young"]["said"]) == ("too early", "Too early to judge")


def test_a_run_of_which_nothing_was_said_says_so(monkeypatch, tmp_path: Path, store: Path) -> None:
    with Recorder(tmp_path, RunInfo(name="older")) as recorder:
        recorder.record(StepRecord(1, {"entropy": 0.5, "reward": 0.5}))
    app = open_page(monkeypatch, tmp_path, "run", run="older")
    assert not (app.error or app.warning or app.success or app.expander)
    assert told(app.info[0]) == "Nothing has judged this run: it was recorded without an alert engine."
    # an older run's newest open alert speaks for it
    app = open_page(monkeypatch, store, "run", run="uniform-s0")
    assert told(app.error[0]).startswith("**Critical:** Entropy fell to 23 % of its baseline while the reward")
    said = told(app.error[0])
    assert "As of step 25 · " in said and said.endswith(" · the run is at step 40 now]")
    assert not open_page(monkeypatch, store, "run", run="ict-s0").error  # its alert resolved


def test_a_verdict_is_text(monkeypatch, tmp_path: Path) -> None:
    evil = "<b>fat</b> [a](javascript:x) :red[r] **bold** `code`"
    with Recorder(tmp_path, RunInfo(name="evil")) as recorder:
        recorder.record(StepRecord(1, {"entropy": 0.5, "reward": 0.5}))
        recorder.event("verdict", f"warning: {evil}", 1)
    banner = open_page(monkeypatch, tmp_path, "run", run="evil").warning[0]
    assert evil in told(banner) and not set("<[`") & set(str(banner.value).split("\n")[0])
    overview = open_page(monkeypatch, tmp_path, "overview")
    assert table_rows(overview)["evil"]["sentence"] == evil  # runs_table.js sets it as text
    assert evil not in "".join(str(element.value) for element in overview.markdown)


def test_a_figure_has_the_worst_alert_that_fires_on_it() -> None:
    rows = [  # tail_noise watches the entropy too, and fires later; the explosion is over
        ("entropy_collapse", 10, 10, "warning", "firing"),
        ("entropy_collapse", 10, 14, "critical", "firing"),
        ("entropy_explosion", 3, 3, "critical", "firing"),
        ("entropy_explosion", 3, 5, "critical", "resolved"),
        ("tail_noise", 12, 12, "info", "firing"),
    ]
    names = ("rule", "first_step", "step", "severity", "state")
    transitions = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    nothing = {name: column[:0] for name, column in transitions.items()}
    assert glance._fires(transitions) == {"entropy": ("critical", "Entropy is collapsing")}
    assert glance._alert_step(transitions, 99.0) == 10 and glance._alert_step(nothing, 99.0) == 99.0


def test_alerts_stand_on_the_chart_of_what_their_rule_watches() -> None:
    names = np.array(["reward_lost", "blind_selection", "entropy_collapse", "diversity_lost", "of_another"], object)
    alerts = run_view.RunAlerts({"rule": names}, {}, frozenset({"reward", "entropy", "selected_decided_share"}))
    assert list(alerts.on("reward")["rule"]) == ["reward_lost"]
    assert list(alerts.on("selected_share", "selected_decided_share")["rule"]) == ["blind_selection"]
    # same_answer_share has no chart, and nobody knows what a rule of another engine watches
    assert list(alerts.on("entropy", "renyi2")["rule"]) == ["entropy_collapse", "diversity_lost", "of_another"]
    unrecorded = run_view.RunAlerts({"rule": names}, {}, frozenset({"entropy"}))
    assert list(unrecorded.on("entropy")["rule"]) == list(names) and not len(unrecorded.on("reward")["rule"])


def test_the_run_page_has_a_section_only_of_what_was_recorded(monkeypatch, tmp_path: Path) -> None:
    for name, scalars in (("plain", {}), ("more", {"regime_h_share": 0.9, "kl": 0.0, "lr": 1e-4})):
        with Recorder(tmp_path, RunInfo(name=name)) as recorder:
            for step in (1, 2):
                moving = {"regime_h_share": 0.8 + step / 100} if scalars else {}
                recorder.record(StepRecord(step, {"entropy": 0.5, "reward": 0.5} | scalars | moving))
    plain, more = (open_page(monkeypatch, tmp_path, "run", run=name) for name in ("plain", "more"))
    headings = [" ".join(str(element.proto.body) for element in app.get("html")) for app in (plain, more)]
    assert ["Where the entropy goes" in text for text in headings] == [False, True]
    assert "Not drawn: KL to reference, 0 in all steps; Learning rate, 0.0001 in all steps." in words(more)
    assert "Not drawn" not in words(plain)


def test_a_page_follows_further_steps_by_their_points_alone(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Tail, "__init__", partialmethod(Tail.__init__, min_interval_s=0.0))
    with Recorder(tmp_path, simulated.info("live", "ict", 0, 60), engine=simulated.OneAlert(14, None)) as recorder:

        def record(*numbers: int) -> list[float]:
            made = [simulated.step(number, weighting="ict", seed=0, total=60) for number in numbers]
            for step in made:
                recorder.record(*step)
            assert recorder.flush()
            data.poll()
            return [step[0].scalars["entropy"] for step in made]

        record(*range(1, 11))
        follows = open_page(monkeypatch, tmp_path, "run", run="live").session_state["follows"]
        assert not follows.is_due(is_new=False) and not follows.is_due(is_new=True)
        recorded = record(11, 12, 13)
        assert not follows.is_due(is_new=True)
        points = follows._points()
        steps, values = points["live/entropy"]
        assert steps.tolist() == [11, 12, 13] and values.tolist() == np.float32(recorded).tolist()
        fan = data.counts_of("live", "entropy")
        # up to COLUMNS steps a column of the fan is one step
        np.testing.assert_allclose(points["live/entropy quantiles/mean"][1], (fan["sum"] / fan["n"])[-3:], rtol=1e-6)
        assert points["live/entropy quantiles/p50"][0].tolist() == [11, 12, 13]
        record(14)  # its alert fires
        assert follows.is_due(is_new=True)


def test_a_request_with_the_url_from_before_does_not_take_a_choice_back(monkeypatch, store: Path) -> None:
    app = open_page(monkeypatch, store, "run", run="ict-s0")
    before = dict(app.query_params)
    assert "live" in before["updates"] and "x" not in before
    app.session_state["choices"] = {"updates": ("paused", time.monotonic()), "x": ("10-20", time.monotonic())}
    app.run()  # AppTest, like a browser that has not heard of the choices, sends the URL from before
    assert "paused" in app.query_params["updates"] and "10-20" in app.query_params["x"]
    app.query_params["updates"] = "live"
    app.session_state["choices"] = {"updates": ("paused", time.monotonic() - shared.SETTLE_S)}
    app.run()  # later the URL is right: the reader went back, or edited it
    assert "live" in app.query_params["updates"]


def test_a_place_of_the_axis_leads_to_its_step(monkeypatch, store: Path) -> None:
    open_page(monkeypatch, store, "run", run="ict-s0", over="hours")
    at = data.spent("ict-s0", "hours", np.array([0, 1, 17, 40]))
    np.testing.assert_allclose(at, np.array([0, 1, 17, 40]) * 0.4 / 3600)  # every step took 0.4 s
    assert [data.step_at("ict-s0", "hours", float(np.float32(x))) for x in at] == [1, 1, 17, 40]
    assert data.step_at("ict-s0", "hours", 9.0) == 40
    assert data.SPENT_SERIES.keys() == SPENT.keys()


def test_a_page_is_made_anew_now_and_then(monkeypatch, store: Path) -> None:
    follows = open_page(monkeypatch, store, "run", run="ict-s0").session_state["follows"]
    assert not follows.is_due(is_new=True)
    assert replace(follows, drawn=follows.drawn - run_view.PACE_S).is_due(is_new=True)
    assert not replace(follows, drawn=follows.drawn - run_view.PACE_S).is_due(is_new=False)


def test_series_of_unknown_names_have_a_section_of_their_own(monkeypatch, tmp_path: Path) -> None:
    own = {"critic/vf_loss": 0.25, "<b>größe</b> [x](y), *µ*": 3.0}
    for name, others in (("ours", {}), ("theirs", own)):
        with Recorder(tmp_path, RunInfo(name=name)) as recorder:
            for step in (1, 2):
                scalars = {"entropy": 0.5, "reward": 0.5} | {key: value + step for key, value in others.items()}
                recorder.record(StepRecord(step, scalars))
    assert [box.label for box in open_page(monkeypatch, tmp_path, "run", run="ours").expander] == []
    app = open_page(monkeypatch, tmp_path, "run", run="theirs")
    assert [unescape(box.label) for box in app.expander] == ["Other series (2)"] and not app.multiselect  # closed
    app.session_state["others-theirs"] = True
    app.run()
    assert not app.exception and sorted(app.multiselect[0].value) == sorted(own)
    drawn = [
        json.loads(one.proto.json) for one in app.get("bidi_component") if one.proto.component_name == "rlvr_chart"
    ]
    titles = [str(chart) for chart in drawn]
    for name in own:
        assert any(json.dumps(name, ensure_ascii=False)[1:-1] in title for title in titles), name
    app.multiselect[0].set_value(["critic/vf_loss"]).run()
    assert not app.exception
    with Recorder(tmp_path, RunInfo(name="nothing-known", weighting="")) as recorder:
        for step in (1, 2):
            recorder.record(StepRecord(step, {"my/loss": 1.0 / step}))
    for page in PAGES:
        open_page(monkeypatch, tmp_path, page, run="nothing-known")


def entry(name: str, weighting: str, seed: int, comparison: str = "c") -> RunEntry:
    return RunEntry(name, {"weighting": weighting, "seed": seed, "comparison": comparison})


def test_default_arms_pair_equal_seeds() -> None:
    entries = [entry("i1", "ict", 1), entry("i0", "ict", 0), entry("u0", "uniform", 0), entry("u1", "uniform", 1),
               entry("u2", "uniform", 2), entry("x", "random", 9, "other")]  # fmt: skip
    assert default_arms(entries) == (Arm("uniform", ("u0", "u1")), Arm("ict", ("i0", "i1")))
    with_control = [entry("r0", "random", 0), *entries]
    assert default_arms(with_control) == (*default_arms(entries), Arm("random", ("r0",)))
    alone = [entry("b", "ict", 0, ""), entry("a", "uniform", 0, "")]
    assert default_arms(alone) == (Arm("a", ("a",)), Arm("b", ("b",)))


def test_figures_table_with_pairs_shows_intervals() -> None:
    arms = (Arm("uniform", ("u",)), Arm("ict", ("i",)))
    figures = {"u": {"step": 9.0, "eval/heldout/pass@1": 0.5, "entropy": 1.0},
               "i": {"step": 9.0, "eval/heldout/pass@1": 0.25, "entropy": 0.5}}  # fmt: skip
    paired = {
        ("ict", "eval/heldout/pass@1"): {"difference": -0.25, "low": -0.3, "high": -0.2, "p_t": 0.0123, "pairs": 3},
        ("ict", "entropy"): {"difference": -0.5, "low": None, "high": None, "p_t": None, "pairs": 1},
    }
    table = figures_table(arms, figures, ["eval/heldout/pass@1", "entropy"], paired)
    assert table["ict minus uniform"] == ["–", "-25.0 pp [-30.0, -20.0], p .012", "-0.5"]


def test_figures_table_means_and_differences() -> None:
    arms = (Arm("uniform", ("u0", "u1")), Arm("ict", ("i0",)))
    figures = {"u0": {"step": 10, "eval/heldout/pass@1": 0.2}, "u1": {"step": 10, "eval/heldout/pass@1": 0.4},
               "i0": {"step": 12, "eval/heldout/pass@1": 0.5, "entropy": 1.0}}  # fmt: skip
    table = figures_table(arms, figures, ["eval/heldout/pass@1", "entropy", "kl"])
    assert table == {"figure": ["Step", "pass@1, heldout", "Entropy (nats)"], "uniform": ["10", "30.0%", "–"],
                     "ict": ["12", "50.0%", "1"], "ict minus uniform": ["+2", "+20.0 pp", "–"]}  # fmt: skip
    three = figures_table((*arms, Arm("random", ("i0",))), figures, ["entropy"])
    assert list(three) == ["figure", "uniform", "ict", "random", "ict minus uniform", "random minus uniform"]


def test_doubts_name_what_weakens_a_comparison() -> None:
    def of(name: str, weighting: str, seed: int, commit: str) -> RunEntry:
        environment = {"commit": commit, "packages": {"torch": "2.13.0"}, "device": "x86_64"}
        return RunEntry(name, {"weighting": weighting, "seed": seed, "environment": environment}, "finished")

    made = [of("u0", "uniform", 0, "a" * 40), of("u1", "uniform", 1, "a" * 40), of("i0", "ict", 0, "a" * 40),
            of("r2", "random", 2, "b" * 40)]  # fmt: skip
    entries = {entry.name: entry for entry in made}
    assert doubts((Arm("uniform", ("u0",)), Arm("ict", ("i0",))), entries) == []
    told = doubts((Arm("uniform", ("u0", "u1")), Arm("mixed", ("i0", "r2", "u0"))), entries)
    assert told == [
        "u0 is on more than one side.",
        "mixed mixes weightings: ict, random, uniform.",
        "Seeds that only mixed or uniform has are in no pair: 1, 2.",
        "The runs are of different code: aaaaaaaaaaaa, bbbbbbbbbbbb.",
    ]
    odd = RunEntry("o", {"environment": "none", "seed": None}, "finished")  # a run.json that nobody checked
    assert doubts((Arm("uniform", ("u0",)), Arm("o", ("o",))), entries | {"o": odd}) == []
    cut = replace(entries["i0"], status="crashed")
    assert doubts((Arm("uniform", ("u0",)), Arm("ict", ("i0",))), entries | {"i0": cut}) == [
        "Not all runs came to their end, so their newest values may be of other steps: i0 (crashed)."
    ]


def drawn_rollouts(app: AppTest) -> list[dict[str, Any]]:
    """What the page sent of each rollout."""
    (sent,) = [one.proto.json for one in app.get("bidi_component") if one.proto.component_name == "rlvr_rollouts"]
    return json.loads(sent)["rollouts"]


def test_rollouts_of_other_trainers_show_what_is_known_of_them(monkeypatch, tmp_path: Path) -> None:
    verl = Path(__file__).parents[1] / "monitor" / "files" / "verl"
    (tmp_path / "r").mkdir()
    tokens = [{"sample": s, "position": p, "token_id": p, "entropy": 0.5, "reward": s} for s in (0, 1) for p in (0, 1)]
    (tmp_path / "r" / "1.jsonl").write_text("\n".join(json.dumps(row) for row in tokens))
    for name, rollouts in (("texts", verl / "rollouts"), ("tokens", tmp_path / "r")):
        importer = Importer(
            str(verl / "metrics.jsonl"), str(tmp_path / "s"), name, {}, live=False, say=print, rollouts=str(rollouts)
        )
        importer.look()
        importer.close("finished")
    app = open_page(monkeypatch, tmp_path / "s", "tokens", run="texts", step="1")
    rollouts = drawn_rollouts(app)
    assert [(one["correct"], one["truncated"], one["figures"], one["kept"]) for one in rollouts] == [
        (None, None, "reward 1", 0), (None, None, "reward 0", 0),
    ]  # fmt: skip
    assert [one["completion"] for one in rollouts] == ["3", "9"]
    assert app.selectbox[1].options[0].startswith("0 · 2 rollouts · 2+1=") and "nan" not in words(app)
    app = open_page(monkeypatch, tmp_path / "s", "tokens", run="tokens", step="1", colour="deviation", find="0")
    assert "The run has no deviation of tokens; they are coloured by entropy." in words(app)
    (first, _) = drawn_rollouts(app)
    assert first["texts"] == ["<0>", "<1>"] and first["figures"] == "reward 0 · 2 tokens · mean entropy 0.500 nats"
    for view in ("selected", "lost"):
        open_page(monkeypatch, tmp_path / "s", "tokens", run="tokens", step="1", view=view)
    for page in ("overview", "run", "compare"):
        open_page(monkeypatch, tmp_path / "s", page, run="tokens")


def test_milestones_are_checkpoints_resumes_and_evaluations(monkeypatch, tmp_path: Path) -> None:
    def record(steps: range, resume: bool) -> None:
        with Recorder(tmp_path, simulated.info("run", "ict", 0, 20), resume=resume) as recorder:
            for number in steps:
                recorder.record(*simulated.step(number, weighting="ict", seed=0, total=20))
                if number % 8 == 0:
                    recorder.event("checkpoint", f"Saved as step-{number}.", number)

    record(range(1, 12), False)
    record(range(9, 21), True)
    app = open_page(monkeypatch, tmp_path, "run", run="run")
    found = data.milestones("run")
    at = {what: found["step"][found["what"] == what].tolist() for what in set(found["what"])}
    assert at == {"checkpoint": [8, 16], "resume": [9], "evaluation": [10, 20]}
    steps, values = data.followed("run").series("eval/heldout/pass@1")
    told = found["message"][found["what"] == "evaluation"].tolist()
    assert steps.tolist() == [10, 20] and told == [f"pass@1, heldout: {value:.1%}" for value in values]
    assert "At the foot of the charts: | evaluation, □ checkpoint, ▶ resume." in words(app)
    assert "Not marked" not in words(app)


@pytest.fixture(scope="module")
def ended_otherwise(tmp_path_factory) -> Path:
    """Four runs of 3 steps without evaluation: one stopped, one failed, one crashed, one that stalls."""
    store = tmp_path_factory.mktemp("ended")
    for seed, status in enumerate(("stopped", "failed", "crashed", "stalled")):
        with Recorder(store, simulated.info(status, "ict" if seed else "uniform", 0, 60)) as recorder:
            for number in range(1, 4):
                recorder.record(*simulated.step(number, weighting="ict", seed=seed, total=60))
            recorder.close(status if status in ("stopped", "failed") else "finished")
        path = next((store / "runs" / status).glob("heartbeat*.json"))
        now, beat = time.time(), json.loads(path.read_text())
        if status in ("crashed", "stalled"):  # of another machine, whose processes nobody here can see
            beat |= {"status": "running", "host": "elsewhere", "lock": False}
            beat |= {"ts": now - (3600 if status == "crashed" else 5), "last_step_ts": now - 3600, "active_ts": None}
            path.write_text(json.dumps(beat))
    return store


@pytest.mark.parametrize("page", ["run", "tokens", "method"])
def test_a_run_that_does_not_train_as_it_should_says_what_is_true_and_what_to_do(
    monkeypatch, ended_otherwise: Path, page: str
) -> None:
    what_to_do = {
        "stopped": "Someone stopped it.*resume RUN", "failed": "ended with an error.*resume RUN",
        "crashed": "process is gone.*resume RUN", "stalled": "No new step comes.*Look at the trainer's output",
    }  # fmt: skip
    for status, said in what_to_do.items():
        shown = words(open_page(monkeypatch, ended_otherwise, page, run=status))
        assert [other for other in what_to_do if re.search(what_to_do[other], shown)] == [status], (status, shown)
        assert re.search(said, shown)
        if page == "run":
            assert ("No evaluation yet" in shown) == (status == "stalled")
            assert ("No evaluation was recorded" in shown) == (status != "stalled")


def test_the_other_pages_tell_the_state_of_their_runs(monkeypatch, ended_otherwise: Path, tmp_path: Path) -> None:
    rows = table_rows(open_page(monkeypatch, ended_otherwise, "overview"))
    assert {name: row["status"] for name, row in rows.items()} == {name: name for name in rows} and len(rows) == 4
    shown = words(open_page(monkeypatch, ended_otherwise, "compare", a="stopped", b="crashed"))
    assert "Not all runs came to their end" in shown and "crashed (crashed), stopped (stopped)" in shown
    store = Path(shutil.copytree(ended_otherwise, tmp_path / "unread", symlinks=True))
    (store / "runs/crashed/run.json").write_text('{"name": "cr')
    for page in ("run", "tokens", "method"):
        shown = words(open_page(monkeypatch, store, page, run="crashed"))
        assert "Its run.json is missing or cannot be read, so its settings are not known" in shown
    shown = words(open_page(monkeypatch, store, "compare", a="stopped", b="crashed"))
    assert "The settings of crashed cannot be read" in shown


def test_a_live_run_says_when_its_first_evaluation_comes(monkeypatch, tmp_path: Path) -> None:
    about = simulated.info("live", "ict", 0, 60)
    with Recorder(tmp_path, replace(about, config=dict(about.config) | {"eval": {"every": 25}})) as recorder:
        recorder.record(*simulated.step(1, weighting="ict", seed=0, total=60))
        recorder.flush()
        shown = words(open_page(monkeypatch, tmp_path, "run", run="live"))
        assert "No evaluation yet: one comes every 25 steps" in shown
        assert "Too early to judge: a verdict needs 20 steps after warm-up" in shown
