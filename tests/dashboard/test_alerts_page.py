"""The Alerts page: history and evidence, acknowledge and mute, rates of the rules, routes and their test."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
import simulated
from test_browser import PATIENCE_S, opened
from test_pages import open_page, told, words

from dashboard import alert_rows, data
from dashboard.alert_rows import AlertHistory
from dashboard.launch import LaunchError, check_alerts, start, stop
from dashboard.views import alerts as alerts_view
from dashboard.views.alerts import rate_text
from monitor.alerts.judged_runs import judged_runs
from monitor.alerts.judgement import measured_rates
from monitor.alerts.marks import acknowledge, read_marks
from monitor.alerts.rules import RULES
from monitor.errors import MonitorError
from monitor.store.tail import Tail


@pytest.fixture
def own(store: Path, tmp_path: Path) -> Path:
    """A copy of the store, to write marks into."""
    return Path(shutil.copytree(store, tmp_path / "own", symlinks=True))


def evidence(app) -> str:
    bodies = [str(element.proto.body) for element in app.get("html")]
    return unescape(re.sub(r"<[^>]+>", " ", " ".join(body for body in bodies if "rlvr-evidence" in body)))


def test_history_tells_states_and_evidence(monkeypatch, store: Path) -> None:
    app = open_page(monkeypatch, store, "alerts")
    assert "1 of 1 firing alerts not seen yet · 1 resolved" in words(app)
    rows = app.dataframe[0].value
    assert list(rows["run"]) == ["uniform-s0", "ict-s0"] and list(rows["state"]) == ["firing at its end", "resolved"]
    assert list(rows["since step"]) == [25, 12] and rows["to step"][1] == 20
    assert "Tick a row" in words(app)
    app = open_page(monkeypatch, store, "alerts", run="ict-s0", rule="entropy_collapse", first="12")
    assert "entropy_collapse in ict-s0" in words(app) and "since step 12, resolved at step 20" in words(app)
    said = evidence(app)
    # what the engine of the simulated runs said at each of its two transitions
    assert "Step 12 · fires as critical" in said and "Step 20 · resolved" in said
    assert said.count("value 0.21, baseline 0.9, threshold 0.27") == 2


def test_only_alerts_that_fire_and_nobody_has_seen(monkeypatch, own: Path) -> None:
    app = open_page(monkeypatch, own, "alerts", show="new")
    assert list(app.dataframe[0].value["run"]) == ["uniform-s0"]
    acknowledge(own, "uniform-s0", "entropy_collapse", 25)
    app = open_page(monkeypatch, own, "alerts", show="new")
    assert "None of the 2 alerts is firing, not seen" in words(app)
    app = open_page(monkeypatch, own, "alerts", show="firing")
    assert list(app.dataframe[0].value["state"]) == ["firing at its end, seen"]


def test_an_alert_is_acknowledged_muted_and_unmuted_from_the_page(monkeypatch, own: Path) -> None:
    def press(app, label: str):
        return next(button for button in app.button if button.label == label).click().run()

    app = open_page(monkeypatch, own, "alerts", run="uniform-s0", rule="entropy_collapse", first="25")
    app = press(app, "Acknowledge")
    assert read_marks(own, "uniform-s0").has_seen("entropy_collapse", 25)
    assert "Seen just now" in words(app) and app.dataframe[0].value["state"][0] == "firing at its end, seen"
    app = press(app, "Mute this rule for the run")
    assert read_marks(own, "uniform-s0").is_muted("entropy_collapse", 10**9)
    assert "Muted until unmuted" in words(app)
    app = press(app, "Unmute")
    assert not read_marks(own, "uniform-s0").muted and not app.exception


def test_a_store_that_cannot_be_written_says_so(monkeypatch, own: Path) -> None:
    app = open_page(monkeypatch, own, "alerts", run="uniform-s0", rule="entropy_collapse", first="25")
    (own / "runs" / "uniform-s0" / "alerts.lock").mkdir()  # so that no lock can be taken
    next(button for button in app.button if button.label == "Acknowledge").click().run()
    assert "Cannot write" in told(app.error[0]) and not app.exception


def test_unknown_alerts_and_none_at_all(monkeypatch, store: Path, tmp_path: Path) -> None:
    app = open_page(monkeypatch, store, "alerts", run="../..", rule="x", first="1")
    assert "No alert x of run ../.. from step 1" in told(app.warning[0]).replace("\u2060", "")
    simulated.record_run(tmp_path, "calm", "ict", steps=3)
    assert "No alert has fired in this store" in words(open_page(monkeypatch, tmp_path, "alerts"))


def test_each_rule_stands_with_its_measured_rates(monkeypatch, store: Path) -> None:
    rows = open_page(monkeypatch, store, "alerts").dataframe[1].value
    assert list(rows["rule"]) == list(RULES)
    found = {name: (fired, bad) for name, fired, bad in zip(rows["rule"], rows["real runs it fired in"],
                                                             rows["of them harmed"], strict=True)}  # fmt: skip
    rates = measured_rates()
    assert found["reward_lost"] == (rates["reward_lost"]["fired"], rates["reward_lost"]["bad"])
    assert rates["tail_noise"]["fired"] == 0 and rows["right"].isna()[list(RULES).index("tail_noise")]
    assert rows["fired here"][0] == 2 and rows["fires here"][0] == 1  # entropy_collapse comes first
    assert rate_text("no such rule").startswith("How often this rule is right on real runs was not measured")


def test_only_changed_runs_are_read_again(store: Path, monkeypatch) -> None:
    tail = Tail(store, 0.0)
    tail.poll()
    history = AlertHistory(tail)
    first = history.read()
    asked = []
    log = alert_rows.alert_log
    monkeypatch.setattr(alert_rows, "alert_log", lambda con, runs: asked.append(runs) or log(con, runs))
    assert history.read() == first and not asked
    tail.runs["ict-s0"].version += 1
    assert len(history.read()) == 2 and asked == [["ict-s0"]]
    tail.close()


def test_routes_are_shown_and_tested_without_a_secret(monkeypatch, store: Path, tmp_path: Path) -> None:
    assert "without an alerts file" in words(open_page(monkeypatch, store, "alerts"))
    file = tmp_path / "alerts.toml"
    file.write_text('[[routes]]\nurl_env = "RLVR_TEST_URL"\nruns = ["ict-*"]\n\n[[routes]]\nurl_env = "RLVR_UNSET"\n')
    monkeypatch.setenv(data.ALERTS_VARIABLE, check_alerts(str(file)))
    monkeypatch.setenv("RLVR_TEST_URL", "json://user:secret@127.0.0.1:1/x")
    app = open_page(monkeypatch, store, "alerts")
    rows = app.dataframe[2].value
    assert list(rows["route"]) == ["$RLVR_TEST_URL", "$RLVR_UNSET"] and rows["runs"][0] == "ict-*"
    assert (
        rows["its address"][0] == "is there, not shown" and "RLVR_UNSET of a route is not set" in rows["its address"][1]
    )
    sent = []
    monkeypatch.setattr(
        alerts_view, "send_test", lambda routes, title: sent.append(title) or {"$A": "", "$B": "it was refused"}
    )
    next(button for button in app.button if button.label == "Send a test").click().run()
    assert sent == ["TEST: rlvr dashboard"]
    assert told(app.success[0]) == "$A: arrived" and told(app.error[0]) == "$B: it was refused"

    def refuse(routes, title):
        raise MonitorError("The environment variable RLVR_UNSET of a route is not set.")

    monkeypatch.setattr(alerts_view, "send_test", refuse)
    next(button for button in app.button if button.label == "Send a test").click().run()
    assert "RLVR_UNSET" in told(app.error[0])
    everything = "\n".join([words(app), json.dumps([str(frame.value) for frame in app.dataframe])])
    assert "secret" not in everything.replace("not shown", "")


def test_an_alerts_file_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path) -> None:
    assert check_alerts("") == ""
    (tmp_path / "bad.toml").write_text("[rules.entropy_colapse]\n")
    with pytest.raises(LaunchError, match="unknown rule 'entropy_colapse'"):
        check_alerts(str(tmp_path / "bad.toml"))
    with pytest.raises(LaunchError, match="Cannot read the alerts file"):
        check_alerts(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark-phone"])
def test_the_page_in_a_browser(browser, store: Path, tmp_path: Path, dark: bool) -> None:
    own = Path(shutil.copytree(store, tmp_path / "own", symlinks=True))
    process, url = start(own)
    try:
        address = f"{url}/alerts?run=uniform-s0&rule=entropy_collapse&first=25"
        with opened(browser, address, dark=dark) as page:
            page.locator(".rlvr-evidence").wait_for(timeout=PATIENCE_S * 1000)
            page.get_by_role("button", name="Acknowledge").press("Enter")
            page.get_by_text("Seen just now").wait_for(timeout=PATIENCE_S * 1000)
            assert read_marks(own, "uniform-s0").has_seen("entropy_collapse", 25)
            assert not page.evaluate("document.querySelector('.stMain').scrollWidth > innerWidth")
            page.get_by_role("link", name="Tokens of its first step").click()
            page.wait_for_url("**/tokens?run=uniform-s0&step=25*", timeout=PATIENCE_S * 1000)
    finally:
        stop(process)


def test_the_runs_behind_a_rate_are_those_that_it_counts(monkeypatch, store: Path) -> None:
    app = open_page(monkeypatch, store, "alerts", judged="entropy_collapse")
    # 24 runs of the corpus: 13 of the development part of known outcome, as the verdict cites, 12 of them harmed
    rows = next(table.value for table in app.dataframe if "the warning was" in table.value)
    known = rows[(rows["part"] == "development") & (rows["the warning was"] != "counted on no side")]
    false = known["the warning was"] == "false alarm"
    rate = measured_rates()["entropy_collapse"]
    assert (len(known), int((~false).sum())) == (rate["fired"], rate["bad"]) == (13, 12)
    late = rows[rows["the warning was"] == "too late"]
    assert len(late) and (late["warned at step"] >= late["damage seen at step"]).all()
    early = rows[rows["the warning was"] == "in time"]
    assert len(early) and (early["warned at step"] < early["damage seen at step"]).all()
    assert rows["the warning was"].iloc[0] == "false alarm"
    assert f"warned of {len(rows)} of 175 real runs: " in words(app) and "counts the development part" in words(app)


def test_the_sentence_of_an_alert_opens_its_runs_and_a_rule_without_any_says_so(monkeypatch, store: Path) -> None:
    app = open_page(monkeypatch, store, "alerts", run="ict-s0", rule="entropy_collapse", first="12")
    label = "Of 13 real runs in which this rule fired, 12 came to harm. Which?"
    assert label in [unescape(box.label) for box in app.expander]
    app = open_page(monkeypatch, store, "alerts", judged="repetition")
    assert "repetition warned of none of the 175 real runs" in words(app)
    app = open_page(monkeypatch, store, "alerts", judged="no rule")
    assert "real runs:" not in words(app)


def test_a_run_of_the_corpus_that_the_store_holds_is_a_link(monkeypatch, tmp_path: Path) -> None:
    name = next(one.run for one in judged_runs() if "entropy_collapse" in one.warned)
    simulated.record_run(tmp_path, name, "uniform", steps=3)
    app = open_page(monkeypatch, tmp_path, "alerts", judged="entropy_collapse")
    assert [f"Open {name}"] == [
        unescape(link.proto.label) for link in app.get("page_link") if "Open" in link.proto.label
    ]
