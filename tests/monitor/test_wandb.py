"""WandbSink against the real wandb: offline files read back, online without a network."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitor.integrations.wandb import WandbSink, closed_edges
from monitor.metrics import n_cells
from monitor.records import Alert, Histogram, RunInfo, StepRecord

pytest.importorskip("wandb")
INFO = RunInfo(name="w0", model="builtin", task="chain", weighting="ict", seed=3, config={"steps": 4})
ALERT = Alert("entropy_collapse", "critical", "firing", 2, 2, 0.1, 1.0, 0.3, "Entropy fell.", "Go back.")


@pytest.fixture(autouse=True)
def fresh_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """wandb reads its environment once per process and then keeps it: start each test from nothing."""
    import wandb

    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # a closed port: no test may reach the network
    wandb.teardown()
    yield
    wandb.teardown()


def histogram(values: np.ndarray, metric: str = "entropy", split: str = "all") -> Histogram:
    from monitor.metrics import inner_edges

    cells = np.searchsorted(inner_edges("nats96"), values.astype(np.float32), side="right")
    counts = np.bincount(cells, minlength=n_cells("nats96")).astype(np.int64)
    low, high = (float(values.min()), float(values.max())) if len(values) else (np.inf, -np.inf)
    return Histogram(metric, split, "nats96", counts, len(values), 0, float(values.sum()), 0.0, low, high)


def read_back(folder: Path) -> list[Any]:
    """Records of a finished run's .wandb file. wandb's own process writes it, and on a busy machine after `finish`."""
    deadline = time.monotonic() + 60
    while True:
        (path,) = folder.glob("wandb/offline-run-*/*.wandb")
        records = records_of(path)
        if any(record.WhichOneof("record_type") == "exit" for record in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.05)


def records_of(path: Path) -> list[Any]:
    """Records of a .wandb file: a 7-byte header, then LevelDB log blocks of 32 KiB; one that is cut off is left out."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, offset, parts, records = path.read_bytes(), 7, b"", []
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        if offset + 7 + length > len(data):
            break
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # full or last
            record = pb.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    def key(item: Any) -> str:
        return item.key or ".".join(item.nested_key)

    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{key(item): json.loads(item.value_json) for item in row} for row in rows]


def test_offline_run_holds_scalars_histograms_and_alerts(tmp_path: Path) -> None:
    said: list[str] = []
    sink = WandbSink("offline", project="p", dir=tmp_path, report=said.append)
    sink.start(INFO)
    values = np.array([0.0, 0.5, 0.5, 30.0])
    for step in range(4):
        scalars = {"entropy": 1.0 - step / 10, "perf/step_s": 0.5, "reward": float("nan") if step == 1 else 0.5}
        histograms = (histogram(values), histogram(values, split="correct"), histogram(np.empty(0), "deviation"))
        sink.step(StepRecord(step, scalars, histograms), [ALERT] if step == 2 else [])
    sink.verdict("warning: Entropy is collapsing.")
    sink.verdict("critical: Reward is being lost.")
    sink.close("finished")
    assert (said, sink.failures, sink.dropped) == ([], 0, 0)
    records = read_back(tmp_path)
    rows = history(records)
    assert [row["entropy"] for row in rows] == [1.0, 0.9, 0.8, 0.7]
    assert [row["_step"] for row in rows] == [0, 1, 2, 3]
    assert np.isnan(rows[1]["reward"])
    assert not any(key.startswith("histogram/deviation") for key in rows[0])
    counts, bins = rows[0]["histogram/entropy.values"], rows[0]["histogram/entropy.bins"]
    assert rows[0]["histogram/entropy._type"] == "histogram" and sum(counts) == 4 and len(bins) == len(counts) + 1
    assert (bins[0], bins[-1]) == (0.0, 30.0)
    (alert,) = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.text, alert.level) == ("entropy_collapse at step 2", "Entropy fell. Go back.", "ERROR")
    summaries = [i for r in records if r.HasField("summary") for i in r.summary.update if i.key == "verdict"]
    assert json.loads(summaries[-1].value_json) == "critical: Reward is being lost."
    config = {i.key: json.loads(i.value_json) for r in records if r.HasField("run") for i in r.run.config.update}
    assert (config["weighting"], config["seed"], config["steps"]) == ("ict", 3, 4)
    assert sink.run_dir is not None and sink.run_dir.is_dir()


def test_online_without_a_network_falls_back_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    said: list[str] = []
    sink = WandbSink("online", dir=tmp_path, init_timeout_s=2.0, report=said.append)
    sink.start(INFO)
    sink.step(StepRecord(0, {"entropy": 0.5}))
    sink.close("stopped")
    assert sink.mode == "offline" and sink.failures == 0
    assert len(said) == 1 and said[0].startswith("wandb cannot go online (") and "wandb sync" in said[0]
    assert [row["entropy"] for row in history(read_back(tmp_path))] == [0.5]


def test_online_without_a_key_never_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    said: list[str] = []
    sink = WandbSink("online", dir=tmp_path, report=said.append)
    sink.start(INFO)
    sink.close("finished")
    assert sink.mode == "offline" and "(RuntimeError: no API key is configured)" in said[0]


def test_failures_are_counted_told_once_and_never_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Broken:
        def log(self, *args: object, **kwargs: object) -> None:
            raise OSError("disk full")

        def finish(self, exit_code: int) -> None:
            raise OSError("still full")

    sink = WandbSink(report=said.append)
    monkeypatch.setattr(sink, "_open", lambda info, mode: Broken())
    sink.start(INFO)
    for step in range(3):
        sink.step(StepRecord(step, {"entropy": 0.5}))
    sink.close("crashed")
    assert sink.failures == 4 and len(said) == 1
    assert said[0].startswith("wandb could not log step 0: OSError: disk full. Training and the store go on")


def test_a_hanging_wandb_slows_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    import monitor.integrations.wandb as module

    monkeypatch.setattr(module, "_CLOSE_S", 0.2)
    said: list[str] = []
    release, opened = threading.Event(), threading.Event()

    def hang(info: RunInfo, mode: str) -> None:
        release.wait(120)
        opened.set()

    sink = WandbSink(report=said.append)
    monkeypatch.setattr(sink, "_open", hang)
    sink.start(INFO)
    for step in range(600):
        sink.step(StepRecord(step, {"entropy": 0.5}))
    assert sink.dropped >= 600 - 513
    sink.close()
    assert not opened.is_set()  # it hangs still, and nobody has waited for it
    release.set()
    assert [text.split(":")[0] for text in said] == [
        "wandb is 512 steps behind",
        "wandb stopped taking steps; its mirror of this run is incomplete. The store is complete.",
    ]


def test_closed_edges_keep_counts_and_close_with_the_data() -> None:
    counts, edges = closed_edges(histogram(np.array([0.0, 0.5, 20.0])))
    assert counts.sum() == 3 and len(edges) == len(counts) + 1
    assert edges[0] == 0.0 and edges[-1] == 20.0 and np.all(np.diff(edges) > 0)
    counts, edges = closed_edges(histogram(np.array([0.5, 0.5])))
    assert counts.tolist() == [2] and edges[0] <= 0.5 < edges[1]
    with pytest.raises(ValueError, match="entropy/all is empty"):
        closed_edges(histogram(np.empty(0)))


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode is 'on', expected 'offline' or 'online'"):
        WandbSink("on")  # type: ignore[arg-type]
