"""`rlvr watch` over real stores: whom it judges, what it delivers once, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from receivers import WebReceiver, wait_for
from watched_child import entropies

from monitor.alerts.engine import AlertEngine
from monitor.alerts.outbox import NAME
from monitor.alerts.watch import Watcher
from monitor.cli import main
from monitor.recorder import Recorder
from monitor.records import StepRecord
from monitor.store.check import check_store

HERE = Path(__file__).parent


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebReceiver]:
    pytest.importorskip("apprise")
    receiver = WebReceiver()
    monkeypatch.setenv("ALERTS_URL", receiver.address())
    yield receiver
    receiver.close()


@pytest.fixture
def alerts_file(tmp_path: Path) -> Path:
    path = tmp_path / "alerts.toml"
    path.write_text('[[routes]]\nurl_env = "ALERTS_URL"\n')
    return path


def record(store: Path, run: str = "a", *, engine: AlertEngine | None = None, status: str = "finished") -> None:
    with Recorder(store, run, engine=engine, flush_s=0.0) as recorder:
        for step, value in enumerate(entropies()):
            recorder.record(StepRecord(step, {"entropy": value, "reward": 0.5}))
        recorder.close(status)


def told(watcher: Watcher) -> list[tuple[str, str, str, int]]:
    found = watcher.poll()
    return [(c.run, c.alert.rule, c.alert.state, c.alert.step) for c in found if c.alert.state != "pending"]


def test_a_run_without_an_engine_is_judged_and_one_with_it_taken_as_it_is(tmp_path: Path) -> None:
    """Both see the same rows, so both have the same alerts; of the judged run none is raised twice."""
    record(tmp_path, "judged", engine=AlertEngine())
    record(tmp_path, "theirs")
    watcher = Watcher(tmp_path)
    found = told(watcher)
    by_run = {run: [one[1:] for one in found if one[0] == run] for run in ("judged", "theirs")}
    assert by_run["judged"] == by_run["theirs"] and by_run["judged"][0][:2] == ("entropy_collapse", "firing")
    assert told(watcher) == []
    says = watcher.verdict("theirs")
    assert says is not None and "Entropy is collapsing since step " in says and says == watcher.verdict("judged")
    watcher.close()


def test_a_judged_run_without_alerts_is_left_alone(tmp_path: Path) -> None:
    record(tmp_path, "quiet", engine=AlertEngine([]))
    watcher = Watcher(tmp_path)
    assert told(watcher) == []
    watcher.close()


def test_a_live_run_is_judged_step_by_step_like_a_finished_one(tmp_path: Path) -> None:
    engine = AlertEngine()
    rows = [{"entropy": value, "reward": 0.5} for value in entropies()]
    expected = [one for step, row in enumerate(rows) for one in engine.observe(step, row)]
    watcher, found = Watcher(tmp_path), []
    with Recorder(tmp_path, "a", flush_s=0.0) as recorder:
        for step, row in enumerate(rows):
            recorder.record(StepRecord(step, row))
            if step % 4 == 0:
                recorder.flush()
                found += watcher.poll()
    found += watcher.poll()
    assert [change.alert for change in found] == expected
    watcher.close()


def test_a_run_that_fails_and_comes_back(tmp_path: Path) -> None:
    with Recorder(tmp_path, "a", flush_s=0.0) as recorder:
        watcher = Watcher(tmp_path)
        recorder.record(StepRecord(7, {"reward": 0.5}))
        recorder.flush()
        assert told(watcher) == []
        recorder.close("failed")
    assert told(watcher) == [("a", "crashed", "firing", 7)]
    assert told(watcher) == []
    with Recorder(tmp_path, "a", flush_s=0.0, resume=True):
        assert told(watcher) == [("a", "crashed", "resolved", 7)]
    watcher.close()


def start(store: Path, alerts: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "monitor.cli", "watch", str(store), "--alerts", str(alerts), "--poll-s", "0.05"]
    env = os.environ | {"COLUMNS": "200"}
    return subprocess.Popen(
        [*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=HERE.parent.parent
    )


def collected(process: subprocess.Popen[str]) -> list[str]:
    """Lines of a process' output, filled as they come."""
    lines: list[str] = []

    def collect() -> None:
        assert process.stdout is not None
        with process.stdout as out:
            lines.extend(out)

    threading.Thread(target=collect, daemon=True).start()
    return lines


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stderr, process.stdout):
        if pipe is not None and not (pipe is process.stdout and process.stdin is None):  # that one its thread closes
            pipe.close()


def test_a_real_watch_over_a_store_that_another_process_writes(
    tmp_path: Path, web: WebReceiver, alerts_file: Path
) -> None:
    """A collapse is told once; a kill of the watch repeats nothing; the kill of the trainer is told."""
    store = tmp_path / "store"
    child = subprocess.Popen(
        [sys.executable, str(HERE / "watched_child.py"), str(store)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None

    def go_on() -> None:
        child.stdin.write("\n")  # type: ignore[union-attr]
        child.stdin.flush()  # type: ignore[union-attr]
        child.stdout.readline()  # type: ignore[union-attr]

    go_on()
    watch = start(store, alerts_file)
    lines = collected(watch)
    try:
        wait_for(lambda: any(line.startswith("1 runs: 1 running; 0 alerts fire.") for line in lines))
        go_on()
        wait_for(lambda: web.got)
        assert web.titles[0].startswith("CRITICAL: entropy_collapse in run theirs at step")
        wait_for(lambda: any("theirs: entropy_collapse at step" in line for line in lines))
        wait_for(lambda: '"sent"' in (store / NAME).read_text())  # killed before, it would deliver it again
        watch.kill()
        end(watch)
        watch = start(store, alerts_file)
        lines = collected(watch)
        wait_for(lambda: any("1 alerts fire." in line for line in lines))
        child.kill()
        child.wait()
        wait_for(lambda: len(web.got) == 2)
        assert web.titles[1].startswith("CRITICAL: crashed in run theirs at step 39")
        watch.send_signal(signal.SIGTERM)
        assert watch.wait(60) == 0
        assert watch.stderr is not None and watch.stderr.read() == ""
    finally:
        end(child)
        end(watch)
    assert len(web.got) == 2
    assert not any(finding.damage for finding in check_store(store))


def test_what_ended_before_the_first_look_is_not_announced(
    tmp_path: Path, web: WebReceiver, alerts_file: Path, capsys: Any
) -> None:
    store = tmp_path / "store"
    record(store)
    assert main(["watch", str(store), "--once", "--alerts", str(alerts_file)]) == 1
    assert web.asked == 0
    assert "1 runs: 1 finished; 1 alerts fire." in capsys.readouterr().out


def test_once_exits_with_1_until_it_is_acknowledged(tmp_path: Path, capsys: Any) -> None:
    store = tmp_path / "store"
    record(store, "fine", engine=AlertEngine([]))
    assert main(["watch", str(store), "--once"]) == 0
    record(store, "theirs")
    record(store, "judged", engine=AlertEngine())
    before = sorted(path for path in store.rglob("*") if path.name != "store.duckdb")
    assert main(["watch", str(store), "--once"]) == 1
    assert sorted(path for path in store.rglob("*") if path.name != "store.duckdb") == before  # nothing is written
    assert main(["alerts", "ack", "theirs", "entropy_collapse", "--store", str(store)]) == 0
    assert main(["watch", str(store), "--once"]) == 1
    assert main(["alerts", "mute", "judged", "entropy_collapse", "--store", str(store)]) == 0
    assert main(["watch", str(store), "--once"]) == 0
    out = capsys.readouterr().out
    assert "CRITICAL judged: entropy_collapse at step" in out
    assert "theirs: critical: Entropy is collapsing since step " in out


def test_wrong_use(tmp_path: Path, capsys: Any) -> None:
    assert main(["watch", str(tmp_path / "none")]) == 2
    record(tmp_path, "a")
    assert main(["watch", str(tmp_path), "--poll-s", "0"]) == 2
    assert main(["watch", str(tmp_path), "--alerts", str(tmp_path / "none.toml")]) == 2
    err = capsys.readouterr().err
    for text in ("No store at", "--poll-s is 0.0, expected more than 0", "Cannot read the alerts file"):
        assert text in err


def test_it_needs_no_torch(tmp_path: Path) -> None:
    record(tmp_path, "a", engine=AlertEngine([]))
    code = f"import sys; from monitor.cli import main; code = main(['watch', {str(tmp_path)!r}, '--once']); "
    code += "sys.exit(code or 3 * bool({'torch', 'apprise', 'streamlit'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
