"""The demo as a user runs it, with two steps: both arms, the dashboard that stays up, the result, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import urllib.error
import urllib.request

import pytest
from rich.console import Console

from monitor.children import RLVR
from monitor.queries.alerts import alert_log
from monitor.recorder import Recorder
from monitor.records import Alert, StepRecord
from monitor.store.reader import open_store
from monitor.store.tail import Tail
from trainer.commands import demo
from trainer.runtime import runs

EPISODES = {  # step -> (state, first step): one that only came near firing, one that fired, got worse and ended
    3: ("pending", 3), 4: ("resolved", 3), 6: ("firing", 6), 8: ("firing", 6), 9: ("resolved", 6),
}  # fmt: skip


def alerts_at(step: int) -> list[Alert]:
    if step not in EPISODES:
        return []
    state, first = EPISODES[step]
    severity = "critical" if step == 8 else "warning"
    return [Alert("entropy_collapse", severity, state, step, first, 0.1, 1.0, 0.3, f"m{step} [/red] :smile:", "")]


class Scripted:
    def observe(self, step, scalars):
        return alerts_at(step)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    told = ""
    assert process.stdout is not None
    while text not in told:
        line = process.stdout.readline()
        assert line, f"ended before {text!r}: {told}"
        told += line
    return told


def test_demo_trains_both_arms_and_keeps_the_dashboard_up_until_ctrl_c(tmp_path, crowded_folder):
    command = [*RLVR, "demo", "--no-browser", "--store", str(tmp_path), "--steps", "2"]
    environment = os.environ | {"COLUMNS": "80"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=crowded_folder)
    try:
        url = read_until(process, "Dashboard: ").split("Dashboard: ")[1].split()[0]
        told = read_until(process, "until Ctrl-C")
        assert urllib.request.urlopen(f"{url}/_stcore/health", timeout=10).status == 200
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=2)
    for row in ("Entropy kept", "pass@1, held-out", "pass@4, held-out", "Distinct correct of 16", "Warnings"):
        assert row in told
    assert "entropy_budget against uniform, 1 pair: too few to tell" in " ".join(told.split())
    assert "First warning, uniform: none; entropy_budget: none." in " ".join(told.split())
    with open_store(tmp_path) as store:
        states = {state.name: state for state in store.runs()}
        assert {name: state.status for name, state in states.items()} == {
            "demo-uniform": "finished", "demo-entropy_budget": "finished"
        }  # fmt: skip
        first = store.sql("SELECT DISTINCT step, name, value FROM steps WHERE step < 2 AND name LIKE 'eval/%'").rows
        assert len({name for _, name, _ in first}) == len(first)  # both arms start from the same policy
    infos = [json.loads((tmp_path / "runs" / name / "run.json").read_text()) for name in states]
    assert {info["comparison"] for info in infos} == {"demo"} and {info["seed"] for info in infos} == {0}


def test_a_store_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "store").write_text("")
    command = [*RLVR, "demo", "--store", str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is a file, expected a folder" in done.stderr


def test_the_terminal_tells_firing_and_the_end_of_what_fired_once(tmp_path):
    with Recorder(tmp_path, "r", engine=Scripted()) as recorder:
        for step in range(1, 11):
            recorder.record(StepRecord(step, {"entropy": 1.0}))
    console, told = Console(file=io.StringIO(), width=200, emoji=False), set()
    tail = Tail(tmp_path)
    tail.poll()
    for _ in range(2):
        demo._tell_alerts(tail, ["r"], told, console)
    tail.close()
    assert console.file.getvalue().splitlines() == [
        "r: entropy_collapse firing at step 6. m6 [/red] :smile:",
        "r: entropy_collapse firing at step 8. m8 [/red] :smile:",
        "r: entropy_collapse resolved at step 9. m9 [/red] :smile:",
    ]
    console, fired = Console(file=io.StringIO(), width=200, emoji=False), set()
    for step in EPISODES:
        for alert in alerts_at(step):
            runs._print_alert(console, fired, alert)
    assert console.file.getvalue().count("[/red] :smile:") == 3  # text of an alert is no markup
    told_lines = console.file.getvalue().splitlines()
    assert [line.split()[0] for line in told_lines] == ["ALERT", "ALERT", "RESOLVED"] and "m4" not in str(told_lines)


def test_the_first_warning_is_the_first_of_a_rule_that_rose_to_a_warning(tmp_path):
    with Recorder(tmp_path, "r", engine=Scripted()) as recorder:
        for step in range(1, 11):
            recorder.record(StepRecord(step, {"entropy": 1.0}))
    tail = Tail(tmp_path)
    tail.poll()
    warnings = demo._warnings(alert_log(tail.cursor(), ["r"]), "r")
    tail.close()
    assert warnings == {("entropy_collapse", 6): 6}  # one episode; the pending one of step 3 never fired
    assert demo._first(warnings) == "entropy_collapse at step 6" and demo._first({}) == "none"
