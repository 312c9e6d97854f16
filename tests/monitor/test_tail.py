"""The tail follows a live store: new segments, new attempts, new generations, damaged and vanishing files."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_data import samples, step_record, tokens

from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord
from monitor.store.compact import compact_run
from monitor.store.listing import Segment
from monitor.store.schema import TABLES, table_dir
from monitor.store.tail import RunEntry, Tail


def record(store: Path, run: str, steps: range, *, value: float = 0.0, resume: bool = False) -> None:
    with Recorder(store, RunInfo(name=run), resume=resume, flush_s=0.0) as recorder:
        for step in steps:
            recorder.record(StepRecord(step, {"reward": value + step}))


def poll(tail: Tail) -> int:
    tail._polled = float("-inf")  # let each poll of a test through
    return tail.poll()


def rewards(tail: Tail, run: str = "a") -> dict[int, float]:
    rows = tail.cursor().execute("SELECT step, value FROM steps WHERE run = ? AND name = 'reward'", [run]).fetchall()
    return dict(rows)


def segments(store: Path, table: str = "steps", run: str = "a") -> list[Path]:
    return sorted(table_dir(store, run, table).glob("*.parquet"))


def test_a_missing_store_is_empty_and_fills_later(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "later")
    assert poll(tail) == 0 and not tail.runs
    record(tmp_path / "later", "a", range(3))
    assert poll(tail) > 0
    assert rewards(tail) == {0: 0.0, 1: 1.0, 2: 2.0}


def test_version_moves_only_with_the_data(tmp_path: Path) -> None:
    record(tmp_path, "a", range(3))
    tail = Tail(tmp_path)
    first = poll(tail)
    assert [poll(tail) for _ in range(3)] == [first] * 3
    before = tail.run_version("a", "b")
    record(tmp_path, "b", range(2))
    assert poll(tail) > first
    assert tail.run_version("a") == before[:1] and tail.run_version("b") > (-1,)


def test_a_live_run_is_followed_step_by_step(tmp_path: Path) -> None:
    tail = Tail(tmp_path)
    with Recorder(tmp_path, RunInfo(name="a"), flush_s=0.0) as recorder:
        for step in range(4):
            recorder.record(StepRecord(step, {"reward": float(step)}))
            deadline = time.monotonic() + 10
            while recorder.acknowledged != step and time.monotonic() < deadline:
                time.sleep(0.005)
            poll(tail)
            assert rewards(tail) == {s: float(s) for s in range(step + 1)}
        assert tail.runs["a"].status == "running"
    poll(tail)
    assert tail.runs["a"].status == "finished"


def test_one_line_of_history_is_shown(tmp_path: Path) -> None:
    record(tmp_path, "a", range(6))
    tail = Tail(tmp_path)
    poll(tail)
    record(tmp_path, "a", range(3, 5), value=100.0, resume=True)
    poll(tail)
    assert rewards(tail) == {0: 0.0, 1: 1.0, 2: 2.0, 3: 103.0, 4: 104.0}  # step 5 is of a branch that was left


def test_a_new_generation_replaces_the_rows_of_its_run(tmp_path: Path) -> None:
    record(tmp_path, "a", range(4))
    record(tmp_path, "b", range(2))
    tail = Tail(tmp_path)
    poll(tail)
    run = tmp_path / "runs" / "a"
    shutil.copytree(run / "data.g0", run / "data.g1")
    for table in TABLES:
        (run / f"data.g1/{table}/g0").rename(run / f"data.g1/{table}/g1")
    os.symlink("data.g1", run / "data.new")
    os.rename(run / "data.new", run / "data")
    shutil.rmtree(run / "data.g0")
    version = tail.version
    assert poll(tail) > version
    assert rewards(tail) == {s: float(s) for s in range(4)}
    assert rewards(tail, "b") == {0: 0.0, 1: 1.0}


@pytest.mark.parametrize("damage", ["torn", "empty", "renamed"])
def test_an_unreadable_segment_is_left_out_and_counted(tmp_path: Path, damage: str) -> None:
    for steps in (range(2), range(2, 4), range(4, 6)):
        record(tmp_path, "a", steps, resume=steps.start > 0)
    broken = segments(tmp_path)[1]
    if damage == "renamed":
        broken.rename(broken.with_name(broken.name + ".quarantined"))
    else:
        broken.write_bytes(broken.read_bytes()[:60] if damage == "torn" else b"")
    tail = Tail(tmp_path)
    version = poll(tail)
    assert set(rewards(tail)) == {0, 1, 4, 5}
    assert tail.quarantined() == {"a": [f"steps/{broken.name}"]}
    assert poll(tail) == version, "a damaged file must not be news again and again"


def test_a_file_that_vanishes_while_it_is_read_is_looked_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, "a", range(2))
    path, away = segments(tmp_path)[0], tmp_path / "away"
    tail = Tail(tmp_path)
    stage = tail._stage

    def vanish(entry: RunEntry, table: str, listed: list[Segment]) -> bool:
        if table == "steps" and path.exists():
            path.rename(away)
        return stage(entry, table, listed)

    monkeypatch.setattr(tail, "_stage", vanish)
    poll(tail)
    assert rewards(tail) == {} and not tail.quarantined()
    monkeypatch.undo()
    away.rename(path)
    poll(tail)
    assert rewards(tail) == {0: 0.0, 1: 1.0}


def test_a_deleted_run_is_forgotten(tmp_path: Path) -> None:
    record(tmp_path, "a", range(2))
    tail = Tail(tmp_path)
    version = poll(tail)
    shutil.rmtree(tmp_path / "runs" / "a")
    assert poll(tail) > version
    assert rewards(tail) == {} and not tail.runs


def test_a_process_that_died_without_a_word_crashed(tmp_path: Path) -> None:
    record(tmp_path, "a", range(2))
    tail = Tail(tmp_path)
    poll(tail)
    path = next((tmp_path / "runs" / "a").glob("heartbeat-r*.json"))
    beat = json.loads(path.read_text()) | {"status": "running", "ts": time.time() - 60, "host": "elsewhere"}
    path.write_text(json.dumps(beat))
    version = tail.version
    assert poll(tail) > version
    assert tail.runs["a"].status == "crashed"


def test_an_ended_run_that_is_resumed_runs_again(tmp_path: Path) -> None:
    record(tmp_path, "a", range(3))
    tail = Tail(tmp_path)
    for _ in range(3):
        poll(tail)
        assert tail.runs["a"].status == "finished"
        time.sleep(0.06)  # beyond the grain of an mtime
    with Recorder(tmp_path, RunInfo(name="a"), resume=True, flush_s=0.0) as recorder:
        poll(tail)
        assert tail.runs["a"].status == "running"
        recorder.record(StepRecord(2, {"reward": 9.0}))
        recorder.flush()
        poll(tail)
        assert rewards(tail) == {0: 0.0, 1: 1.0, 2: 9.0}
        recorder.record(StepRecord(3, {"reward": 8.0}))
        recorder.flush()
        poll(tail)
        assert rewards(tail) == {0: 0.0, 1: 1.0, 2: 9.0, 3: 8.0}
    poll(tail)
    assert tail.runs["a"].status == "finished"


@pytest.mark.parametrize("damaged", [False, True])
def test_many_runs_at_once_are_taken_in_like_single_ones(tmp_path: Path, damaged: bool) -> None:
    for number in range(12):
        record(tmp_path, f"run-{number}", range(3), value=10.0 * number)
    record(tmp_path, "run-3", range(2, 4), value=100.0, resume=True)
    expected = {f"run-{number}": {step: 10.0 * number + step for step in range(3)} for number in range(12)}
    expected["run-3"] = {0: 30.0, 1: 31.0, 2: 102.0, 3: 103.0}
    if damaged:
        for segment in segments(tmp_path, run="run-5"):
            segment.write_bytes(b"torn")
        expected["run-5"] = {}
    tail = Tail(tmp_path)
    version = poll(tail)
    assert {name: rewards(tail, name) for name in tail.runs} == expected
    assert poll(tail) == version and bool(tail.quarantined()) == damaged


def test_uncommitted_histograms_stay_hidden(tmp_path: Path) -> None:
    """Histograms are written before their steps: without the commit mark they are not shown."""
    from store_data import histogram

    with Recorder(tmp_path, RunInfo(name="a"), flush_s=0.0) as recorder:
        recorder.record(StepRecord(1, {"reward": 1.0}, (histogram(np.ones(4)),)))
    segments(tmp_path)[0].unlink()
    tail = Tail(tmp_path)
    poll(tail)
    assert tail.cursor().execute("SELECT count(*) FROM histograms_all").fetchone() == (1,)
    assert tail.cursor().execute("SELECT count(*) FROM histograms").fetchone() == (0,)


def test_threads_poll_and_query_side_by_side(tmp_path: Path) -> None:
    tail, failures = Tail(tmp_path, min_interval_s=0.0), []
    stop = threading.Event()

    def look() -> None:
        try:
            while not stop.is_set():
                tail.poll()
                got = rewards(tail)
                assert got == {step: float(step) for step in range(len(got))}
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    with Recorder(tmp_path, RunInfo(name="a"), flush_s=0.0) as recorder:
        for step in range(60):
            recorder.record(StepRecord(step, {"reward": float(step)}))
            time.sleep(0.005)
    stop.set()
    for thread in threads:
        thread.join()
    poll(tail)
    assert not failures
    assert len(rewards(tail)) == 60


def test_only_the_histograms_that_were_asked_for_are_taken_in(tmp_path):
    """What is asked for late is there at once, follows the run, and is what a tail of everything has."""

    def with_others(step: int) -> StepRecord:
        record = step_record(step)
        others = [replace(one, metric=metric) for one in record.histograms for metric in ("renyi2", "deviation")]
        return replace(record, histograms=(*record.histograms, *others))

    for name in ("a", "b"):
        with Recorder(tmp_path, RunInfo(name), flush_s=0.0) as recorder:
            for step in range(1, 4):
                recorder.record(with_others(step), tokens(step), samples(step))
    tail, whole = Tail(tmp_path, 0.0, histograms=False), Tail(tmp_path, 0.0)

    def count(of: Tail, *wanted: tuple[str, str]) -> list[tuple]:
        """All rows that it has; with `wanted`, those of these runs and metrics."""
        sql = "SELECT run, step, metric, split, counts FROM histograms ORDER BY ALL"
        rows = of.cursor().execute(sql).fetchall()
        return [row for row in rows if not wanted or (row[0], row[2]) in wanted]

    poll(tail)
    poll(whole)
    first, *others = sorted({row[2] for row in count(whole)})
    assert len(others) == 2 and count(tail) == [] and rewards(tail) == rewards(whole) != {}
    tail.want_histograms("b", first)
    assert count(tail) == count(whole, ("b", first)) != []
    version = poll(tail)
    with Recorder(tmp_path, RunInfo("b"), resume=True, flush_s=0.0) as recorder:
        recorder.record(with_others(4), tokens(4), samples(4))
    assert poll(tail) > version
    poll(whole)
    assert count(tail) == count(whole, ("b", first)) and 4 in {row[1] for row in count(tail)}
    tail.want_histograms("b", others[0])  # of the segments that it has read for the first one
    tail.want_histograms("b", others[0])
    assert count(tail) == count(whole, ("b", first), ("b", others[0]))
    compact_run(tmp_path, "b", grace_s=0.0)
    poll(tail)
    assert count(tail) == count(whole, ("b", first), ("b", others[0])) and tail.runs["b"].basis == 0
    for name in ("a", "b", "nowhere"):
        for metric in (first, *others):
            tail.want_histograms(name, metric)
    assert count(tail) == count(whole)
    whole.want_histograms("a", first)  # it has them
    assert count(tail) == count(whole)
