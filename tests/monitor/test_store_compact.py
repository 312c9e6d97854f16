from __future__ import annotations

import threading
from pathlib import Path

import pytest
from store_data import N_TOKENS, record_run, step_record, tokens

from monitor.errors import StoreError
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store.check import check_store
from monitor.store.compact import compact_run, kept_steps
from monitor.store.reader import open_store
from monitor.store.runs import get_run
from monitor.store.schema import TABLES
from monitor.store.segments import list_segments


def contents(store: Path) -> dict[str, list[tuple]]:
    with open_store(store) as opened:
        return {table: opened.sql(f"SELECT * FROM {table}_all ORDER BY ALL").rows for table in TABLES}


def test_compaction_changes_files_and_no_row(tmp_path: Path) -> None:
    record_run(tmp_path)
    with Recorder(tmp_path, RunInfo("a"), resume=True) as recorder:
        recorder.record(step_record(8), tokens(8))
    before = contents(tmp_path)
    done = compact_run(tmp_path, "a", grace_s=0.0)
    assert contents(tmp_path) == before
    assert done.files_after < done.files_before
    assert [name.attempt for name, _ in list_segments(tmp_path, "a", "tokens")] == [1, 2]
    assert (tmp_path / "runs/a/data").readlink() == Path("data.g1")
    assert not (tmp_path / "runs/a/data.g0").exists()
    assert check_store(tmp_path) == []
    with Recorder(tmp_path, RunInfo("a"), resume=True) as recorder:  # and the run can go on
        recorder.record(step_record(11), tokens(11))
    assert get_run(tmp_path, "a").acknowledged == 11


def test_readers_that_hammer_never_see_a_wrong_count(tmp_path: Path) -> None:
    record_run(tmp_path, "a", range(1, 21))
    record_run(tmp_path, "b", range(1, 21))
    truth = [("a", 20 * N_TOKENS, 20), ("b", 20 * N_TOKENS, 20)]
    wrong: list[object] = []
    asked = [0, 0]
    stop = threading.Event()

    def hammer(reader: int) -> None:
        with open_store(tmp_path) as store:
            while not stop.is_set():
                try:
                    got = store.sql(
                        "SELECT run, count(*), count(DISTINCT step) FROM tokens GROUP BY run ORDER BY run"
                    ).rows
                except Exception as error:
                    wrong.append(error)
                else:
                    wrong.extend([] if got == truth else [got])
                asked[reader] += 1

    readers = [threading.Thread(target=hammer, args=(reader,)) for reader in (0, 1)]
    for reader in readers:
        reader.start()
    for _ in range(2):
        for run in ("a", "b"):
            compact_run(tmp_path, run, grace_s=0.0)
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert min(asked) >= 2


def test_pruning_keeps_the_named_steps_and_all_else(tmp_path: Path) -> None:
    record_run(tmp_path)
    before = contents(tmp_path)
    done = compact_run(tmp_path, "a", thin_tokens="3", grace_s=0.0)
    assert done.kept_steps == (1, 5, 10) and done.bytes_after < done.bytes_before
    after = contents(tmp_path)
    assert {table: rows for table, rows in after.items() if table != "tokens"} == {
        table: rows for table, rows in before.items() if table != "tokens"
    }
    assert after["tokens"] == [row for row in before["tokens"] if row[2] in (1, 5, 10)]
    assert compact_run(tmp_path, "a", thin_tokens="0", grace_s=0.0).kept_steps == ()
    assert contents(tmp_path)["tokens"] == []


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        ("1,50,100", (1, 50, 100)),
        ("50,", (50,)),
        ("7,1000", (7,)),
        ("5", (1, 26, 51, 75, 100)),
        ("1", (100,)),
        ("0", ()),
        ("500", tuple(range(1, 101))),
    ],
)
def test_which_steps_are_kept(spec: str, kept: tuple[int, ...]) -> None:
    assert kept_steps(spec, list(range(1, 101))) == kept


@pytest.mark.parametrize("spec", ["", "x", "1,x", ",1", "-3", "1.5"])
def test_faulty_steps_are_refused(spec: str) -> None:
    with pytest.raises(StoreError, match="expected steps like 1,50,100"):
        kept_steps(spec, [1, 2])


def test_running_unknown_and_damaged_runs_are_refused(tmp_path: Path) -> None:
    with Recorder(tmp_path, RunInfo("a")) as recorder:
        recorder.record(step_record(1))
        with pytest.raises(StoreError, match="is running: compact it when it has ended"):
            compact_run(tmp_path, "a")
    with pytest.raises(StoreError, match="No run 'b'"):
        compact_run(tmp_path, "b")
    _, path = list_segments(tmp_path, "a", "steps")[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="is damaged"):
        compact_run(tmp_path, "a")


def test_a_lock_keeps_two_compactions_and_a_resumed_run_apart(tmp_path: Path) -> None:
    import fcntl

    record_run(tmp_path, steps=range(1, 3))
    with open(tmp_path / "runs/a/run.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="in use"):
            compact_run(tmp_path, "a")
        with pytest.raises(StoreError, match="being compacted"):
            Recorder(tmp_path, RunInfo("a"), resume=True)


def test_leftovers_of_a_killed_compaction_do_not_disturb(tmp_path: Path) -> None:
    record_run(tmp_path, steps=range(1, 4))
    before = contents(tmp_path)
    (tmp_path / "runs/a/data.g1.tmp/tokens").mkdir(parents=True)
    (tmp_path / "runs/a/data.g1").mkdir()
    assert {(finding.kind, finding.damage) for finding in check_store(tmp_path)} == {("leftover", False)}
    compact_run(tmp_path, "a", grace_s=0.0)
    assert contents(tmp_path) == before and check_store(tmp_path) == []
