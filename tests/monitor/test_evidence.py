"""Raw tokens and texts around an alert are there whatever thinning says: 3 steps before, its own, 2 behind it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from disks import fill, wait_for
from store_data import N_POSITIONS, N_SAMPLES, N_TOKENS, Scripted, samples, step_record, tokens

from monitor import recorder as recorder_module
from monitor.recorder import Recorder
from monitor.records import Alert, RunInfo, StepRecord, TokenTable
from monitor.store import segments
from monitor.store.batch import Item
from monitor.store.check import check_store
from monitor.store.compact import compact_run
from monitor.store.evidence import MAX_ROWS, Evidence, steps_around
from monitor.store.reader import open_store
from monitor.store.runs import get_run
from monitor.store.tail import Tail

PENDING_7_FIRING_9 = {7: [("leak", "pending", "warning")], 9: [("leak", "firing", "warning")]}
KEPT = [4, 5, 6, 7, 8, 9]  # 3 before the first transition, its step, 2 behind; that of step 9 begins nothing


def record(
    store: Path,
    script: Mapping[int, list[tuple[str, str, str]]],
    steps: range,
    *,
    paced: bool = True,
    resume: bool = False,
    tokens_every: int = 1000,
    max_gb: float | None = None,
) -> None:
    """Steps of a run, each in segments of its own or, not paced, all in one batch."""
    how = {"resume": resume, "tokens_every": tokens_every, "max_gb": max_gb, "flush_s": 0.0 if paced else 60.0}
    with Recorder(store, RunInfo("a"), engine=Scripted(script), **how) as recorder:  # type: ignore[arg-type]
        for step in steps:
            recorder.record(step_record(step), tokens(step), samples(step))
            assert not paced or recorder.flush(10)


def steps_of(store: Path, table: str = "tokens") -> list[int]:
    with open_store(store) as opened:
        return [step for (step,) in opened.sql(f"SELECT DISTINCT step FROM {table} ORDER BY step").rows]


def assert_whole(store: Path, steps: list[int]) -> None:
    """Tokens of exactly these steps are there, bit for bit and once, and texts of them."""
    assert steps_of(store) == steps
    with open_store(store) as opened:
        for step in steps:
            got = opened.sql("SELECT * FROM tokens WHERE step = ? ORDER BY sample, position", [step]).frame()
            for spec in fields(TokenTable):
                given = getattr(tokens(step), spec.name)
                assert got[spec.name].dtype == given.dtype and got[spec.name].tobytes() == given.tobytes(), spec.name
            texts = opened.sql(
                "SELECT completion, token_texts, reward FROM samples WHERE step = ? ORDER BY sample", [step]
            )
            made = samples(step)
            assert texts.rows == list(zip(made.completion, made.token_texts, made.reward.tolist(), strict=True))


@pytest.mark.parametrize("paced", [True, False])
def test_thinned_tokens_around_an_alert_are_recorded(tmp_path: Path, paced: bool) -> None:
    record(tmp_path, PENDING_7_FIRING_9, range(1, 21), paced=paced)
    assert_whole(tmp_path, KEPT)
    assert steps_of(tmp_path, "samples") == list(range(1, 21))  # tokens_every thins tokens alone
    assert get_run(tmp_path, "a").tokens_dropped == 0  # thinned as asked for: no gap
    assert check_store(tmp_path) == []
    tail = Tail(tmp_path)
    tail.poll()
    assert [len(tail.files("a", "tokens", step)) for step in range(2, 11)] == [0, 0, 1, 1, 1, 1, 1, 1, 0]
    tail.close()
    compact_run(tmp_path, "a", grace_s=0.0)
    assert_whole(tmp_path, KEPT)
    record(tmp_path, {}, range(21, 31), paced=paced, resume=True)
    assert_whole(tmp_path, KEPT)
    assert check_store(tmp_path) == []


def test_an_episode_without_pending_and_one_that_gets_worse(tmp_path: Path) -> None:
    script = {
        5: [("leak", "firing", "warning"), ("other", "resolved", "warning")],
        6: [("leak", "firing", "warning")],  # no worse: nothing new
        14: [("leak", "firing", "critical")],
        22: [("leak", "resolved", "critical")],  # an end is no beginning
        30: [("leak", "pending", "info")],  # the next episode
    }
    record(tmp_path, script, range(1, 41), tokens_every=10)
    around = [2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15, 16, 27, 28, 29, 30, 31, 32]
    assert_whole(tmp_path, sorted({*around, 10, 20, 40}))


def test_a_run_without_alerts_keeps_what_thinning_keeps(tmp_path: Path) -> None:
    record(tmp_path, {}, range(1, 13), tokens_every=5)
    assert_whole(tmp_path, [5, 10])


def test_what_waits_in_memory_are_three_steps_and_none_without_an_engine(tmp_path: Path) -> None:
    for name, engine, waits in (("judged", Scripted({}), 3 * N_TOKENS), ("plain", None, 0)):
        with Recorder(tmp_path, RunInfo(name), engine=engine, tokens_every=1000, flush_s=0.0) as recorder:
            for step in range(1, 12):
                recorder.record(step_record(step), tokens(step))
            assert recorder.flush(10)
            assert (recorder._pipe._evidence.rows, recorder._pipe.token_rows) == (waits, 0)


def large(step: int, rows: int) -> Item:
    """A step of so many tokens that take no memory."""
    column = np.broadcast_to(np.float32(0), rows)
    held = TokenTable(**{spec.name: column for spec in fields(TokenTable)})
    return Item(StepRecord(step, {}), None, None, 0.0, held_tokens=held)


def test_memory_is_bounded_while_a_busy_writer_judges_nothing() -> None:
    evidence, million = Evidence(), 1 << 20
    waiting = [large(step, million) for step in range(1, 11)]
    for item in waiting:
        evidence.hold(item)
        assert evidence.rows <= MAX_ROWS
    assert [item.held_rows for item in waiting] == [million] * 4 + [0] * 6  # 4 x 2^20 = 2^22: the next to be judged
    waiting[3].alerts = Scripted({4: [("leak", "pending", "warning")]}).observe(4, {})
    back = [evidence.judged(item) for item in waiting]
    assert back == [[], [], [], waiting[:4], [], [], [], [], [], []] and evidence.rows == 0


def test_the_oldest_judged_step_makes_way_for_a_new_one() -> None:
    evidence = Evidence()
    steps = [large(1, 1 << 21), large(2, 1 << 21), large(3, 1 << 21), large(4, MAX_ROWS + 1), large(5, 1 << 20)]
    for item in steps[:4]:  # two of 2^21 rows fit; step 4 fits in no way, and takes nothing away
        evidence.hold(item)
        assert evidence.judged(item) == [] and evidence.rows <= MAX_ROWS
    assert [item.held_rows for item in steps[:4]] == [0, 1 << 21, 1 << 21, 0]
    steps[4].alerts = Scripted({5: [("leak", "firing", "critical")]}).observe(5, {})
    evidence.hold(steps[4])
    assert evidence.judged(steps[4]) == [steps[2], steps[4]] and evidence.rows == 0  # step 2 made way for step 5


@pytest.mark.parametrize("dies", ["after-acknowledgement", "before-commit"])
def test_a_killed_run_has_the_evidence_of_what_it_acknowledged(tmp_path: Path, dies: str) -> None:
    script = Path(__file__).with_name("evidence_child.py")
    child = subprocess.Popen([sys.executable, str(script), str(tmp_path), "7", dies], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    told = child.stdout.readline()
    child.kill()
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    found = {finding.kind: finding for finding in check_store(tmp_path)}
    assert not any(finding.damage for finding in found.values())
    if dies == "before-commit":  # step 7 is not committed; its evidence before it is of steps that are
        assert told == "" and "rows of 1 steps, 7 to 7" in found["uncommitted"].message
        assert_whole(tmp_path, [4, 5, 6])
        assert steps_of(tmp_path, "steps")[-1] == 6
        first = 7
    else:
        assert told == "7\n" and "uncommitted" not in found
        assert_whole(tmp_path, [4, 5, 6, 7])
        first = 8
    script_again = {9: [("leak", "firing", "warning")]}  # judged anew: what this attempt has, 3 steps at most
    record(tmp_path, script_again, range(first, 13), resume=True)
    assert_whole(tmp_path, [4, 5, 6, *range(7, 12)])
    compact_run(tmp_path, "a", grace_s=0.0)
    assert_whole(tmp_path, [4, 5, 6, *range(7, 12)])


def test_a_busy_writer_gives_up_other_steps_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_recorder, no fsync ends: raw tokens wait up to step 5, texts up to step 8."""
    gate, real = threading.Event(), os.fsync
    monkeypatch.setattr(recorder_module, "_TOKENS_AT", 5 * N_TOKENS / 8)
    engine = Scripted({20: [("leak", "pending", "warning")]})
    recorder = Recorder(tmp_path, RunInfo("a"), engine=engine, queue_steps=8, flush_s=0.0)
    recorder.record(step_record(0))
    assert recorder.flush(10)
    monkeypatch.setattr(segments.os, "fsync", lambda fd: gate.wait(20) and real(fd))
    for step in range(1, 31):
        recorder.record(step_record(step), tokens(step), samples(step))
        wait_for(lambda step=step: step > 1 or not recorder._pipe._items)  # the writer is at step 1, and stays there
    assert recorder.queue_depth == 30
    # Steps 6 to 30 hold tokens, steps 9 to 30 texts as well.
    assert recorder._pipe._evidence.rows == 25 * N_TOKENS + 22 * N_SAMPLES * N_POSITIONS
    gate.set()
    assert recorder.flush(10)
    recorder.record(step_record(31), tokens(31), samples(31))
    recorder.close()
    assert_whole(tmp_path, [1, 2, 3, 4, 5, *range(17, 23), 31])
    assert steps_of(tmp_path, "samples") == [*range(1, 9), *range(17, 23), 31]
    with open_store(tmp_path) as opened:
        events = dict(opened.sql("SELECT kind, message FROM events").rows)
    assert events["tokens_gap"] == f"Tokens of steps 6 to 30 were not recorded ({19 * N_TOKENS} rows)."  # 25 - 6
    dropped = get_run(tmp_path, "a").heartbeats[0]["dropped"]
    assert dropped == {"tokens": 19 * N_TOKENS, "samples": 16, "histograms": 0, "steps": 0}  # texts: 22 - 6


def test_evidence_takes_little_beyond_the_size_budget(tmp_path: Path) -> None:
    """Some steps fill the 20 kB; the first alert's evidence takes the tenth beyond it, the second gets none."""
    script = {20: [("leak", "pending", "warning")], 30: [("other", "pending", "warning")]}
    record(tmp_path, script, range(1, 41), tokens_every=1, max_gb=2e-5)
    with open_store(tmp_path) as opened:
        [(first, message)] = opened.sql("SELECT step, message FROM events WHERE kind = 'token_budget'").rows
    assert 2 <= first < 17 and f"from step {first} on, but around alerts" in message
    assert_whole(
        tmp_path, [*range(1, first), 17, 18, 19, 20]
    )  # these 4 steps are more than 2 kB: 21 and 22 wait in vain
    assert get_run(tmp_path, "a").tokens_dropped == (40 - (first - 1) - 4) * N_TOKENS
    assert steps_of(tmp_path, "steps") == steps_of(tmp_path, "samples") == list(range(1, 41))


def test_a_full_disk_costs_evidence_and_no_step(small_disk: Path) -> None:
    store = small_disk / "store"
    script = {7: [("leak", "pending", "warning")], 16: [("other", "firing", "critical")]}
    recorder = Recorder(store, RunInfo("a"), engine=Scripted(script), tokens_every=1000, flush_s=0.0)

    def hand_over(steps: range) -> None:
        for step in steps:
            recorder.record(step_record(step), tokens(step), samples(step))
            assert recorder.flush(10)

    hand_over(range(1, 7))
    ballast = fill(small_disk)
    hand_over(range(7, 13))
    assert recorder.acknowledged == 12 and recorder._pipe.disk_full
    ballast.unlink()
    wait_for(lambda: not recorder._pipe.disk_full)
    hand_over(range(13, 21))
    recorder.close()
    assert (recorder.lost_steps, get_run(store, "a").status) == (0, "finished")
    assert steps_of(store, "steps") == steps_of(store, "histograms") == list(range(1, 21))
    assert steps_of(store, "alerts") == [7, 16]
    assert_whole(store, [13, 14, 15, 16, 17, 18])
    with open_store(store) as opened:
        events = dict(opened.sql("SELECT kind, message FROM events").rows)
    assert events["tokens_dropped"].startswith("Tokens are not recorded from step 4 on: cannot write (")
    assert get_run(store, "a").tokens_dropped == 4 * N_TOKENS  # steps 4 to 7; of 8 and 9 nothing was held
    assert {finding.kind for finding in check_store(store)} == {"gap"}


class Garbled:
    """An engine of others that returns something else than alerts."""

    def observe(self, step: int, scalars: Mapping[str, float]) -> list[Alert]:
        return ["alert"] if step == 3 else []  # type: ignore[list-item]


def test_a_fault_costs_the_evidence_alone(tmp_path: Path) -> None:
    odd = samples(2)
    object.__setattr__(odd, "n_tokens", ["many"] * N_SAMPLES)
    with Recorder(tmp_path, RunInfo("a"), engine=Garbled(), tokens_every=1000, flush_s=0.0) as recorder:
        for step in range(1, 6):
            recorder.record(step_record(step), tokens(step), odd if step == 2 else samples(step))
            assert recorder.flush(10)
        assert recorder._pipe._evidence.rows == 3 * N_TOKENS  # of steps 2, 4 and 5
    assert steps_of(tmp_path, "steps") == [1, 2, 3, 4, 5]
    with open_store(tmp_path) as opened:
        kinds = {kind for (kind,) in opened.sql("SELECT kind FROM events").rows}
    assert {"evidence_error", "bad_alerts"} <= kinds


def test_pruning_spares_the_steps_around_every_transition(tmp_path: Path) -> None:
    """12 - 3 to 14 + 2, the worse one's 20 - 3 to 20 + 2, the end's 30 - 3 to 30 + 2."""
    script = {
        12: [("leak", "pending", "warning")],
        14: [("leak", "firing", "warning")],
        20: [("leak", "firing", "critical")],
        30: [("leak", "resolved", "critical")],
    }
    record(tmp_path, script, range(1, 41), paced=False, tokens_every=1)
    around = [*range(9, 17), *range(17, 23), *range(27, 33)]
    done = compact_run(tmp_path, "a", thin_tokens="2", grace_s=0.0)
    assert done.kept_steps == (1, *around, 40)  # the first and the last of the others
    assert_whole(tmp_path, [1, *around, 40])
    assert check_store(tmp_path) == []
    assert compact_run(tmp_path, "a", thin_tokens="0", grace_s=0.0).kept_steps == tuple(around)
    assert_whole(tmp_path, around)
    assert steps_of(tmp_path, "samples") == list(range(1, 41))


def test_steps_around_count_recorded_steps() -> None:
    steps = [10, 20, 30, 40, 50, 60, 70, 80]
    assert steps_around([50], steps) == {20, 30, 40, 50, 60, 70}
    assert steps_around([45], steps) == {20, 30, 40, 50, 60}  # not recorded itself
    assert steps_around([10, 80], steps) == {10, 20, 30, 50, 60, 70, 80}
    assert steps_around([], steps) == set() == steps_around([5], [])
