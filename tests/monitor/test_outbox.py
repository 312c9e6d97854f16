"""The outbox: what is news, and what a restart finds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from monitor.alerts.engine import AlertEngine
from monitor.alerts.outbox import WAITING, Outbox
from monitor.errors import StoreError
from monitor.records import Alert


def alert(state: str, step: int, first: int, severity: str = "warning", rule: str = "r") -> Alert:
    return Alert(rule, severity, state, step, first, float("nan"), 1.0, 0.3, "m")  # type: ignore[arg-type]


def told(outbox: Outbox, *alerts: Alert, run: str = "a") -> list[tuple[str, int]]:
    return [(one.state, one.step) for one in outbox.put(run, alerts, lambda run, one: ["x"])]


def test_one_message_an_episode_its_escalation_and_its_end(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "o.jsonl")
    assert told(box, alert("pending", 4, 4)) == []
    assert told(box, alert("firing", 5, 5), alert("firing", 6, 5)) == [("firing", 5)]
    assert told(box, alert("firing", 7, 5, "critical"), alert("firing", 8, 5, "warning")) == [("firing", 7)]
    assert told(box, alert("resolved", 9, 5, "critical"), alert("resolved", 10, 5)) == [("resolved", 9)]
    assert told(box, alert("resolved", 12, 11)) == []  # it was pending: nobody has heard of it
    assert told(box, alert("firing", 20, 20)) == [("firing", 20)]
    assert told(box, alert("firing", 20, 20), run="b") == [("firing", 20)]
    box.close()


def test_a_replay_of_what_was_told_is_no_news(tmp_path: Path) -> None:
    """Critical episode 5 to 9, then a warning from 20: a restart that judges all of it again says nothing."""
    past = [
        alert("firing", 5, 5), alert("firing", 7, 5, "critical"), alert("resolved", 9, 5, "critical"),
        alert("firing", 20, 20),
    ]  # fmt: skip
    box = Outbox(tmp_path / "o.jsonl")
    assert len(told(box, *past)) == 4
    assert told(box, *past) == []
    box.close()
    box = Outbox(tmp_path / "o.jsonl")
    assert told(box, *past) == []
    assert told(box, alert("resolved", 30, 20)) == [("resolved", 30)]
    box.close()


def test_a_resumed_run_that_never_resolved_fires_again_later(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "o.jsonl")
    told(box, alert("firing", 60, 60))
    assert told(box, alert("firing", 58, 58)) == []  # it went on from step 50
    assert told(box, alert("firing", 150, 150)) == [("firing", 150)]
    box.close()


def test_a_restart_finds_what_waits_and_not_what_was_sent(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "o.jsonl")
    box.put("a", [alert("firing", 5, 5), alert("firing", 6, 6, rule="s")], lambda run, one: ["x", "y"])
    first = box.next("x", 0, 0.0)
    assert first is not None and first.id == "a/r/5/firing/warning/5"
    box.done("x", first, "sent")
    box.close()
    with (tmp_path / "o.jsonl").open("a") as file:
        file.write('{"done": "a/r/5/fir')  # a kill in the middle of a line
    box = Outbox(tmp_path / "o.jsonl")
    assert [m.id for m in box.waiting] == ["a/r/5/firing/warning/5", "a/s/6/firing/warning/6"]
    next_ids = [(source, m.id) for source in ("x", "y") if (m := box.next(source, 0, 0.0))]
    assert next_ids == [("x", "a/s/6/firing/warning/6"), ("y", "a/r/5/firing/warning/5")]
    box.keep_only(["x"])
    assert [m.id for m in box.waiting] == ["a/s/6/firing/warning/6"]
    box.close()


def test_the_file_shrinks_to_the_last_news_of_each_rule(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "o.jsonl")
    for step in range(0, 400, 2):
        told(box, alert("firing", step, step), alert("resolved", step + 1, step))
        for _ in range(2):
            message = box.next("x", 0, 0.0)
            assert message is not None
            box.done("x", message, "sent")
    box.close()
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 801  # the run, 400 messages, 400 marks
    Outbox(tmp_path / "o.jsonl").close()
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert lines == [
        {"run": "a"},
        {"run": "a", "rule": "r", "told": {"state": "resolved", "first_step": 398, "severity": "warning", "at": 399}},
    ]


def test_a_storm_is_bounded_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    box = Outbox(tmp_path / "o.jsonl")
    storm = [alert("firing", 1, 1, rule=f"r{i}") for i in range(WAITING + 200)]
    told(box, *storm)
    assert (len(box.waiting), box.left_out) == (WAITING, 200)
    assert [record.getMessage() for record in caplog.records] == [
        f"{WAITING} alerts wait for delivery: further ones are not delivered."
    ]
    assert told(box, *storm) == []
    box.close()


def test_one_process_delivers(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "o.jsonl")
    with pytest.raises(StoreError, match="Another process delivers from"):
        Outbox(tmp_path / "o.jsonl")
    box.close()


def test_a_killed_process_has_lost_nothing_that_it_wrote(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom monitor.alerts.outbox import Outbox\n"
        "from monitor.records import Alert\n"
        "box = Outbox(Path(sys.argv[1]))\n"
        "a = Alert('r', 'critical', 'firing', 5, 5, 0.1, 1.0, 0.3, 'm')\n"
        "box.put('a', [a], lambda run, alert: ['x'])\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "o.jsonl")])
    assert killed.returncode == -signal.SIGKILL
    box = Outbox(tmp_path / "o.jsonl")
    assert [m.alert for m in box.waiting] == [Alert("r", "critical", "firing", 5, 5, 0.1, 1.0, 0.3, "m")]
    box.close()


def test_an_engine_that_starts_again_says_nothing_twice(tmp_path: Path) -> None:
    """1 nat for 20 steps, then 0.1: a collapse. The engine judges all of it again after a restart."""
    rows = [1.0 + 0.001 * (i % 3) for i in range(25)] + [0.9 * 0.8**i for i in range(15)]

    def judged() -> list[Alert]:
        engine = AlertEngine()
        return [one for step, value in enumerate(rows) for one in engine.observe(step, {"entropy": value})]

    box = Outbox(tmp_path / "o.jsonl")
    assert [state for state, _ in told(box, *judged())][:1] == ["firing"]
    box.close()
    box = Outbox(tmp_path / "o.jsonl")
    assert told(box, *judged()) == []
    box.close()
