from __future__ import annotations

import shutil
import subprocess
import threading
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from disks import fill, wait_for
from store_data import N_TOKENS, record_run, samples, step_record, tokens

from monitor.commands.store import main
from monitor.errors import StoreError
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store import compact
from monitor.store.check import check_store
from monitor.store.compact import compact_run, kept_steps
from monitor.store.locks import FileLock
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


def test_merged_histograms_lie_by_metric_in_files_of_bounded_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 steps of two rows make 80, three files where 32 is a full one: of 26 or 28 rows, and not merged again."""
    monkeypatch.setattr(compact, "_SORTED_ROWS", 32)
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0) as recorder:
        for step in range(1, 41):
            recorder.record(step_record(step), tokens(step))
            assert recorder.flush()
    before = contents(tmp_path)
    assert compact_run(tmp_path, "a", grace_s=0.0).files_after < 10
    files = list_segments(tmp_path, "a", "histograms")
    rows = [pq.read_table(path, columns=["split", "step"]).to_pylist() for _, path in files]
    assert sorted(map(len, rows)) == [26, 26, 28]
    for (name, _), mine in zip(files, rows, strict=True):
        steps = range(name.first_step, name.last_step + 1)
        assert mine == [{"split": split, "step": step} for split in ("all", "selected") for step in steps]
    assert contents(tmp_path) == before
    generation = (tmp_path / "runs/a/data").readlink()
    compact_run(tmp_path, "a", grace_s=0.0)
    assert (tmp_path / "runs/a/data").readlink() == generation


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
    for run in ("a", "b", "a", "b"):
        before = list(asked)
        compact_run(tmp_path, run, grace_s=0.0)
        wait_for(lambda before=before: all(now > then for now, then in zip(asked, before, strict=True)))
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []


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
        with pytest.raises(StoreError, match="is running: prune it when it has ended"):
            compact_run(tmp_path, "a", thin_tokens="1")
    with pytest.raises(StoreError, match="No run 'b'"):
        compact_run(tmp_path, "b")
    with Recorder(tmp_path, RunInfo("a"), resume=True) as recorder:
        for step in (2, 3):
            recorder.record(step_record(step))
            assert recorder.flush(10)
    _, path = list_segments(tmp_path, "a", "steps")[-1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="is damaged"):
        compact_run(tmp_path, "a")


def test_a_lock_keeps_two_compactions_and_a_resumed_run_apart(tmp_path: Path) -> None:
    record_run(tmp_path, steps=range(1, 3))
    folder = tmp_path / "runs/a"
    with FileLock(folder / "compact.lock"), pytest.raises(StoreError, match="in use by another compaction"):
        compact_run(tmp_path, "a")
    with FileLock(folder / "run.lock"), pytest.raises(StoreError, match="being compacted"):  # in the moment of a swap
        Recorder(tmp_path, RunInfo("a"), resume=True)


def test_leftovers_of_a_killed_compaction_do_not_disturb(tmp_path: Path) -> None:
    record_run(tmp_path, steps=range(1, 4))
    before = contents(tmp_path)
    (tmp_path / "runs/a/data.g1.tmp/tokens").mkdir(parents=True)
    (tmp_path / "runs/a/data.g1").mkdir()
    assert {(finding.kind, finding.damage) for finding in check_store(tmp_path)} == {("leftover", False)}
    compact_run(tmp_path, "a", grace_s=0.0)
    assert contents(tmp_path) == before and check_store(tmp_path) == []


def everything(store: Path) -> dict[str, bytes]:
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "foreign", ["copy of.parquet", "a001-r000-s1-2-00000000.parquet", "notes.txt", "../notes.txt", "../../x/x"]
)
def test_files_that_are_not_understood_stop_it(tmp_path: Path, foreign: str) -> None:
    record_run(tmp_path, steps=range(1, 4))
    path = tmp_path / "runs/a/data/tokens/g0" / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(list_segments(tmp_path, "a", "tokens")[0][1].read_bytes())
    before = everything(tmp_path)
    for thin in (None, "0"):
        with pytest.raises(StoreError, match="of this version: move it away before compacting"):
            compact_run(tmp_path, "a", thin_tokens=thin, grace_s=0.0)
    assert everything(tmp_path) == before


def test_a_segment_with_a_column_more_stops_it(tmp_path: Path) -> None:
    """Of a later version, say: the column would be gone."""
    record_run(tmp_path, steps=range(1, 4))
    with Recorder(tmp_path, RunInfo("a"), resume=True) as recorder:
        for step in (4, 5):
            recorder.record(step_record(step), samples=samples(step))
            assert recorder.flush(10)
    name, path = list_segments(tmp_path, "a", "samples")[-1]
    wider = tmp_path / "wider.parquet"
    with duckdb.connect() as con:
        con.execute(f"COPY (SELECT *, 1 AS more FROM '{path}') TO '{wider}'")
    path.unlink()
    wider.rename(path.with_name(str(replace(name, crc32=zlib.crc32(wider.read_bytes())))))
    with pytest.raises(StoreError, match=r"other columns than this version \(more\)"):
        compact_run(tmp_path, "a", grace_s=0.0)


def test_steps_of_nine_digits_outlive_it(tmp_path: Path) -> None:
    with Recorder(tmp_path, RunInfo("a")) as recorder:
        for step in (99_999_999, 123_456_789):
            recorder.record(step_record(step), tokens(step))
            assert recorder.flush(10)
    before = contents(tmp_path)
    assert {row[2] for row in before["tokens"]} == {99_999_999, 123_456_789}
    with suppress(StoreError):  # it refuses or it understands
        compact_run(tmp_path, "a", grace_s=0.0)
    assert contents(tmp_path) == before


def test_on_a_full_disk_it_is_one_line_and_nothing_is_left_behind(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = small_disk / "store"
    record_run(store, steps=range(1, 12))
    record_run(store, "b", steps=range(1, 12))
    ballast = fill(small_disk, leave=8192)
    before = everything(store)
    with pytest.raises(StoreError, match=r"^Cannot compact run 'a': No space left on device\..*$"):
        compact_run(store, "a", grace_s=0.0)
    assert main(["compact", str(store)]) == 1
    assert len(capsys.readouterr().out.strip().splitlines()) == 2
    assert everything(store) == before and check_store(store) == []
    ballast.unlink()
    compact_run(store, "a", grace_s=0.0)
    assert contents(store)["steps"] and check_store(store) == []


def test_on_a_read_only_disk_it_is_one_line(small_disk: Path) -> None:
    store = small_disk / "store"
    record_run(store, steps=range(1, 3))
    before = everything(store)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        with pytest.raises(StoreError, match=r"^Cannot compact run 'a': .*Read-only file system.*$"):
            compact_run(store, "a", grace_s=0.0)
        assert check_store(store) == []
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert everything(store) == before


def test_a_store_that_was_copied_with_links_followed(tmp_path: Path) -> None:
    record_run(tmp_path / "first", steps=range(1, 6))
    shutil.copytree(tmp_path / "first", tmp_path / "copy", symlinks=False)
    store = tmp_path / "copy"
    shutil.rmtree(store / "runs/a/data.g0")
    before = contents(store)
    assert not (store / "runs/a/data").is_symlink()
    assert check_store(store) == []
    done = compact_run(store, "a", grace_s=0.0)
    assert done.files_after < done.files_before and (store / "runs/a/data").readlink() == Path("data.g1")
    assert contents(store) == before and check_store(store) == []
    with Recorder(store, RunInfo("a"), resume=True) as recorder:
        recorder.record(step_record(6))
