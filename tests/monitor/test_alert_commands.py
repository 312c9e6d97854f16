"""`rlvr alerts`: marks beside a run, and a test of the routes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from receivers import WebReceiver
from watched_child import entropies

from monitor.alerts.engine import AlertEngine
from monitor.alerts.marks import Marks, Muted, read_marks
from monitor.cli import main
from monitor.recorder import Recorder
from monitor.records import StepRecord
from monitor.store.check import check_store
from monitor.store.compact import compact_run


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with Recorder(tmp_path / "s", "a", engine=AlertEngine(), flush_s=0.0) as recorder:
        for step, value in enumerate(entropies()):
            recorder.record(StepRecord(step, {"entropy": value, "reward": 0.5}))
    return tmp_path / "s"


def listed(store: Path, capsys: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["alerts", "list", "a", "--store", str(store), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    return row


def test_ack_and_mute_are_listed_and_disturb_nobody(store: Path, capsys: Any) -> None:
    row = listed(store, capsys)
    assert (row["rule"], row["state"], row["acknowledged"], row["muted"]) == ("entropy_collapse", "firing", None, False)
    first = row["step"]
    assert main(["alerts", "ack", "a", "entropy_collapse", "--store", str(store)]) == 0
    assert main(["alerts", "mute", "a", "entropy_collapse", "--store", str(store), "--until-step", "90"]) == 0
    row = listed(store, capsys)
    assert row["acknowledged"] > 1e9 and (row["muted"], row["muted_until_step"]) == (True, 90)
    marks = read_marks(store, "a")
    assert marks.has_seen("entropy_collapse", first) and not marks.has_seen("entropy_collapse", first + 1)
    assert marks.is_muted("entropy_collapse", 90) and not marks.is_muted("entropy_collapse", 91)
    compact_run(store, "a")
    assert check_store(store) == []
    assert main(["alerts", "unmute", "a", "entropy_collapse", "--store", str(store)]) == 0
    assert listed(store, capsys)["muted"] is False
    assert main(["alerts", "list", "--store", str(store)]) == 0
    assert "entropy_collapse" in capsys.readouterr().out


def test_damaged_marks_are_no_marks(store: Path) -> None:
    path = store / "runs/a/alerts.json"
    for text in ("", "[1]", '{"muted": 3, "acknowledged": {"r": 1}}', '{"muted": {"r": {"ts": "x"}}}', '{"muted": {"r'):
        path.write_text(text)
        assert read_marks(store, "a") == Marks({}, {}), text
    path.write_text('{"muted": {"r": {"ts": 5, "until_step": null, "later": 1}, "s": {"ts": true}}, "new": 1}')
    assert read_marks(store, "a") == Marks({}, {"r": Muted(None, 5.0)})


def test_wrong_use(store: Path, capsys: Any) -> None:
    for argv, hint in (
        (["ack", "a", "entropy_colapse"], "No rule is called 'entropy_colapse'. Did you mean 'entropy_collapse'?"),
        (["ack", "a", "entropy_explosion"], "entropy_explosion has not fired in run 'a'"),
        (["mute", "b", "entropy_collapse"], "No run 'b'"),
        (["mute", "a", "entropy_collapse", "--until-step", "-1"], "--until-step is -1, expected 0 or more"),
    ):
        assert main(["alerts", *argv, "--store", str(store)]) == 2
        assert hint in capsys.readouterr().err
    assert main(["alerts"]) == 2 and main(["alerts", "--help"]) == 0


def test_test_fire_says_of_each_route_whether_it_arrived(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    pytest.importorskip("apprise")
    good, bad = WebReceiver(), WebReceiver()
    bad.status = 500
    monkeypatch.setenv("GOOD", good.address())
    (tmp_path / "bad.url").write_text(bad.address())
    path = tmp_path / "alerts.toml"
    try:
        path.write_text('[[routes]]\nurl_env = "GOOD"\n')
        assert main(["alerts", "test-fire", "--alerts", str(path)]) == 0
        path.write_text(f'[[routes]]\nurl_env = "GOOD"\n[[routes]]\nurl_file = "{tmp_path / "bad.url"}"\n')
        assert main(["alerts", "test-fire", "--alerts", str(path)]) == 1
    finally:
        good.close()
        bad.close()
    out, err = capsys.readouterr()
    assert "FAILED" in out and "the receiver answered with status 500" in out and "tok-" not in out + err
    assert good.titles == ["TEST: rlvr alerts test-fire"] * 2
    path.write_text("")
    assert main(["alerts", "test-fire", "--alerts", str(path)]) == 2
    assert "has no [[routes]]" in capsys.readouterr().err
