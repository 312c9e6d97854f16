"""Push and pull over Azure's protocol, through the proxy that fails as networks and servers do."""

from __future__ import annotations

import pytest
from azurite import azurite, environment
from s3 import BUCKET, Proxy
from store_data import record_run, step_record, tokens
from test_mirror import rows

from monitor.cli import main
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store.check import check_store
from monitor.store.compact import compact_run
from monitor.store.pull import Puller
from monitor.store.push import Pusher
from monitor.store.remote import Remote, RemoteChanged, RemoteMissing

pytestmark = pytest.mark.network  # for azurite, where it is not there


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with azurite(tmp_path_factory.mktemp("azurite") / "log.txt") as port:
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
    return f"az://{BUCKET}/{request.node.name}"


def test_a_run_goes_there_and_back_in_few_requests(proxy, url, tmp_path, capsys):
    record_run(tmp_path / "source")
    assert main(["store", "push", str(tmp_path / "source"), url]) == 0
    n_segments = int(capsys.readouterr().out.partition("(")[2].partition(" ")[0])
    # a PUT for each segment, for the manifest, run.json and the heartbeat; before, a GET that finds no manifest
    assert dict(proxy.counts) == {"PUT": n_segments + 3, "GET": 1}
    proxy.counts.clear()
    assert main(["store", "pull", url, str(tmp_path / "copy")]) == 0
    assert dict(proxy.counts) == {"GET": n_segments + 3 + 2}  # of each, and two listings
    assert rows(tmp_path / "copy") == rows(tmp_path / "source")
    assert check_store(tmp_path / "copy") == []


def test_merged_segments_take_the_place_of_others(proxy, url, tmp_path):
    record_run(tmp_path / "source")
    with Recorder(tmp_path / "source", RunInfo("b"), mirror=url, flush_s=0.0) as recorder:
        for step in range(1, 6):
            recorder.record(step_record(step), tokens(step))
            assert recorder.flush()
    pusher, puller = Pusher(tmp_path / "source", url), Puller(url, tmp_path / "copy")
    pusher.look()
    assert puller.look().refused == []
    assert rows(tmp_path / "copy") == rows(tmp_path / "source")
    compact_run(tmp_path / "source", "b", grace_s=0.0)
    pusher.look()
    assert puller.look().refused == []
    assert rows(tmp_path / "copy") == rows(tmp_path / "source")


def test_an_object_is_replaced_only_by_whoever_knows_it(proxy, url):
    remote = Remote(url)
    first = remote.put("manifest", b"1", replaces="create")
    assert remote.get("manifest") == (b"1", first)
    second = remote.put("manifest", b"2", replaces=first)
    for stale in (first, "create"):
        with pytest.raises(RemoteChanged, match="is another one by now"):
            remote.put("manifest", b"3", replaces=stale)
    assert remote.get("manifest") == (b"2", second)
    with pytest.raises(RemoteMissing):
        remote.get("no manifest")


def test_errors_cut_bodies_and_delays_cost_time_only(proxy, url, tmp_path):
    record_run(tmp_path / "source", steps=range(1, 6))
    proxy.fail = lambda number, method, path: {1: "500", 3: "cut", 5: "lost"}.get(number % 6, "")
    Pusher(tmp_path / "source", url).look()
    assert Puller(url, tmp_path / "copy").look().refused == []
    assert rows(tmp_path / "copy") == rows(tmp_path / "source")
