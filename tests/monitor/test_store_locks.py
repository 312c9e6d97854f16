"""One writer for each rank, whatever clocks, heartbeats and slow disks say; with real processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pytest
from disks import fill, wait_for
from store_data import record_run, step_record

from monitor.errors import StoreError
from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord
from monitor.store import runs, segments, writer
from monitor.store.check import check_store
from monitor.store.reader import open_store
from monitor.store.runs import get_run, rank_status, read_heartbeats, run_names, run_state


def opening(store: Path, how: str, run: str = "a") -> subprocess.Popen[str]:
    """A child that waits for the word to open the run."""
    script = Path(__file__).with_name("writer_child.py")
    command = [sys.executable, str(script), str(store), run, how]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert line(child) == "ready"
    return child


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def say_go(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


@contextmanager
def writing(store: Path, how: str = "new") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A live writer of run "a" in another process, and what it said; killed at the end."""
    child = opening(store, how)
    say_go(child)
    said = line(child)
    try:
        yield child, said
    finally:
        child.kill()
        child.communicate()


def make_old(store: Path, seconds: float, **fields: object) -> None:
    """Rewrite run a's newest heartbeat as if it was made some time ago."""
    path = sorted((store / "runs/a").glob("heartbeat-r000*.json"))[-1]
    beat = json.loads(path.read_text())
    moved = {key: beat[key] - seconds for key in ("ts", "started", "last_step_ts") if beat.get(key)}
    path.write_text(json.dumps(beat | moved | fields))


def test_a_writer_that_does_not_get_to_beat_is_no_crash_and_keeps_its_run(tmp_path: Path) -> None:
    with writing(tmp_path) as (child, said):
        assert said == "opened"
        child.send_signal(signal.SIGSTOP)  # as in a write that the disk does not end
        make_old(tmp_path, 40)
        assert get_run(tmp_path, "a").status == "running"
        make_old(tmp_path, 3600)
        assert get_run(tmp_path, "a").status == "stalled"
        with pytest.raises(StoreError, match=rf"process {child.pid} on .* is still writing it"):
            Recorder(tmp_path, RunInfo("a"), resume=True)
        with pytest.raises(StoreError, match=r"'a' \(rank 0\) already exists"):
            Recorder(tmp_path, RunInfo("a"))
        child.kill()
        child.wait()
        assert get_run(tmp_path, "a").status == "crashed"  # at once
    with Recorder(tmp_path, RunInfo("a"), resume=True) as recorder:
        recorder.record(step_record(2))
    assert get_run(tmp_path, "a").attempt == 2


def test_a_forked_child_that_lives_on_does_not_keep_the_run(tmp_path: Path) -> None:
    with writing(tmp_path, "fork") as (child, said):
        left = int(said.removeprefix("opened "))
        try:
            child.kill()
            child.wait()
            os.kill(left, 0)  # it lives, and lets go of the lock as soon as it first runs
            wait_for(lambda: get_run(tmp_path, "a").status == "crashed")
            Recorder(tmp_path, RunInfo("a"), resume=True).close()
        finally:
            os.kill(left, signal.SIGKILL)


def test_of_six_resumes_at_once_one_wins_and_attempts_are_not_shared(tmp_path: Path) -> None:
    record_run(tmp_path, steps=range(1, 3))
    for attempt in (2, 3):
        children = [opening(tmp_path, "resume") for _ in range(6)]
        for child in children:
            say_go(child)
        said = sorted(line(child) for child in children)
        assert said[0] == "opened" and all("is still writing it" in one for one in said[1:]), said
        for child in children:
            child.communicate("\n" if child.poll() is None else None)
        assert sorted(child.returncode for child in children) == [0, 3, 3, 3, 3, 3]
        assert get_run(tmp_path, "a").attempt == attempt
    marks = json.loads((tmp_path / "runs/a/run.json").read_text())["attempts"]
    assert [mark["attempt"] for mark in marks] == [1, 2, 3]
    names = [path.name for path in sorted((tmp_path / "runs/a").glob("heartbeat*"))]
    assert names == [f"heartbeat-r000-a00{attempt}.json" for attempt in (1, 2, 3)]


@pytest.mark.parametrize("off", [-20.0, 20.0])
def test_a_readers_clock_that_is_off_changes_no_status(tmp_path: Path, off: float) -> None:
    record_run(tmp_path, steps=range(1, 3))
    now = time.time() + off
    with Recorder(tmp_path, RunInfo("a"), resume=True) as recorder:
        recorder.record(step_record(3))
        recorder.flush()
        wait_for(lambda: get_run(tmp_path, "a").acknowledged == 3)
        assert run_state(tmp_path, "a", now).status == "running"  # type: ignore[union-attr]
        [beat] = read_heartbeats(tmp_path, "a")
        elsewhere = beat | {"host": "elsewhere", "alive": None}
        for idle, status in ((0.0, "running"), (45.0, "running"), (75.0, "stalled")):
            ts = beat["ts"] - 35  # a disk of 30 s in the way, and no lock to tell
            moved = elsewhere | {"ts": ts, "last_step_ts": ts - idle, "active_ts": None, "median_step_s": 1.0}
            assert rank_status(moved, now) == status
    assert run_state(tmp_path, "a", now).status == "finished"  # type: ignore[union-attr]


def test_another_machine_may_resume_once_the_heartbeat_is_old(tmp_path: Path) -> None:
    record_run(tmp_path, steps=range(1, 3))
    make_old(tmp_path, 30, status="running", host="elsewhere")
    assert get_run(tmp_path, "a").status == "running"
    with pytest.raises(StoreError, match="on elsewhere is still writing it"):
        Recorder(tmp_path, RunInfo("a"), resume=True)
    make_old(tmp_path, 60)
    assert get_run(tmp_path, "a").status == "crashed"
    Recorder(tmp_path, RunInfo("a"), resume=True).close()
    assert get_run(tmp_path, "a").attempt == 2


def test_runs_of_older_versions_go_on(tmp_path: Path) -> None:
    """They have one heartbeat for a rank, without attempt, counts or lock."""
    record_run(tmp_path, steps=range(1, 3))
    folder = tmp_path / "runs/a"
    beat = json.loads((folder / "heartbeat-r000-a001.json").read_text())
    for key in ("lock", "tables", "lost_steps", "dropped", "busy", "active_ts"):
        beat.pop(key, None)
    (folder / "heartbeat-r000-a001.json").unlink()
    (folder / "heartbeat-r000.json").write_text(json.dumps(beat))
    (folder / "rank-000.lock").unlink()
    assert get_run(tmp_path, "a").status == "finished" and check_store(tmp_path) == []
    old = folder / "heartbeat-r000.json"
    old.write_text(json.dumps(beat | {"status": "running", "ts": time.time(), "last_step_ts": time.time()}))
    assert get_run(tmp_path, "a").status == "running"  # its process, this one, lives
    old.write_text(json.dumps(beat | {"status": "running", "ts": time.time(), "pid": 2**22 + 1}))
    assert get_run(tmp_path, "a").status == "crashed"
    with Recorder(tmp_path, RunInfo("a"), resume=True) as recorder:
        recorder.record(step_record(3))
    assert (get_run(tmp_path, "a").attempt, get_run(tmp_path, "a").acknowledged) == (2, 3)
    assert old.exists()


def test_heartbeats_go_on_while_the_disk_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real, blocked = threading.Event(), os.fsync, threading.Event()

    def slow_fsync(fd: int) -> None:
        blocked.set()
        gate.wait(20)
        real(fd)

    recorder = Recorder(tmp_path, RunInfo("a"), flush_s=0.0)
    monkeypatch.setattr(segments.os, "fsync", slow_fsync)
    recorder.record(step_record(1))
    assert blocked.wait(10)
    [before] = read_heartbeats(tmp_path, "a")
    wait_for(lambda: read_heartbeats(tmp_path, "a")[0]["ts"] > before["ts"] + 1.5)
    assert (recorder.queue_depth, recorder.acknowledged) == (1, None)
    gate.set()
    recorder.close()
    assert get_run(tmp_path, "a").status == "finished"


def test_an_evaluation_longer_than_the_stall_limit_is_no_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "STALL_MIN_S", 2.0)
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0) as recorder:
        for step in range(1, 5):  # so that its pace is known
            recorder.record(step_record(step))
            time.sleep(0.05)
        recorder.flush()
        with recorder.busy("evaluation"):
            wait_for(lambda: get_run(tmp_path, "a").busy == "evaluation")
            time.sleep(2.2)
            for _ in range(2):
                before = read_heartbeats(tmp_path, "a")[0]["ts"]
                wait_for(lambda before=before: read_heartbeats(tmp_path, "a")[0]["ts"] > before)  # type: ignore[misc]
                state = get_run(tmp_path, "a")
                assert (state.status, state.busy) == ("running", "evaluation")
            with open_store(tmp_path) as store:
                assert store.sql("SELECT status, busy FROM runs").rows == [("running", "evaluation")]
        seen = [get_run(tmp_path, "a")]
        wait_for(lambda: seen.append(get_run(tmp_path, "a")) or seen[-1].busy is None)
        assert seen[-1].status == "running"  # the clock starts anew when it ends
        wait_for(lambda: get_run(tmp_path, "a").status == "stalled")
    assert get_run(tmp_path, "a").busy is None
    with recorder.busy("after the end"):  # never raises into training
        pass


def refuse(*_: object, **__: object) -> None:
    raise duckdb.IOException("no")


def no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("fault", ["ensure_catalog", "memory_connection", "reserve", "heartbeat", "run.json", "thread"])
def test_a_start_that_fails_leaves_the_name_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    record_run(tmp_path, "other", range(1, 2))
    with monkeypatch.context() as patch:
        if fault == "ensure_catalog":
            patch.setattr(writer, "ensure_catalog", refuse)
        elif fault == "memory_connection":
            patch.setattr(segments, "memory_connection", refuse)
        elif fault == "reserve":
            patch.setattr(os, "posix_fallocate", full)
        elif fault == "heartbeat":
            patch.setattr(writer.RunWriter, "heartbeat", full)
        elif fault == "run.json":
            patch.setattr(writer.RunWriter, "_write_run_json", full)
        else:
            patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(StoreError, match=r"Cannot (open|write|start)"):
            Recorder(tmp_path, RunInfo("a"))
        assert run_names(tmp_path) == ["other"]
        with pytest.raises(StoreError, match=r"Cannot (open|write|start)"):
            Recorder(tmp_path, RunInfo("other"), resume=True)
    other = get_run(tmp_path, "other")
    assert (other.status, other.attempt, len(other.info["attempts"])) == ("finished", 1, 1)
    record_run(tmp_path, "a", range(1, 3))
    with Recorder(tmp_path, RunInfo("other"), resume=True) as recorder:
        recorder.record(StepRecord(2, {"reward": 1.0}))
    assert get_run(tmp_path, "other").attempt == 2
    assert check_store(tmp_path) == []


def test_a_start_on_a_full_disk_leaves_the_name_free(small_disk: Path) -> None:
    store = small_disk / "store"
    record_run(store, "other", range(1, 2))
    ballast = fill(small_disk)
    with pytest.raises(StoreError, match=r"No space left.*Free some space"):
        Recorder(store, RunInfo("a"))
    assert run_names(store) == ["other"]
    ballast.unlink()
    record_run(store, "a", range(1, 2))
    assert get_run(store, "a").attempt == 1


def test_a_run_name_that_ends_in_a_newline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="Choose another run name"):
        Recorder(tmp_path, RunInfo("a\n"))
