"""Push and pull through a folder as the object store (file://), which fails in no way but those that a test makes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time

import pytest
from store_data import record_run, samples, step_record, tokens

from monitor.cli import main
from monitor.errors import MissingPackageError, StoreError
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store.check import check_store
from monitor.store.compact import compact_run
from monitor.store.manifest import Manifest, succeed
from monitor.store.pull import Puller
from monitor.store.push import Pusher, pause_s
from monitor.store.reader import open_store
from monitor.store.remote import Remote, RemoteError
from monitor.store.runs import get_run
from monitor.store.schema import TABLES
from monitor.store.segments import list_segments

pytest.importorskip("obstore")


@pytest.fixture
def place(tmp_path):
    """(source store, URL, folder of the objects, pulled store); the source holds run a with 10 steps."""
    record_run(tmp_path / "source")
    return tmp_path / "source", f"file://{tmp_path}/objects", tmp_path / "objects" / "runs" / "a", tmp_path / "copy"


def rows(store, run="a") -> dict[str, list[str]]:
    """Every row of a run on disk, also of replaced attempts, by table; as texts, which sort whatever is NULL."""
    with open_store(store) as opened:
        query = "SELECT * FROM {}_all WHERE run = '{}'"
        return {table: sorted(map(repr, opened.sql(query.format(table, run)).rows)) for table in TABLES}


def names(store, table="steps", run="a") -> list[str]:
    return [str(name) for name, _ in list_segments(store, run, table)]


def manifest(objects) -> dict:
    return json.loads((objects / "manifest-r000.json").read_text())


def test_a_finished_run_is_equal_in_every_table(place):
    source, url, _, copy = place
    pushed = Pusher(source, url).look()
    pulled = Puller(url, copy).look()
    assert (pushed.runs, pushed.refused, pulled.runs, pulled.refused) == (["a"], [], ["a"], [])
    assert pushed.segments == pulled.segments == sum(len(names(source, table)) for table in TABLES)
    assert rows(copy) == rows(source)
    assert {table: len(found) for table, found in rows(copy).items()} == {
        "tokens": 10 * 200, "samples": 10 * 8, "histograms": 10 * 2, "alerts": 0, "events": 1, "steps": 10 * 5,
    }  # fmt: skip
    there, here = get_run(source, "a"), get_run(copy, "a")
    assert (here.status, here.acknowledged, here.info) == (there.status, there.acknowledged, there.info)
    assert (here.status, here.acknowledged) == ("finished", 10)
    assert check_store(copy) == []


def test_only_what_is_new_is_copied(place):
    source, url, _, copy = place
    pusher = Pusher(source, url)
    pusher.look()
    asked = pusher.remote.requests
    assert pusher.look().segments == 0 and pusher.remote.requests == asked  # nothing new: nobody is asked
    assert Pusher(source, url).look().segments == 0
    Puller(url, copy).look()
    again = Puller(url, copy)
    assert again.look().segments == 0
    assert again.remote.requests == 2  # the names of the runs, and what lies in the run's folder
    record_run(source, "b", range(1, 3))
    assert pusher.look().runs == Puller(url, copy).look().runs == ["b"]
    assert rows(copy, "b") == rows(source, "b")


def test_a_merge_is_swapped_in_and_replaced_objects_go_later(place):
    source, url, objects, copy = place
    pusher, puller = Pusher(source, url, grace_s=0.2), Puller(url, copy)
    pusher.look()
    puller.look()
    small, before = names(source), rows(copy)
    listed = [path for _, path in list_segments(copy, "a", "steps")]
    assert len(small) > 1
    compact_run(source, "a", grace_s=0.0)
    assert pusher.look().segments == 4  # tokens, samples, histograms and steps; the one of events has no other
    there = {path.name for path in (objects / "steps").iterdir()}
    assert there == {*small, *names(source)}  # the replaced ones stay for a while
    puller._looked.clear()
    assert puller.look().replaced == ["a"]
    assert names(copy) == names(source) and len(names(copy)) == 1
    assert rows(copy) == rows(source) == before
    assert all(path.exists() for path in listed)  # what a query had listed before still opens
    time.sleep(0.25)
    pusher.look()
    assert [path.name for path in (objects / "steps").iterdir()] == names(source)
    puller.tidy("a", older_than_s=0.0)
    assert check_store(copy) == []


def test_pruned_tokens_go_there_too(place):
    source, url, objects, copy = place
    Pusher(source, url).look()
    Puller(url, copy).look()
    compact_run(source, "a", thin_tokens="1,10", grace_s=0.0)
    Pusher(source, url).look()
    puller = Puller(url, copy)
    puller.look()
    puller.tidy("a", older_than_s=0.0)
    assert len(rows(copy)["tokens"]) == 2 * 200
    assert manifest(objects)["pruned"] == {"a001-r000": 8 * 200}
    assert check_store(copy) == []  # the pruned rows do not count as lost


def test_a_damaged_object_is_left_out_and_named(place):
    source, url, objects, copy = place
    Pusher(source, url).look()
    victim = sorted((objects / "tokens").iterdir())[1]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    puller = Puller(url, copy)
    done = puller.look()
    assert len(done.refused) == 1 and victim.name in done.refused[0] and "CRC-32" in done.refused[0]
    got, all_rows = rows(copy), rows(source)
    with open_store(source) as opened:
        lost = len(opened.sql(f"SELECT step FROM tokens_segments WHERE file LIKE '%{victim.name}'"))
    assert lost and len(got["tokens"]) == len(all_rows["tokens"]) - lost
    assert all(got[table] == all_rows[table] for table in TABLES if table != "tokens")
    assert victim.name not in names(copy, "tokens")
    assert [f.kind for f in check_store(copy) if f.damage] == ["lost_rows"]  # the heartbeat counts them
    victim.write_bytes(whole)
    puller._damaged.clear()
    puller._looked.clear()
    assert puller.look().refused == []
    assert rows(copy) == all_rows


def test_a_shorter_object_is_damaged_too(place):
    source, url, objects, copy = place
    Pusher(source, url).look()
    victim = next((objects / "samples").iterdir())
    size = victim.stat().st_size
    victim.write_bytes(victim.read_bytes()[:100])
    [text] = Puller(url, copy).look().refused
    assert f"has 100 bytes, its manifest says {size}" in text
    victim.unlink()
    [text] = Puller(url, copy.with_name("other")).look().refused
    assert "is not there, but its manifest names it" in text


def test_what_a_damaged_merge_would_replace_stays(place):
    source, url, objects, copy = place
    Pusher(source, url).look()
    puller = Puller(url, copy)
    puller.look()
    before, small = rows(copy), names(copy, "tokens")
    compact_run(source, "a", grace_s=0.0)
    Pusher(source, url).look()
    merged = objects / "tokens" / names(source, "tokens")[0]
    whole = merged.read_bytes()
    merged.write_bytes(b"0" * len(whole))
    puller._looked.clear()
    assert merged.name in puller.look().refused[0]
    assert names(copy, "tokens") == small and len(names(copy, "steps")) == 1
    assert rows(copy) == before
    merged.write_bytes(whole)
    puller._damaged.clear()
    puller._looked.clear()
    assert puller.look().refused == []
    assert names(copy, "tokens") == [merged.name] and rows(copy) == before


def test_a_reader_with_a_manifest_of_before_fetches_or_begins_anew(place):
    source, url, objects, copy = place
    Pusher(source, url).look()
    puller = Puller(url, copy)
    read = puller._read

    def merged_meanwhile(*args):
        found = read(*args)
        if len(names(source)) > 1:  # after its manifests were read, all small objects are merged away and deleted
            compact_run(source, "a", grace_s=0.0)
            pusher = Pusher(source, url, grace_s=-1.0)
            pusher.look()
            pusher.look()
            assert len(list((objects / "steps").iterdir())) == 1
        return found

    puller._read = merged_meanwhile
    assert puller.look().refused == []
    assert rows(copy) == rows(source) and names(copy) == names(source)


def test_a_run_may_be_merged_while_it_is_pushed(place, monkeypatch):
    source, url, objects, copy = place
    pusher = Pusher(source, url)
    put = pusher._put_segments

    def merged_meanwhile(*args):
        if len(names(source)) > 1:
            compact_run(source, "a", grace_s=0.0)  # the files that were listed are gone
        return put(*args)

    monkeypatch.setattr(pusher, "_put_segments", merged_meanwhile)
    assert pusher.look().refused == []
    assert list(manifest(objects)["segments"]["steps"]) == names(source) and len(names(source)) == 1
    Puller(url, copy).look()
    assert rows(copy) == rows(source)


def test_nothing_counts_before_its_manifest(place, monkeypatch):
    source, url, objects, copy = place

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pusher, "_commit", killed)
        with pytest.raises(KeyboardInterrupt):
            Pusher(source, url).look()
    assert len(list((objects / "steps").iterdir())) == len(names(source))
    assert Puller(url, copy).look().segments == 0
    record_run(source, "b")
    Pusher(source, url).look()
    small = names(source)
    compact_run(source, "a", grace_s=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Pusher, "_commit", killed)
        with pytest.raises(KeyboardInterrupt):
            Pusher(source, url).look()
    assert len(list((objects / "steps").iterdir())) == len(small) + 1
    puller = Puller(url, copy)
    puller.look()
    assert names(copy) == small
    pusher = Pusher(source, url, grace_s=-1.0)
    pusher.look()
    pusher.look()
    assert [path.name for path in (objects / "steps").iterdir()] == names(source)


def test_a_run_of_another_recorder_is_never_overwritten(place, tmp_path):
    source, url, objects, _ = place
    Pusher(source, url).look()
    before = {path: path.read_bytes() for path in objects.rglob("*") if path.is_file()}
    record_run(tmp_path / "other", steps=range(1, 4))
    [text] = Pusher(tmp_path / "other", url).look().refused
    assert "recorded elsewhere" in text and "Give another URL" in text
    assert {path: path.read_bytes() for path in objects.rglob("*") if path.is_file()} == before


def test_a_pulled_run_is_not_pushed_and_may_be_resumed(place, tmp_path):
    source, url, objects, copy = place
    Pusher(source, url).look()
    Puller(url, copy).look()
    assert Pusher(copy, url).look().runs == Pusher(copy, f"file://{tmp_path}/third").look().runs == []
    with Recorder(copy, RunInfo("a"), resume=True, flush_s=0.0) as recorder:  # the machine is another
        recorder.record(step_record(11), tokens(11), samples(11))
    [text] = Puller(url, copy).look().refused
    assert text == "Run 'a' is left alone: it was resumed here (attempt 2, rank 0)."
    assert Pusher(copy, url).look().runs == ["a"]
    reader = tmp_path / "reader"
    Puller(url, reader).look()
    assert rows(reader) == rows(copy)
    assert get_run(reader, "a").attempt == 2
    [text] = Pusher(source, url).look().refused  # the first machine does not know of the second attempt
    assert "attempt 2" in text and "recorded elsewhere" in text
    assert manifest(objects)["writers"].keys() == {"1", "2"}


def test_a_folder_that_was_not_pulled_is_left_alone(place, tmp_path):
    source, url, _, copy = place
    Pusher(source, url).look()
    record_run(copy, steps=range(1, 3))
    before = rows(copy)
    [text] = Puller(url, copy).look().refused
    assert "is there already, and was not pulled" in text
    assert rows(copy) == before
    other = tmp_path / "other"
    Puller(url, other).look()
    Pusher(source, f"file://{tmp_path}/second").look()
    [text] = Puller(f"file://{tmp_path}/second", other).look().refused
    assert f"it was pulled from {url}" in text


def test_a_segment_that_is_damaged_here_is_not_pushed(place):
    source, url, objects, copy = place
    _, path = list_segments(source, "a", "samples")[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"0000")
    pusher = Pusher(source, url)
    [text] = pusher.look().refused
    assert str(path) in text and "not pushed" in text
    assert path.name not in manifest(objects)["segments"]["samples"]
    assert Puller(url, copy).look().refused == []
    assert rows(copy)["steps"] == rows(source)["steps"]


def test_what_was_pushed_stays_when_it_is_lost_here(place):
    source, url, objects, copy = place
    Pusher(source, url).look()
    _, path = list_segments(source, "a", "tokens")[0]
    before = rows(source)
    path.unlink()
    Pusher(source, url).look()
    assert path.name in manifest(objects)["segments"]["tokens"]
    Puller(url, copy).look()
    assert rows(copy) == before


def key(table, first, last, rank=0, crc=0):
    return table, f"a001-r{rank:03d}-s{first:08d}-{last:08d}-{crc:08x}.parquet"


def test_which_segments_count():
    one, two, three = key("steps", 1, 1), key("steps", 2, 2), key("steps", 3, 3)
    merged = key("steps", 1, 2, crc=7)
    assert succeed({}, {one: 5, two: 6}, {}) == ({one: 5, two: 6}, {})
    assert succeed({one: 5, two: 6}, {merged: 9, three: 4}, {}) == ({merged: 9, three: 4}, {one: 5, two: 6})
    # gone without a successor: it counts on
    assert succeed({one: 5, two: 6}, {two: 6, three: 4}, {}) == ({one: 5, two: 6, three: 4}, {})
    # a segment of another table, attempt or rank that spans it replaces nothing
    for other in (key("tokens", 1, 9), key("steps", 1, 9, rank=1)):
        assert succeed({one: 5}, {other: 1}, {}) == ({one: 5, other: 1}, {})
    # an older copy of the folder: what it holds is in the merged one already
    assert succeed({merged: 9, three: 4}, {one: 5, two: 6}, {}) == ({merged: 9, three: 4}, {})
    # pruned tokens leave nothing behind
    gone = key("tokens", 1, 1)
    assert succeed({gone: 5}, {}, {"a001-r000": 200}) == ({}, {gone: 5})
    assert succeed({gone: 5}, {}, {"a001-r001": 200}) == ({gone: 5}, {})


def test_pauses_grow_to_half_a_minute():
    assert [pause_s(1.0, failed) for failed in (0, 1, 2, 4, 5, 5_000)] == [1.0, 2.0, 4.0, 16.0, 30.0, 30.0]
    assert pause_s(45.0, 3) == 45.0


def test_a_manifest_is_read_as_it_was_written_and_nothing_else_is():
    segments, dropped = {key("steps", 1, 2, rank=3): 7}, {key("tokens", 1, 1, rank=3): 1.5}
    made = Manifest("a", 3, {1: "host 1 2.5"}, segments, {"a001-r003": 4}, dropped)
    assert Manifest.decode(made.encode(), "there", "a", 3) == made
    for run, rank, text, what in (
        ("b", 3, made.encode(), "it is that of run 'a', rank 3"),
        ("a", 1, made.encode(), "is no segment of rank 1"),
        ("a", 3, b"{", "JSONDecodeError"),
        ("a", 3, b"[]", "TypeError"),
        ("a", 3, made.encode().replace(b"steps", b"../x"), "is no segment of rank 3"),
        ("a", 3, made.encode().replace(b'"a001-r003-s', b'"../r003-s'), "is no segment"),
        ("a", 3, made.encode().replace(b'"format": 1', b'"format": 2'), "later version"),
    ):
        with pytest.raises(StoreError, match=what):
            Manifest.decode(text, "there", run, rank)


def test_a_recorder_mirrors_its_run(tmp_path):
    url = f"file://{tmp_path}/objects"
    with Recorder(tmp_path / "source", RunInfo("a"), flush_s=0.0, mirror=url) as recorder:
        for step in range(1, 4):
            recorder.record(step_record(step), tokens(step), samples(step))
    Puller(url, tmp_path / "copy").look()
    assert rows(tmp_path / "copy") == rows(tmp_path / "source")
    assert get_run(tmp_path / "copy", "a").status == "finished"  # the last heartbeat is there too


def test_a_running_run_is_judged_by_the_age_of_its_heartbeat(tmp_path):
    url = f"file://{tmp_path}/objects"
    recorder = Recorder(tmp_path / "source", RunInfo("a"), flush_s=0.0)
    try:
        recorder.record(step_record(1))
        recorder.flush()
        Pusher(tmp_path / "source", url).look()
    finally:
        recorder.close()  # which the copy does not hear of
    Puller(url, tmp_path / "copy").look()
    assert get_run(tmp_path / "copy", "a").status == "running"
    path = next((tmp_path / "copy/runs/a").glob("heartbeat-*"))
    beat = json.loads(path.read_text())
    path.write_text(json.dumps(beat | {"ts": beat["ts"] - 61}))
    assert get_run(tmp_path / "copy", "a").status == "crashed"


def test_wrong_use_is_told(place, monkeypatch, capsys):
    source, url, _, copy = place
    for bad in ("nonsense", "ftp://host/x", "s3:/x"):
        assert main(["store", "push", str(source), bad]) == 2
        assert f"{bad!r} is no URL of an object store: expected s3://" in capsys.readouterr().err
    with pytest.raises(StoreError, match="no URL of an object store"):
        Recorder(source, RunInfo("new"), mirror="nonsense")
    assert not (source / "runs/new").exists()  # the name stays free
    assert main(["store", "push", str(source), url, "--run", "b"]) == 2
    assert "No run 'b'" in capsys.readouterr().err
    assert main(["store", "pull", url, str(copy), "--run", "b"]) == 1
    assert f"{url} holds no run 'b'" in capsys.readouterr().out
    monkeypatch.setattr("monitor.extras._installed", lambda module: module != "obstore")
    with pytest.raises(MissingPackageError, match=r'pip install "rlvr-monitor\[cloud\]"'):
        Remote(url)


def test_the_commands(place, capsys):
    source, url, _, copy = place
    assert main(["store", "push", str(source), url, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["runs"], told["refused"]) == (["a"], []) and told["bytes"] > 10_000
    assert main(["store", "pull", url, str(copy)]) == 0
    assert capsys.readouterr().out.startswith(f"Pulled into {str(copy)!r}: a ({told['segments']} segments, ")
    assert rows(copy) == rows(source)


def test_a_folder_that_cannot_be_written_loses_nothing(place, monkeypatch):
    source, url, _, copy = place
    Pusher(source, url).look()
    puller = Puller(url, copy)
    link = puller.remote.fetch

    def full(path, size, crc32, into):
        if "samples" in path:
            raise OSError(28, "No space left on device")
        link(path, size, crc32, into)

    monkeypatch.setattr(puller.remote, "fetch", full)
    with pytest.raises(StoreError, match="No space left on device"):
        puller.look()
    assert names(copy) == []  # no step shows before all of it is there
    monkeypatch.undo()
    assert puller.look().refused == []
    assert rows(copy) == rows(source)
    shutil.rmtree(copy)


def test_an_object_store_that_fails_is_asked_again(place, monkeypatch):
    source, url, _, copy = place
    pusher = Pusher(source, url, lanes=1)
    put, left = pusher.remote.put, [5]

    def failing(path, data, **options):
        left[0] -= 1
        if left[0] == 0:
            raise RemoteError(f"{url} cannot be reached: test.")
        return put(path, data, **options)

    monkeypatch.setattr(pusher.remote, "put", failing)
    with pytest.raises(RemoteError):
        pusher.look()
    pusher.look()
    Puller(url, copy).look()
    assert rows(copy) == rows(source)


@pytest.mark.parametrize("step", [1, 4, 9, 20])
def test_a_pull_that_is_killed_shows_nothing_half_and_goes_on(place, monkeypatch, step):
    source, url, _, copy = place
    for merged in (False, True):  # the first pull appends, the second swaps a generation
        if merged:
            compact_run(source, "a", grace_s=0.0)
        Pusher(source, url).look()
        before = rows(copy) if merged else None
        left = [step]

        def dying(call, left=left):
            def wrapped(*args, **options):
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                return call(*args, **options)

            return wrapped

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            for name in ("rename", "link", "replace"):
                patch.setattr(os, name, dying(getattr(os, name)))
            Puller(url, copy, lanes=1).look()
        with open_store(copy) as opened:
            got = len(opened.sql("SELECT DISTINCT step FROM tokens").rows), len(opened.sql("FROM steps"))
        assert got[1] == 5 * got[0]  # no step shows without its tokens, nor tokens without their step
        assert before is None or rows(copy) == before
        Puller(url, copy, lanes=1).look()
        assert rows(copy) == rows(source)
