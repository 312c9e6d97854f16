"""SIGKILL at any moment loses no acknowledged step, and every acknowledged step is complete in every table."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_data import N_SAMPLES, N_TOKENS

from monitor.store.check import check_store
from monitor.store.reader import open_store
from monitor.store.runs import get_run

ROUNDS = 4


def killed_run(store: Path, run: str, how: str, first: int, seconds: float) -> int:
    """The last step that the child saw acknowledged before it was killed."""
    script = Path(__file__).with_name("crash_child.py")
    child = subprocess.Popen(
        [sys.executable, str(script), str(store), run, how, str(first)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    told = child.stdout.readline()  # it has started for sure
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    lines = [told, *child.stdout.read().splitlines()]
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    return max(int(line) for line in lines if line.strip())


def assert_complete(store: Path, run: str, last: int) -> None:
    with open_store(store) as opened:
        for table, rows in (("steps", 5), ("tokens", N_TOKENS), ("samples", N_SAMPLES), ("histograms", 2)):
            counts = dict(opened.sql(f"SELECT step, count(*) FROM {table} WHERE run = ? GROUP BY step", [run]).rows)
            assert {step: counts.get(step) for step in range(1, last + 1)} == dict.fromkeys(range(1, last + 1), rows)
        missing = opened.sql("SELECT count(*) FROM tokens ANTI JOIN steps USING (run, step)").rows
        assert missing == [(0,)]  # what is shown is committed


def test_no_acknowledged_step_is_lost(tmp_path: Path) -> None:
    rng = random.Random(7)
    for attempt in range(ROUNDS):
        run = f"killed-{attempt}"
        last = killed_run(tmp_path, run, "new", 1, rng.uniform(0.0, 0.6))
        assert_complete(tmp_path, run, last)
        state = get_run(tmp_path, run)
        assert state.status == "crashed"
    found = check_store(tmp_path)
    assert not [finding for finding in found if finding.damage]
    assert sum(finding.kind == "crashed" for finding in found) == ROUNDS


@pytest.mark.parametrize("fsync", ["interval", "none"])
def test_without_an_fsync_for_each_step_a_kill_loses_nothing_either(tmp_path: Path, fsync: str) -> None:
    last = killed_run(tmp_path, "a", f"new {fsync}", 1, 0.3)
    assert last >= 1
    assert_complete(tmp_path, "a", last)
    assert not [finding for finding in check_store(tmp_path) if finding.damage]


def test_a_resumed_attempt_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    last = killed_run(tmp_path, "a", "new", 1, 0.3)
    again = killed_run(tmp_path, "a", "resume", max(1, last - 2), 0.2)
    assert_complete(tmp_path, "a", max(last, again))
    with open_store(tmp_path) as store:
        attempts = dict(store.sql("SELECT step, max(attempt) FROM steps GROUP BY step").rows)
        assert attempts[again] == 2
        assert store.sql("SELECT count(DISTINCT attempt) FROM steps_all WHERE step = ?", [last]).rows[0][0] >= 1
    assert get_run(tmp_path, "a").attempt == 2
