from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from store_data import N_SAMPLES, N_TOKENS, record_run, samples, step_record, tokens

from monitor import recorder as recorder_module
from monitor.errors import StoreError
from monitor.recorder import Recorder
from monitor.records import Alert, RunInfo, StepRecord
from monitor.store import segments
from monitor.store.reader import open_store
from monitor.store.runs import get_run


def rows(store: Path, query: str) -> list[tuple]:
    with open_store(store) as opened:
        return opened.sql(query).rows


def events(store: Path) -> dict[str, str]:
    return dict(rows(store, "SELECT kind, message FROM events"))


def an_alert(step: int) -> Alert:
    return Alert("entropy_collapse", "critical", "firing", step, step, 0.1, 1.0, 0.5, "low", "stop")


def test_a_name_is_enough_for_a_run(tmp_path: Path) -> None:
    with Recorder(tmp_path, "plain") as recorder:
        recorder.record(StepRecord(1, {"entropy": 0.5}))
    assert rows(tmp_path, "SELECT run, value FROM steps WHERE name = 'entropy'") == [("plain", 0.5)]
    assert get_run(tmp_path, "plain").info["name"] == "plain"


def test_what_is_recorded_comes_back(tmp_path: Path) -> None:
    record_run(tmp_path, steps=range(1, 6), config={"seed": 3})
    with open_store(tmp_path) as store:
        reward = store.sql("SELECT step, value FROM steps WHERE name = 'reward' ORDER BY step").rows
        assert reward == [(step, step / 100) for step in range(1, 6)]
        frame = store.sql("SELECT * FROM tokens WHERE step = 3 ORDER BY sample, position").frame()
        for name in ("sample", "position", "token_id", "logprob", "entropy", "deviation", "weight"):
            np.testing.assert_array_equal(frame[name], getattr(tokens(3), name), err_msg=name)
            assert frame[name].dtype == getattr(tokens(3), name).dtype
        [(counts, n, least)] = store.sql("SELECT counts, n, min FROM histograms WHERE step = 4 AND split = 'all'").rows
        truth = step_record(4).histograms[0]
        assert (counts, n, least) == (truth.counts.tolist(), truth.n, truth.min)
        assert store.sql(
            "SELECT completion, token_texts[:3], correct FROM samples WHERE step = 1 AND sample = 1"
        ).rows == [("2 é", ["2", " ", "é"], True)]
    state = get_run(tmp_path, "a")
    assert (state.status, state.acknowledged, state.tokens_dropped) == ("finished", 5, 0)
    assert state.info["config"] == {"seed": 3}


@pytest.mark.parametrize("name", ["", "_seed", ".hidden", "a/b", "a b", "ä", "x" * 121])
def test_run_names_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="Choose another run name"):
        Recorder(tmp_path, RunInfo(name))


def test_start_raises_on_what_cannot_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="is a file, expected a folder"):
            Recorder(path, RunInfo("a"))
    with pytest.raises(StoreError, match="queue_steps is 0"):
        Recorder(tmp_path, RunInfo("a"), queue_steps=0)
    with pytest.raises(StoreError, match="does not hold it"):
        Recorder(tmp_path, RunInfo("a"), resume=True)
    with Recorder(tmp_path, RunInfo("a")):
        with pytest.raises(StoreError, match=r"'a' \(rank 0\) already exists"):
            Recorder(tmp_path, RunInfo("a"))
        with pytest.raises(StoreError, match="still writing it"):
            Recorder(tmp_path, RunInfo("a"), resume=True)


def test_resume_opens_the_next_attempt(tmp_path: Path) -> None:
    record_run(tmp_path, steps=range(1, 6))
    with Recorder(tmp_path, RunInfo("a"), resume=True) as recorder:
        recorder.record(StepRecord(4, {"reward": 0.9}))
        recorder.record(StepRecord(5, {"reward": 0.8}))
    shown = rows(tmp_path, "SELECT step, attempt, value FROM steps WHERE name = 'reward' ORDER BY step")
    assert shown == [(1, 1, 0.01), (2, 1, 0.02), (3, 1, 0.03), (4, 2, 0.9), (5, 2, 0.8)]
    assert rows(tmp_path, "SELECT count(*) FROM tokens WHERE step >= 4") == [(0,)]  # attempt 2 recorded none
    assert rows(tmp_path, "SELECT count(*) FROM tokens_all WHERE step >= 4") == [(2 * N_TOKENS,)]
    attempts = json.loads((tmp_path / "runs/a/run.json").read_text())["attempts"]
    assert [(one["attempt"], one["resumed_after"]) for one in attempts] == [(1, None), (2, 5)]


def test_scalars_with_names_of_their_own_are_recorded(tmp_path: Path) -> None:
    when = 1.7e9  # seconds since 1970, of a step that another process has logged
    with Recorder(tmp_path, RunInfo("a")) as recorder:
        recorder.record(StepRecord(1, {"critic/vf_loss": 0.25, "entropy": 0.5, "größe µ": 3.0}, ts=when))
    found = rows(tmp_path, "SELECT name, value, ts FROM steps WHERE name <> 'perf/queue' ORDER BY name")
    assert found == [("critic/vf_loss", 0.25, when), ("entropy", 0.5, when), ("größe µ", 3.0, when)]


def test_names_without_end_are_not_recorded_without_end(tmp_path: Path) -> None:
    with Recorder(tmp_path, RunInfo("a")) as recorder:
        for step in range(30):
            recorder.record(StepRecord(step, {f"loss of step {step}, part {part}": 1.0 for part in range(100)}))
    assert rows(tmp_path, "SELECT count(DISTINCT name) FROM steps WHERE name <> 'perf/queue'") == [(2000,)]
    ((message,),) = rows(tmp_path, "SELECT message FROM events WHERE kind = 'unknown_metric'")
    assert message.startswith("'loss of step 20, part 0' and later new names are not recorded: the run has 2,000")


def test_odd_names_and_values_leave_an_event(tmp_path: Path) -> None:
    with Recorder(tmp_path, RunInfo("a")) as recorder:
        for step in (1, 2):
            recorder.record(StepRecord(step, {"a\nb": 1.0, "reward": 0.5, "loss": "x", "kl": float("nan")}))  # type: ignore[dict-item]
        recorder.record(StepRecord(1, {"reward": 0.1}))
    assert rows(tmp_path, "SELECT DISTINCT name FROM steps ORDER BY name") == [("kl",), ("perf/queue",), ("reward",)]
    found = rows(tmp_path, "SELECT kind, message FROM events ORDER BY ts")
    assert [kind for kind, _ in found].count("unknown_metric") == 1  # once, not in every step
    assert dict(found)["unknown_metric"].startswith(r"'a\nb' cannot be the name of a scalar: expected printable text")
    assert "Step 1 came after step 2" in dict(found)["step_order"]


def test_the_last_step_takes_further_scalars(tmp_path: Path) -> None:
    with Recorder(tmp_path, RunInfo("a"), flush_s=0.0) as recorder:
        recorder.record(step_record(1), tokens(1))
        recorder.record(StepRecord(1, {"eval/heldout/pass@1": 0.25, "reward": 99.0}), tokens(1))
    values = dict(rows(tmp_path, "SELECT name, value FROM steps"))
    assert values["eval/heldout/pass@1"] == 0.25 and values["reward"] == 0.01
    assert rows(tmp_path, "SELECT count(*) FROM tokens") == [(N_TOKENS,)]


class Listening:
    """An engine that remembers what it was asked to judge, and gives an alert for evaluations."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, set[str]]] = []

    def observe(self, step: int, scalars: Mapping[str, float]) -> list[Alert]:
        self.rows.append((step, set(scalars) - {"perf/queue"}))
        evaluated = any(key.startswith("eval/") for key in scalars)
        return [Alert("diversity_lost", "warning", "firing", step, step, 0.1, 0.5, 0.2, "")] if evaluated else []


def test_further_scalars_of_a_step_are_judged(tmp_path: Path) -> None:
    engine = Listening()
    with Recorder(tmp_path, RunInfo("a"), engine=engine) as recorder:
        recorder.record(StepRecord(1, {"reward": 0.5}))
        recorder.record(StepRecord(1, {"reward": 0.9, "eval/heldout/pass@1": 0.25}))
    assert engine.rows == [(1, {"reward"}), (1, {"eval/heldout/pass@1"})]  # a value is judged once
    assert rows(tmp_path, "SELECT step, rule, state FROM alerts") == [(1, "diversity_lost", "firing")]


class Faulty:
    """An engine and sink that raises at every turn."""

    def observe(self, step: int, scalars: Mapping[str, float]) -> list[Alert]:
        raise RuntimeError("engine is broken")

    def start(self, info: RunInfo) -> None: ...

    def step(self, record: StepRecord, alerts: Sequence[Alert]) -> None:
        raise RuntimeError("sink is broken")

    def close(self, status: str) -> None:
        raise RuntimeError("close is broken")


def test_faults_of_engine_and_sinks_never_reach_training(tmp_path: Path) -> None:
    faulty = Faulty()
    with Recorder(tmp_path, RunInfo("a"), engine=faulty, sinks=[faulty]) as recorder:
        for step in (1, 2, 3):
            recorder.record(step_record(step))
    assert rows(tmp_path, "SELECT count(DISTINCT step) FROM steps") == [(3,)]
    assert "engine is broken" in events(tmp_path)["engine_error"]
    assert "sink is broken" in events(tmp_path)["sink_error"]
    assert get_run(tmp_path, "a").heartbeats[0]["errors"] == 6


class Watcher:
    """An engine that fires at step 2, and a sink that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def observe(self, step: int, scalars: Mapping[str, float]) -> list[Alert]:
        return [an_alert(step)] if step == 2 else []

    def start(self, info: RunInfo) -> None:
        self.told.append(info.name)

    def step(self, record: StepRecord, alerts: Sequence[Alert]) -> None:
        self.told.append((record.step, [alert.rule for alert in alerts]))

    def close(self, status: str) -> None:
        self.told.append(status)


def test_alerts_are_committed_with_their_step_and_told(tmp_path: Path) -> None:
    watcher = Watcher()
    told: list[Alert] = []
    with Recorder(tmp_path, RunInfo("a"), engine=watcher, sinks=[watcher], on_alert=told.append) as recorder:
        for step in (1, 2):
            recorder.record(step_record(step))
    assert watcher.told == ["a", (1, []), (2, ["entropy_collapse"]), "finished"]
    assert told == [an_alert(2)]
    assert rows(tmp_path, "SELECT step, rule, state, value FROM alerts") == [(2, "entropy_collapse", "firing", 0.1)]


def test_a_full_queue_thins_tokens_then_texts_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fsync takes as long as the test wants: a disk that is too slow for the trainer."""
    gate = threading.Event()
    real = os.fsync
    monkeypatch.setattr(recorder_module, "_TOKENS_AT", 5 * N_TOKENS / 8)  # x queue_steps = the raw tokens of 5 steps

    def slow_fsync(fd: int) -> None:
        gate.wait(20)
        real(fd)

    recorder = Recorder(tmp_path, RunInfo("a"), queue_steps=8, flush_s=0.0)
    monkeypatch.setattr(segments.os, "fsync", slow_fsync)
    for step in range(1, 31):
        recorder.record(step_record(step), tokens(step), samples(step))
    assert not gate.is_set() and recorder.queue_depth == 30  # training went on: no step waited for the disk
    gate.set()
    while recorder.queue_depth:
        time.sleep(0.01)
    recorder.record(step_record(31), tokens(31), samples(31))
    recorder.close()
    assert rows(tmp_path, "SELECT count(DISTINCT step) FROM steps") == [(31,)]
    assert rows(tmp_path, "SELECT count(DISTINCT step), sum(n) FROM histograms WHERE split = 'all'") == [
        (31, 31 * N_TOKENS)
    ]
    kept = [step for (step,) in rows(tmp_path, "SELECT DISTINCT step FROM tokens ORDER BY step")]
    texts = rows(tmp_path, "SELECT count(*) FROM samples")[0][0] // N_SAMPLES
    assert kept == [1, 2, 3, 4, 5, 31] and texts == 9
    found = events(tmp_path)
    assert "not recorded from step 6 on: the writer is behind (5 steps wait)" in found["tokens_dropped"]
    assert found["tokens_gap"] == f"Tokens of steps 6 to 30 were not recorded ({25 * N_TOKENS} rows)."
    assert found["samples_gap"] == "Samples of steps 9 to 30 were not recorded."
    assert get_run(tmp_path, "a").tokens_dropped == 25 * N_TOKENS


def test_histograms_then_steps_are_given_up_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), os.fsync
    recorder = Recorder(tmp_path, RunInfo("a"), queue_steps=1, flush_s=0.0)
    monkeypatch.setattr(segments.os, "fsync", lambda fd: gate.wait(20) and real(fd))
    for step in range(1, 301):
        recorder.record(StepRecord(step, {"reward": 1.0}, step_record(1).histograms[:1]))
    gate.set()
    recorder.close()
    assert rows(tmp_path, "SELECT count(*) FROM steps WHERE name = 'reward'") == [(256,)]
    assert rows(tmp_path, "SELECT count(*) FROM histograms") == [(4,)]
    assert events(tmp_path)["steps_gap"] == "Steps of steps 257 to 300 were not recorded."


def test_tokens_every_and_size_budget(tmp_path: Path) -> None:
    with Recorder(tmp_path, RunInfo("every"), tokens_every=3) as recorder:
        for step in range(1, 8):
            recorder.record(step_record(step), tokens(step))
    assert rows(tmp_path, "SELECT DISTINCT step FROM tokens ORDER BY step") == [(3,), (6,)]
    with Recorder(tmp_path, RunInfo("budget"), max_gb=2e-5, flush_s=0.0) as recorder:
        for step in range(1, 11):
            recorder.record(step_record(step), tokens(step))
            while recorder.queue_depth:
                time.sleep(0.001)
    assert rows(tmp_path, "SELECT count(*) FROM steps WHERE run = 'budget' AND name = 'reward'") == [(10,)]
    kept = rows(tmp_path, "SELECT count(DISTINCT step) FROM tokens WHERE run = 'budget'")[0][0]
    assert 1 <= kept < 10
    assert f"from step {kept + 1} on" in events(tmp_path)["token_budget"]


def test_rows_that_do_not_fit_hold_up_nothing(tmp_path: Path) -> None:
    with Recorder(tmp_path, RunInfo("a")) as recorder:
        bad = tokens(1)
        object.__setattr__(bad, "token_id", np.array(["x"] * N_TOKENS))
        recorder.record(step_record(1), bad)
        recorder.record(step_record(2), tokens(2), samples(2))
        recorder.record(None)  # type: ignore[arg-type]
    assert rows(tmp_path, "SELECT DISTINCT step FROM steps ORDER BY step") == [(1,), (2,)]
    assert rows(tmp_path, "SELECT DISTINCT step FROM tokens") == [(2,)]
    assert {"bad_tokens", "record_error"} <= events(tmp_path).keys()


def test_half_characters_are_recorded_as_question_marks(tmp_path: Path) -> None:
    odd = samples(1)
    odd.completion[0] = "a\ud83d"
    with Recorder(tmp_path, RunInfo("a")) as recorder:
        recorder.record(step_record(1), samples=odd)
    assert rows(tmp_path, "SELECT completion FROM samples WHERE sample = 0") == [("a?",)]


def test_ranks_and_runs_side_by_side_in_one_process(tmp_path: Path) -> None:
    recorders = [Recorder(tmp_path, RunInfo(run), rank=rank) for run in ("a", "b") for rank in (0, 1)]
    for step in range(1, 6):
        for recorder in recorders:
            recorder.record(step_record(step), tokens(step))
    for recorder in recorders:
        recorder.close()
    counts = rows(tmp_path, "SELECT run, rank, count(*) FROM tokens GROUP BY ALL ORDER BY ALL")
    assert counts == [(run, rank, 5 * N_TOKENS) for run in ("a", "b") for rank in (0, 1)]
    assert get_run(tmp_path, "a").status == "finished" and len(get_run(tmp_path, "a").heartbeats) == 2


def _in_child(store: str, inherited: Recorder) -> None:
    inherited.record(step_record(50))  # of the parent: refused
    inherited.close("failed")
    with Recorder(store, RunInfo("child")) as recorder:
        recorder.record(step_record(1), tokens(1))
    os._exit(0 if recorder.acknowledged == 1 else 1)


def test_a_forked_child_records_its_own_run_and_leaves_the_parents(tmp_path: Path) -> None:
    with Recorder(tmp_path, RunInfo("parent")) as recorder:
        recorder.record(step_record(1))
        child = multiprocessing.get_context("fork").Process(target=_in_child, args=(str(tmp_path), recorder))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        recorder.record(step_record(2))
    assert get_run(tmp_path, "parent").status == "finished"
    shown = rows(
        tmp_path, "SELECT run, list(step ORDER BY step) FROM steps WHERE name = 'reward' GROUP BY run ORDER BY run"
    )
    assert shown == [("child", [1]), ("parent", [1, 2])]


def test_status_of_a_block_that_ends_in_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Recorder(tmp_path, RunInfo("failed")):
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), Recorder(tmp_path, RunInfo("stopped")):
        raise KeyboardInterrupt
    assert get_run(tmp_path, "failed").status == "failed"
    assert get_run(tmp_path, "stopped").status == "stopped"
