"""A disk that is full for real: a small tmpfs where mounting is allowed, else a file-size limit."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_data import samples, step_record, tokens

from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store.check import check_store
from monitor.store.reader import open_store
from monitor.store.runs import get_run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, or a skip where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True
    ).returncode == 0  # fmt: skip
    if not mounted:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """No file may grow past n_bytes in this process: writes fail with EFBIG (Python ignores SIGXFSZ)."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def wait_for(condition: object, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


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
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"x" * 4096)
    for step in range(2, 20):
        recorder.record(step_record(step), tokens(step), samples(step))
    wait_for(lambda: "Free some space" in caplog.text)
    for step in range(20, 40):
        recorder.record(step_record(step), tokens(step), samples(step))
    assert recorder.acknowledged == 1
    time.sleep(1.2)
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
        time.sleep(0.2)
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
    wait_for(lambda: recorder.acknowledged == 1)
    with file_size_limit(100):
        recorder.record(step_record(2))
        started = time.monotonic()
        recorder.close()
        assert time.monotonic() - started < 5
    assert "1 steps could not be written and are lost" in caplog.text
    with open_store(tmp_path) as store:
        assert store.sql("SELECT DISTINCT step FROM steps").rows == [(1,)]
