"""A disk that is full for real: a small tmpfs where mounting is allowed, else a file-size limit."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from disks import fill, mounted, wait_for
from store_data import N_TOKENS, samples, step_record, tokens

from monitor.commands.store import main
from monitor.recorder import Recorder
from monitor.records import Alert, RunInfo
from monitor.store.check import check_store
from monitor.store.reader import open_store
from monitor.store.reserve import Room
from monitor.store.runs import get_run


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """No file may grow past n_bytes in this process: writes fail with EFBIG (Python ignores SIGXFSZ)."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def assert_recovered(store: Path, last: int) -> None:
    with open_store(store) as opened:
        rewards = opened.sql("SELECT count(*), count(DISTINCT step) FROM steps WHERE name = 'reward'").rows
        assert rewards == [(last, last)]  # none lost, none twice
        assert opened.sql("SELECT count(*) FROM histograms WHERE split = 'all'").rows == [(last,)]
        kinds = {kind for (kind,) in opened.sql("SELECT kind FROM events").rows}
        assert {"tokens_dropped", "tokens_gap", "disk_recovered"} <= kinds
        assert opened.sql("SELECT count(DISTINCT step) FROM tokens").rows[0][0] < last
    assert get_run(store, "a").status == "finished"
    assert not [finding for finding in check_store(store) if finding.damage or finding.kind == "leftover"]


def test_a_full_disk_costs_raw_tokens_only(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = small_disk / "store"
    recorder = Recorder(store, RunInfo("a"), flush_s=0.0)
    recorder.record(step_record(1), tokens(1), samples(1))
    wait_for(lambda: recorder.acknowledged == 1)
    ballast = fill(small_disk)
    for step in range(2, 20):
        recorder.record(step_record(step), tokens(step), samples(step))
    wait_for(lambda: "Free some space" in caplog.text)
    for step in range(20, 40):
        recorder.record(step_record(step), tokens(step), samples(step))
    assert recorder.flush(10) and recorder.acknowledged == 39  # scalars go into the reserve
    beat = get_run(store, "a").heartbeats[0]["ts"]
    wait_for(lambda: get_run(store, "a").heartbeats[0]["ts"] > beat)
    assert get_run(store, "a").acknowledged == 39
    assert get_run(store, "a").status == "running"  # the heartbeat goes on without space
    assert caplog.text.count("Free some space") == 1
    ballast.unlink()
    wait_for(lambda: recorder.acknowledged == 39)
    recorder.record(step_record(40), tokens(40), samples(40))
    recorder.close()
    assert_recovered(store, 40)


def test_a_file_size_limit_costs_raw_tokens_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    recorder = Recorder(tmp_path, RunInfo("a"), flush_s=0.0)
    recorder.record(step_record(1), tokens(1))
    wait_for(lambda: recorder.acknowledged == 1)
    with file_size_limit(100):
        for step in range(2, 10):
            recorder.record(step_record(step), tokens(step))
        wait_for(lambda: "Free some space" in caplog.text)
    wait_for(lambda: recorder.acknowledged == 9)
    recorder.record(step_record(10), tokens(10))
    recorder.close()
    assert_recovered(tmp_path, 10)


def test_closing_on_a_disk_that_stays_full_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("monitor.store.pipeline._LAST_TRIES_S", 0.3)
    recorder = Recorder(tmp_path, RunInfo("a"), flush_s=0.0)
    recorder.record(step_record(1))
    wait_for(lambda: get_run(tmp_path, "a").acknowledged == 1)
    with file_size_limit(100):
        recorder.record(step_record(2))
        recorder.close()
    assert "1 steps could not be written and are lost" in caplog.text
    assert recorder.lost_steps == 1
    state = get_run(tmp_path, "a")  # not even the heartbeat could be renewed: the old one is still whole
    assert (state.status, state.acknowledged, len(state.heartbeats)) == ("crashed", 1, 1)
    assert not [finding for finding in check_store(tmp_path) if finding.damage]
    with open_store(tmp_path) as store:
        assert store.sql("SELECT DISTINCT step FROM steps").rows == [(1,)]


class Alarmed:
    """An engine that fires in every hundredth step."""

    def observe(self, step: int, scalars: Mapping[str, float]) -> list[Alert]:
        fires = step % 100 == 0
        return [Alert("entropy_collapse", "critical", "firing", step, step, 0.1, 1.0, 0.5, "low", "")] if fires else []


def test_steps_that_a_full_disk_never_took_are_counted_and_found(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitor.store.pipeline._LAST_TRIES_S", 0.3)
    store = small_disk / "store"
    with Recorder(store, RunInfo("a"), flush_s=0.0) as recorder:
        recorder.record(step_record(1), tokens(1), samples(1))
        assert recorder.flush(10)
        recorder._pipe._writer.reserve.remove()  # someone has cleared up
        fill(small_disk)
        for step in range(2, 9):
            recorder.record(step_record(step), tokens(step), samples(step))
        assert not recorder.flush(1.0)
    assert (recorder.lost_steps, recorder.acknowledged) == (7, 1)
    state = get_run(store, "a")
    assert (state.status, state.acknowledged, state.lost_steps) == ("failed", 1, 7)
    [finding] = [finding for finding in check_store(store) if finding.damage]
    assert finding.kind == "lost_steps" and "7 steps were given up (attempt 1, rank 0)" in finding.message
    assert "No space left" in finding.message
    assert main(["check", str(store)]) == 1


def test_a_disk_that_stays_full_keeps_thousands_of_steps_and_all_alerts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the reserve: an eighth of 8 MB here, 4 MB on a disk of usual size."""
    with mounted(tmp_path / "disk", 8) as disk:
        stays_full(disk, monkeypatch)


def stays_full(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitor.store.pipeline._LAST_TRIES_S", 0.3)
    store, last = small_disk / "store", 3000
    recorder = Recorder(store, RunInfo("a"), engine=Alarmed(), flush_s=0.0)
    recorder.record(step_record(1), tokens(1), samples(1))
    assert recorder.flush(10)
    fill(small_disk)
    made = step_record(1)
    for step in range(2, last + 1):
        recorder.record(replace(made, step=step), tokens(1), samples(1))
        if step % 100 == 0:
            wait_for(lambda step=step: (recorder.acknowledged or 0) >= step - 100)  # type: ignore[misc]
            fill(small_disk)  # whatever was given back and not used at once is gone
    recorder.close()
    assert (recorder.lost_steps, recorder.acknowledged) == (0, last)
    state = get_run(store, "a")
    assert (state.status, state.acknowledged, state.lost_steps) == ("finished", last, 0)
    with open_store(store) as opened:
        assert opened.sql("SELECT count(*), count(DISTINCT step) FROM steps WHERE name = 'reward'").rows == [
            (last, last)
        ]
        assert opened.sql("SELECT count(*) FROM alerts").rows == [(last // 100,)]
        events = dict(opened.sql("SELECT kind, message FROM events").rows)
        kept = opened.sql("SELECT count(DISTINCT step) FROM histograms").rows[0][0]
    assert events["tokens_gap"] == f"Tokens of steps 2 to {last} were not recorded ({(last - 1) * N_TOKENS} rows)."
    found = {finding.message.split(" rows")[0]: finding for finding in check_store(store)}
    assert not any(finding.damage for finding in found.values())
    dropped = state.heartbeats[0]["dropped"]
    assert dropped == {"tokens": (last - 1) * N_TOKENS, "samples": last - 1, "histograms": last - kept, "steps": 0}
    assert len([finding for finding in found.values() if finding.kind == "gap"]) == 3


def test_a_nearly_full_disk_does_not_flap(small_disk: Path) -> None:
    """Room for a step with tokens now and then, but not clearly: tokens stay away until there is."""
    store = small_disk / "store"
    recorder = Recorder(store, RunInfo("a"), flush_s=0.0)
    recorder.record(step_record(1), tokens(1), samples(1))
    assert recorder.flush(10)
    ballast = fill(small_disk)
    for step in range(2, 42):
        recorder.record(step_record(step), tokens(step), samples(step))
        if step % 4 == 0:
            assert recorder.flush(10)
            os.truncate(ballast, ballast.stat().st_size - 8192)  # someone frees a little, again and again
    ballast.unlink()
    wait_for(lambda: not recorder._pipe.disk_full)
    recorder.record(step_record(42), tokens(42), samples(42))
    recorder.close()
    assert_recovered(store, 42)
    with open_store(store) as opened:
        kinds = dict(opened.sql("SELECT kind, count(*) FROM events GROUP BY kind").rows)
        assert opened.sql("SELECT DISTINCT step FROM tokens ORDER BY step").rows == [(1,), (42,)]
    assert kinds == {"attempt": 1} | dict.fromkeys(
        ("tokens_dropped", "tokens_gap", "samples_dropped", "samples_gap", "disk_recovered"), 1
    )


def test_refusals_that_come_back_soon_keep_tokens_away_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota: the system calls the disk free, and refuses."""
    now = 0.0
    monkeypatch.setattr("monitor.store.reserve.time.monotonic", lambda: now)
    room = Room(tmp_path)
    waits = []
    for _ in range(5):
        room.refuse(OSError("quota"))
        begin = now
        while not room.clear():
            now += 0.25
        waits.append(now - begin)
        room.back()
        room.wrote(1000)
    assert waits == [1, 2, 4, 8, 16]
    for _ in range(8):  # all is well for a while
        room.wrote(1000)
    room.refuse(OSError("quota"))
    now += 1
    assert room.clear()
