"""A step is acknowledged when its rows in `steps` are on disk, and at no other time, whatever the database throws."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from disks import wait_for
from store_data import N_SAMPLES, N_TOKENS, samples, step_record, tokens

from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord
from monitor.store import pipeline, rows, segments
from monitor.store.check import check_store
from monitor.store.reader import open_store
from monitor.store.runs import get_run

ROWS = {"steps": 5, "tokens": N_TOKENS, "samples": N_SAMPLES, "histograms": 2}


def stored(store: Path, table: str) -> dict[int, int]:
    """Rows of each step of run a."""
    with open_store(store) as opened:
        return dict(opened.sql(f"SELECT step, count(*) FROM {table} WHERE run = 'a' GROUP BY step").rows)


def record(recorder: Recorder, step: int) -> None:
    recorder.record(step_record(step), tokens(step), samples(step))


def breaking(monkeypatch: pytest.MonkeyPatch, breaks: Callable[[str, int], bool]) -> None:
    """The database dies, for good, in the n-th write of a table where breaks(table, n)."""
    real, calls = segments.write_segment, Counter[str]()

    def write(con: duckdb.DuckDBPyConnection, store: Path, run: str, table: str, *rest: Any, **more: Any) -> Path:
        calls[table] += 1
        if breaks(table, calls[table]):
            con.close()
            raise duckdb.FatalException("FATAL Error: the database has been invalidated")
        return real(con, store, run, table, *rest, **more)

    monkeypatch.setattr(segments, "write_segment", write)


@pytest.mark.parametrize("table", [*ROWS, "events"])
def test_a_database_that_dies_is_replaced_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    breaking(monkeypatch, lambda written, n: written == table and n == 1)
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0) as recorder:
        for step in range(1, 6):
            record(recorder, step)
            assert recorder.flush(10)
            assert recorder.acknowledged == step and set(stored(tmp_path, "steps")) == set(range(1, step + 1))
    for name, n_rows in ROWS.items():
        assert stored(tmp_path, name) == dict.fromkeys(range(1, 6), n_rows)
    with open_store(tmp_path) as store:
        [(message,)] = store.sql("SELECT message FROM events WHERE kind = 'connection_replaced'").rows
    assert "has been invalidated" in message
    assert get_run(tmp_path, "a").status == "finished" and check_store(tmp_path) == []


def test_steps_wait_for_a_database_that_dies_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = threading.Event()
    breaking(monkeypatch, lambda table, n: table == "steps" and broken.is_set())
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0) as recorder:
        record(recorder, 1)
        assert recorder.flush(10)
        broken.set()
        for step in (2, 3):
            record(recorder, step)
        assert not recorder.flush(1.0)
        assert (recorder.acknowledged, recorder.queue_depth, recorder.lost_steps) == (1, 2, 0)
        assert set(stored(tmp_path, "steps")) == {1}
        broken.clear()
        assert recorder.flush(10)
        assert (recorder.acknowledged, recorder.queue_depth) == (3, 0)
    for name, n_rows in ROWS.items():
        assert stored(tmp_path, name) == dict.fromkeys((1, 2, 3), n_rows)


def test_steps_that_never_reach_the_disk_are_counted_and_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_LAST_TRIES_S", 0.2)
    breaking(monkeypatch, lambda table, n: table == "steps" and n > 1)
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0) as recorder:
        record(recorder, 1)
        assert recorder.flush(10)
        for step in (2, 3, 4):
            record(recorder, step)
    assert (recorder.acknowledged, recorder.queue_depth, recorder.lost_steps) == (1, 0, 3)
    assert not recorder.flush(0.1)
    assert set(stored(tmp_path, "steps")) == {1}
    state = get_run(tmp_path, "a")
    assert (state.status, state.acknowledged, state.lost_steps) == ("failed", 1, 3)
    with open_store(tmp_path) as store:
        kinds = dict(store.sql("SELECT kind, message FROM events").rows)
        assert store.sql("SELECT lost_steps FROM runs").rows == [(3,)]
    assert kinds["steps_gap"] == "Steps of steps 2 to 4 were not recorded."
    [finding] = [finding for finding in check_store(tmp_path) if finding.damage]
    assert finding.kind == "lost_steps" and "3 steps" in finding.message


def test_a_table_that_cannot_be_written_is_a_gap_and_holds_up_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, lambda table, n: table == "tokens")
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0) as recorder:
        for step in (1, 2):
            record(recorder, step)
            assert recorder.flush(10)
    assert stored(tmp_path, "steps") == {1: 5, 2: 5} and stored(tmp_path, "tokens") == {}
    assert get_run(tmp_path, "a").tokens_dropped == 2 * N_TOKENS
    [finding] = check_store(tmp_path)
    assert (finding.kind, finding.damage) == ("gap", False) and f"{2 * N_TOKENS} tokens rows" in finding.message


def test_a_step_without_rows_is_given_up_and_not_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rows.step_rows

    def step_rows(steps: Any) -> Any:
        if any(step == 2 for step, _, _ in steps):
            raise OverflowError("does not fit")
        return real(steps)

    monkeypatch.setattr(rows, "step_rows", step_rows)
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0) as recorder:
        for step in (1, 2):
            record(recorder, step)
        recorder.flush(10)
        assert (recorder.acknowledged, recorder.queue_depth, recorder.lost_steps) == (1, 0, 1)
        recorder.record(StepRecord(2**63, {"reward": 1.0}))
        recorder.record(StepRecord(3, {"reward": 1.0}))
        recorder.flush(10)
        assert recorder.acknowledged == 3
    assert set(stored(tmp_path, "steps")) == {1, 3} and set(stored(tmp_path, "tokens")) == {1}
    with open_store(tmp_path) as store:
        kinds = dict(store.sql("SELECT kind, message FROM events").rows)
    assert "below 2^63" in kinds["step_order"] and "does not fit" in kinds["bad_steps"]
    assert get_run(tmp_path, "a").status == "failed"


def test_steps_whose_batch_cannot_be_made_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room for rows")

    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0) as recorder:
        record(recorder, 1)
        assert recorder.flush(10)
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "batch_of", fail)
            record(recorder, 2)
            wait_for(lambda: recorder.lost_steps == 1)
            assert (recorder.acknowledged, recorder.queue_depth) == (1, 0)
        record(recorder, 3)
        assert not recorder.flush(10)
        assert recorder.acknowledged == 3
    assert set(stored(tmp_path, "steps")) == {1, 3}
    assert get_run(tmp_path, "a").status == "failed"


def test_a_recorder_that_nobody_closes_loses_nothing_at_the_end_of_the_process(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom monitor.recorder import Recorder\nfrom monitor.records import StepRecord\n"
        "recorder = Recorder(sys.argv[1], 'a', flush_s=10.0)\nrecorder.record(StepRecord(1, {'reward': 1.0}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert stored(tmp_path, "steps") == {1: 2} and get_run(tmp_path, "a").status == "stopped"
    with open_store(tmp_path) as store:
        assert store.sql("SELECT kind FROM events").rows == [("attempt",)]


class SlowlyCleared(deque[Any]):
    """A queue that is emptied a while before its thread gets to anything else."""

    def clear(self) -> None:
        super().clear()
        time.sleep(0.1)


def test_what_waits_is_right_at_every_instant(tmp_path: Path) -> None:
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0) as recorder:
        recorder._pipe._items = SlowlyCleared()
        for step in range(1, 6):
            record(recorder, step)
            while (depth := recorder.queue_depth) == 1:
                time.sleep(0.0002)
            assert depth == 0 and recorder.acknowledged == step


def test_flush_waits_without_a_busy_loop_and_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), segments.write_segment
    monkeypatch.setattr(segments, "write_segment", lambda *args, **more: gate.wait(20) and real(*args, **more))
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0) as recorder:
        record(recorder, 1)
        started = time.monotonic()
        assert not recorder.flush(0.3)
        assert time.monotonic() - started > 0.25
        threading.Timer(0.2, gate.set).start()
        assert recorder.flush(10)
        wait_for(lambda: get_run(tmp_path, "a").acknowledged == 1)
