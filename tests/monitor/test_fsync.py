"""What is fsynced, when and how often, under each policy: calls of os.fsync and os.fdatasync are traced."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from store_data import samples, step_record, tokens

from monitor.errors import StoreError
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store import writer
from monitor.store.compact import compact_run
from monitor.store.reader import open_store
from monitor.store.schema import TABLES
from monitor.store.segments import list_segments

WRITTEN = ("tokens", "samples", "histograms", "steps")  # in a step without alerts and events, in this order


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int]]:
    """(path, inode) of everything that is fsynced, in order."""
    made: list[tuple[Path, int]] = []

    def tracing(real):
        def traced(fd: int) -> None:
            made.append((Path(os.readlink(f"/proc/self/fd/{fd}")), os.fstat(fd).st_ino))
            real(fd)

        return traced

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, tracing(getattr(os, name)))
    return made


def record(recorder: Recorder, steps: range) -> None:
    for step in steps:
        recorder.record(step_record(step), tokens(step), samples(step))
        assert recorder.flush() and recorder.acknowledged == step


def on_disk(store: Path) -> list[Path]:
    return [path for table in TABLES for _, path in list_segments(store, "a", table)]


def inodes(paths: list[Path]) -> Counter[int]:
    return Counter(path.stat().st_ino for path in paths)


def of_run(synced: list[tuple[Path, int]], store: Path) -> list[tuple[Path, int]]:
    """Without what fixes the types of the views, in every new store."""
    return [(path, inode) for path, inode in synced if path.is_relative_to(store / "runs" / "a")]


def test_every_step_fsyncs_each_file_and_its_folder_before_the_step_counts(tmp_path: Path, synced) -> None:
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0) as recorder:
        record(recorder, range(1, 2))  # with an event, that the recorder opened
        for step in (2, 3):
            synced.clear()
            record(recorder, range(step, step + 1))
            data = tmp_path / "runs/a/data.g0"
            wanted = []
            for table in WRITTEN:
                folder = data / table / "g0"
                wanted += [folder / f"1-0-{step}-{step}.parquet.tmp", folder]  # renamed in between
            assert [path for path, _ in synced] == wanted
        files = [path for path in on_disk(tmp_path) if "s00000003" in path.name]
        assert inodes(files) == Counter(inode for path, inode in synced if path.suffix == ".tmp")  # the very files
    assert json.loads((tmp_path / "runs/a/run.json").read_text())["attempts"][0]["fsync"] == "every-step"


@pytest.mark.parametrize("fsync", ["every-step", "interval"])
def test_a_new_run_makes_its_folders_durable_first(tmp_path: Path, synced, fsync: str) -> None:
    store = tmp_path / "store"
    with Recorder(store, RunInfo("a"), fsync=fsync):
        opened = [path for path, _ in synced]
    run = store / "runs" / "a"
    tables = [run / "data.g0" / table for table in TABLES]
    folders = [*tables, *(table / "g0" for table in tables), run / "data.g0", run, run.parent, store, tmp_path]
    assert Counter(path for path in opened if path in folders) == Counter(folders)
    assert opened.index(run / "data.g0" / "tokens" / "g0") < opened.index(run) < opened.index(store)
    [info] = [path for path in opened if path.name.startswith("run.json")]
    assert opened.index(info) < opened.index(run)


def test_interval_fsyncs_each_file_once_and_each_folder_once_for_all(
    tmp_path: Path, synced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FSYNC_S", 1e6)
    recorder = Recorder(tmp_path, RunInfo("a"), flush_s=0.0, fsync="interval")
    synced.clear()
    record(recorder, range(1, 6))
    assert not synced
    recorder.close()
    files = on_disk(tmp_path)
    assert len(files) >= 5 * len(WRITTEN)
    folders = {path.parent for path in files}
    assert Counter(inode for _, inode in synced) == inodes([*files, *folders])
    assert {path for path, _ in synced[len(files) :]} == folders  # after all files
    assert json.loads((tmp_path / "runs/a/run.json").read_text())["attempts"][0]["fsync"] == "interval"


def test_interval_fsyncs_in_time_though_no_step_follows(
    tmp_path: Path, synced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FSYNC_S", 0.05)
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0, fsync="interval") as recorder:
        record(recorder, range(1, 3))
        wanted, until = inodes(on_disk(tmp_path)).keys(), time.monotonic() + 10
        while wanted - {inode for _, inode in synced} and time.monotonic() < until:
            time.sleep(0.01)
        assert not wanted - {inode for _, inode in synced}


def test_an_fsync_that_fails_is_said_and_made_again(tmp_path: Path, synced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FSYNC_S", 0.02)
    recorder = Recorder(tmp_path, RunInfo("a"), flush_s=0.0, fsync="interval")
    real, failures = os.fsync, iter(range(3))

    def failing(fd: int) -> None:
        if next(failures, None) is not None:
            raise OSError(5, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    record(recorder, range(1, 3))
    time.sleep(0.2)
    recorder.close()
    with open_store(tmp_path) as store:
        said = store.sql("SELECT message FROM events WHERE kind = 'fsync_error'").rows
    assert said == [("OSError: [Errno 5] Input/output error",)]
    assert not inodes(on_disk(tmp_path)).keys() - {inode for _, inode in synced}


def test_files_that_were_merged_before_their_fsync_are_durable_as_merged(
    tmp_path: Path, synced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 segments of steps are merged; that of events, a hard link in the next generation, is fsynced there."""
    monkeypatch.setattr(writer, "FSYNC_S", 1e6)
    recorder = Recorder(tmp_path, RunInfo("a"), flush_s=0.0, fsync="interval")
    for step in range(1, 65):
        recorder.record(step_record(step))
        assert recorder.flush()
    until = time.monotonic() + 20
    while len(on_disk(tmp_path)) > 10 and time.monotonic() < until:
        time.sleep(0.02)
    recorder.close()
    files = on_disk(tmp_path)
    assert {path.parent.parent.name for path in files if "s00000001-00000064" in path.name} == {"histograms", "steps"}
    assert {path.parent.name for path in files} != {"g0"} and list_segments(tmp_path, "a", "events")
    assert not inodes([*files, *{path.parent for path in files}]).keys() - {inode for _, inode in synced}


def test_none_fsyncs_nothing(tmp_path: Path, synced) -> None:
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0, fsync="none") as recorder:
        record(recorder, range(1, 4))
    assert of_run(synced, tmp_path) == []
    assert json.loads((tmp_path / "runs/a/run.json").read_text())["attempts"][0]["fsync"] == "none"
    with open_store(tmp_path) as store:
        assert store.sql("SELECT count(DISTINCT step) FROM tokens").rows == [(3,)]


def test_a_compaction_fsyncs_what_takes_the_place_of_other_files(tmp_path: Path, synced) -> None:
    """Also of a run that was recorded without: the files that it replaces may be on disk by then, and are deleted."""
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0, fsync="none") as recorder:
        record(recorder, range(1, 6))
    synced.clear()
    compact_run(tmp_path, "a", grace_s=0.0)
    done = of_run(synced, tmp_path)
    merged = [path for path in on_disk(tmp_path) if "s00000001-00000005" in path.name]
    assert [path.parent.parent.name for path in merged] == [table for table in TABLES if table in WRITTEN]
    assert not inodes(merged).keys() - {inode for _, inode in done}
    run = tmp_path / "runs" / "a"
    new = run / "data.g1.tmp"
    folders = [path for path, _ in done if path.suffix != ".tmp" or path == new]
    for table in TABLES:
        assert new / table / "g1" in folders and new / table in folders
    assert new in folders and folders[-1] == run and folders.count(run) == 1  # the swap itself


def test_what_a_pull_fetches_is_fsynced_before_it_counts(tmp_path: Path, synced) -> None:
    pytest.importorskip("obstore")
    from monitor.store.pull import Puller
    from monitor.store.push import Pusher

    source, copy, url = tmp_path / "source", tmp_path / "copy", f"file://{tmp_path}/objects"
    with Recorder(source, RunInfo("a"), flush_s=0.0) as recorder:
        record(recorder, range(1, 4))
    Pusher(source, url).look()
    puller = Puller(url, copy)
    synced.clear()
    puller.look()
    done = of_run(synced, copy)
    files = on_disk(copy)
    assert len(files) >= 3 * len(WRITTEN)
    assert inodes(files) == Counter(inode for path, inode in done if path.suffix == ".part")  # each once, as it came
    places = [path for path, _ in done if path in {file.parent for file in files}]
    assert places[-1].parent.name == "steps" and len(places) == len({file.parent for file in files})


def test_a_wrong_policy_is_refused(tmp_path: Path) -> None:
    message = "fsync is 'always', expected every-step, interval, none. Change it or leave it out."
    with pytest.raises(StoreError, match=message):
        Recorder(tmp_path, RunInfo("a"), fsync="always")  # type: ignore[arg-type]
    assert not (tmp_path / "runs").exists()
