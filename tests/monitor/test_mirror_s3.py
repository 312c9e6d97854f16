"""Push and pull over the S3 protocol, through a proxy that fails as networks and servers do."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from s3 import BUCKET, Proxy, environment, moto
from store_data import record_run, samples, step_record, tokens
from test_mirror import rows

from monitor.cli import main
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store.check import check_store
from monitor.store.manifest import Manifest
from monitor.store.pull import Puller
from monitor.store.push import Pusher
from monitor.store.reader import open_store
from monitor.store.remote import Remote, RemoteDamaged, _told
from monitor.store.runs import get_run

pytestmark = pytest.mark.network  # for moto, where it is not there


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with moto(tmp_path_factory.mktemp("moto") / "log.txt") as port:
        yield port


@pytest.fixture
def proxy(server, monkeypatch):
    proxy = Proxy(server)
    proxy.up()
    for name, value in environment(proxy.port).items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.down()


@pytest.fixture
def url(request):
    return f"s3://{BUCKET}/{request.node.name}"


def test_a_run_goes_there_and_back_in_few_requests(proxy, url, tmp_path, capsys):
    record_run(tmp_path / "source")
    assert main(["store", "push", str(tmp_path / "source"), url]) == 0
    n_segments = int(capsys.readouterr().out.partition("(")[2].partition(" ")[0])
    # a PUT for each segment, for the manifest, run.json and the heartbeat; before, a GET that finds no manifest
    assert dict(proxy.counts) == {"PUT": n_segments + 3, "GET": 1}
    proxy.counts.clear()
    assert main(["store", "pull", url, str(tmp_path / "copy")]) == 0
    # a GET for each of these, and two listings
    assert dict(proxy.counts) == {"GET": n_segments + 3 + 2}
    assert rows(tmp_path / "copy") == rows(tmp_path / "source")
    assert check_store(tmp_path / "copy") == []


def test_errors_cut_bodies_and_delays_cost_time_only(proxy, url, tmp_path):
    record_run(tmp_path / "source", steps=range(1, 6))
    proxy.fail = lambda number, method, path: {1: "500", 3: "cut", 5: "lost"}.get(number % 6, "")
    Pusher(tmp_path / "source", url).look()
    assert Puller(url, tmp_path / "copy").look().refused == []
    assert rows(tmp_path / "copy") == rows(tmp_path / "source")
    proxy.fail = lambda number, method, path: "slow" if number % 3 == 0 else ""
    assert Puller(url, tmp_path / "slow").look().refused == []
    assert rows(tmp_path / "slow") == rows(tmp_path / "source")


def test_a_manifest_whose_answer_is_lost_is_known_again(proxy, url, tmp_path):
    record_run(tmp_path / "source")
    answered = []

    def fail(number, method, path):
        if method == "PUT" and "manifest-r" in path:
            answered.append(path)
            return "lost" if len(answered) == 1 else ""
        return ""

    proxy.fail = fail
    pusher = Pusher(tmp_path / "source", url)
    assert pusher.look().refused == []
    assert len(answered) == 2  # the second is refused, as there is one by now: it is ours
    assert pusher.look().segments == 0 and len(answered) == 2


def test_what_the_server_refuses_is_told_in_one_line(proxy, url, tmp_path, capsys):
    record_run(tmp_path / "source", steps=range(1, 3))
    before = rows(tmp_path / "source")
    proxy.fail = lambda number, method, path: "403"
    assert main(["store", "push", str(tmp_path / "source"), url]) == 1
    assert f"{url} refuses: check the credentials in the environment" in capsys.readouterr().out
    proxy.fail = lambda number, method, path: ""
    assert main(["store", "push", str(tmp_path / "source"), f"s3://no-such-bucket/{url[5:]}"]) == 1
    assert "does not exist: make that bucket first" in capsys.readouterr().out
    proxy.down()
    for command in (["push", str(tmp_path / "source"), url], ["pull", url, str(tmp_path / "copy")]):
        assert main(["store", *command]) == 1
        told = capsys.readouterr().out
        assert f"{url} cannot be reached" in told and "Nothing is lost: run the command again to go on." in told
    proxy.up()
    assert main(["store", "push", str(tmp_path / "source"), url]) == 0
    assert main(["store", "pull", url, str(tmp_path / "copy")]) == 0
    assert rows(tmp_path / "copy") == rows(tmp_path / "source") == before


def test_a_large_segment_goes_in_parts(proxy, url, tmp_path):
    data = np.random.default_rng(0).bytes((12 << 20) + 1)
    (tmp_path / "large").write_bytes(data)
    remote = Remote(url)
    remote.put("large", tmp_path / "large")
    assert proxy.counts["PUT"] == 3  # parts of 5 MB, between the requests that begin and complete them
    proxy.fail = lambda number, method, path: "cut" if method == "GET" and number % 2 else ""
    remote.fetch("large", len(data), zlib.crc32(data), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    with pytest.raises(RemoteDamaged, match=f"has {len(data)} bytes, its manifest says {len(data) + 1}"):
        remote.fetch("large", len(data) + 1, 0, tmp_path / "longer")
    with pytest.raises(RemoteDamaged, match=f"has CRC-32 {zlib.crc32(data):08x}, its name says 00000001"):
        remote.fetch("large", len(data), 1, tmp_path / "other")
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "other").exists()


def test_missing_credentials_are_told(url):
    asked = OSError("Error performing PUT http://169.254.169.254/latest/api/token: error sending request")
    assert "no credentials. Set them in the environment" in str(_told(url, "runs", asked))


def test_of_two_recorders_of_one_name_one_wins(proxy, url, tmp_path):
    for name in ("one", "two"):
        record_run(tmp_path / name, steps=range(1, 3))
    one, two = Pusher(tmp_path / "one", url), Pusher(tmp_path / "two", url)
    put = one._put_segments

    def late(*args):  # the other has pushed all of its run between the first look and the manifest
        two.look()
        return put(*args)

    one._put_segments = late
    [text] = one.look().refused
    assert "recorded elsewhere" in text
    data, _ = two.remote.get("runs/a/manifest-r000.json")
    assert Manifest.decode(data, "", "a", 0) == next(iter(two._ranks.values())).manifest
    Puller(url, tmp_path / "copy").look()
    assert rows(tmp_path / "copy") == rows(tmp_path / "two")


def test_a_recorder_goes_on_while_the_server_is_away(proxy, url, tmp_path, monkeypatch):
    monkeypatch.setattr("monitor.store.mirror._LOOK_S", 0.1)
    proxy.down()
    with Recorder(tmp_path / "source", RunInfo("a"), flush_s=0.0, mirror=url) as recorder:
        recorder.record(step_record(1), tokens(1), samples(1))
        assert recorder.flush()
        wait_for(lambda: "mirror_error" in kinds(tmp_path / "source"))
        for step in range(2, 30):
            before = time.perf_counter()
            recorder.record(step_record(step), tokens(step), samples(step))
            assert time.perf_counter() - before < 0.5
        assert recorder.flush() and recorder.lost_steps == 0
        proxy.up()
        wait_for(lambda: "mirror_recovered" in kinds(tmp_path / "source"))
    Puller(url, tmp_path / "copy").look()
    assert rows(tmp_path / "copy") == rows(tmp_path / "source")
    assert kinds(tmp_path / "copy")["mirror_error"] == kinds(tmp_path / "copy")["mirror_recovered"] == 1
    assert get_run(tmp_path / "copy", "a").status == "finished"


def test_four_nodes_record_while_a_reader_follows(proxy, url, tmp_path):
    """Ranks 0 to 3 of one run, each with a folder of its own; errors, an outage, merges, and one writer is killed."""
    steps = 60
    child = str(Path(__file__).with_name("mirror_child.py"))
    copy = tmp_path / "copy"
    proxy.fail = lambda number, method, path: {7: "500", 23: "cut", 41: "lost"}.get(number % 50, "")
    follow = [sys.executable, "-m", "rlvr_monitor", "store", "pull", url, str(copy), "--follow", "--every", "0.2"]
    reader = subprocess.Popen(follow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writers = [
        subprocess.Popen(
            [sys.executable, child, str(tmp_path / f"node{rank}"), url, str(rank), str(steps)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    acknowledged: dict[int, int] = {}
    readers = [
        threading.Thread(target=_listen, args=(writer, rank, acknowledged)) for rank, writer in enumerate(writers)
    ]
    for thread in readers:
        thread.start()
    try:
        killed = outage = False
        seen: list[int] = []
        while any(writer.poll() is None for writer in writers):
            if acknowledged.get(3, 0) >= 25 and not killed:
                writers[3].send_signal(signal.SIGKILL)
                killed = True
            if min(acknowledged.get(rank, 0) for rank in range(3)) >= 15 and not outage:
                outage = True
                proxy.down()
                time.sleep(2.0)
                proxy.up()
            seen.append(_distinct(copy))
            time.sleep(0.1)
        assert killed and outage and seen == sorted(seen)  # what a reader has seen never vanishes
        for thread in readers:
            thread.join()
        assert [acknowledged[rank] for rank in range(3)] == [steps] * 3
        # the killed node comes up again: what was acknowledged there and not there yet goes too
        assert main(["store", "push", str(tmp_path / "node3"), url]) in (0, 1)
        proxy.fail = lambda number, method, path: ""
        assert main(["store", "push", str(tmp_path / "node3"), url]) == 0
        expected = Counter({(rank, step): 1 for rank in range(4) for step in range(1, acknowledged[rank] + 1)})
        wait_for(lambda: _distinct(copy) >= 5 * expected.total(), 60)
    finally:
        for process in (*writers, reader):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        told, errors = reader.communicate(timeout=60)
        for writer in writers:
            writer.communicate(timeout=60)
    assert (reader.returncode, "Traceback" in errors) == (0, False), told + errors
    got, recorded = rows(copy), [rows(tmp_path / f"node{rank}") for rank in range(4)]
    for table in got:  # equal in every table, which also says that no row is there twice
        assert got[table] == sorted(row for one in recorded for row in one[table])
    with open_store(copy) as opened:
        found = Counter(opened.sql("SELECT rank, step FROM steps_all WHERE name = 'reward'").rows)
    assert expected - found == Counter() and max(found.values()) == 1  # every acknowledged step is there once
    objects = {path.name for path in (copy / "runs/a/data/steps").resolve().rglob("*.parquet")}
    assert len(objects) < 4 * 25  # merged, on every node


def _listen(writer: subprocess.Popen[str], rank: int, acknowledged: dict[int, int]) -> None:
    assert writer.stdout is not None
    for line in writer.stdout:
        if line.strip().isdigit():
            acknowledged[rank] = int(line)


def _distinct(store: Path) -> int:
    """The rows of steps that a reader sees now, after a look that no row is there twice."""
    if not (store / "runs/a").exists():
        return 0
    with open_store(store) as opened:
        [(n, distinct)] = opened.sql("SELECT count(*), count(DISTINCT (rank, step, name)) FROM steps_all").rows
    assert n == distinct
    return int(n)


def kinds(store: Path) -> Counter[str]:
    with open_store(store) as opened:
        return Counter(kind for (kind,) in opened.sql("SELECT kind FROM events").rows)


def wait_for(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
