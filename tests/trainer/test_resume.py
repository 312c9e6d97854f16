"""Checkpoints and `rlvr train --resume`: bit-identical after SIGKILL, atomic, kept, refused where they cannot serve."""

from __future__ import annotations

import json
import random
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from monitor.alerts.engine import AlertEngine
from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord
from monitor.store.reader import open_store
from monitor.store.runs import get_run
from monitor.store.segments import list_segments
from trainer.commands.train import main, parse_config
from trainer.runtime import checkpoint
from trainer.runtime.action_state import ActionState
from trainer.runtime.build import prepare
from trainer.runtime.checkpoint import CheckpointError, checkpoints_of
from trainer.train import sample_step, token_batch

SMALL = (
    "--threads 1 --rollout.prompts 4 --rollout.group-size 4 --eval.every 4 --eval.prompts 2 --eval.samples 4 "
    "--weighting.kind random --weighting.warmup-steps 1 --checkpoint.every 2"
).split()  # random: its own generator must come back too
STEPS = 8


def rows(store: Path, query: str) -> list[tuple]:
    with open_store(store) as opened:
        return [tuple(row) for row in opened.sql(query).rows]


def recorded(store: Path, run: str) -> dict[str, list[tuple]]:
    """All of a run that must not depend on how often it was interrupted."""
    return {
        "steps": rows(store, f"SELECT step, name, value FROM steps WHERE run = '{run}' AND name NOT LIKE 'perf/%' "
                             "ORDER BY ALL"),
        "tokens": rows(store, "SELECT step, sample, position, token_id, logprob, deviation, weight FROM tokens "
                              f"WHERE run = '{run}' ORDER BY ALL"),
        "histograms": rows(store, "SELECT step, metric, split, n, sum, counts::VARCHAR FROM histograms "
                                  f"WHERE run = '{run}' ORDER BY ALL"),
        "samples": rows(store, f"SELECT step, sample, completion, reward FROM samples WHERE run = '{run}' "
                               "ORDER BY ALL"),
    }  # fmt: skip


def killed_after(command: list[str], store: Path, attempt: int, step: int, delay_s: float, run: str = "cut") -> bool:
    """SIGKILL `delay_s` after `step` is durable; False if the run ended before."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            written = [name for name, _ in list_segments(store, run, "steps") if name.attempt == attempt]
            if any(name.last_step >= step for name in written):
                time.sleep(delay_s)
                process.kill()
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    return process.returncode != 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("resume") / "store"
    assert main([*SMALL, "--steps", str(STEPS), "--store", str(store), "--run", "whole"]) == 0
    return store


def test_a_run_killed_at_random_moments_goes_on_bit_identically(whole):
    rlvr = [sys.executable, "-m", "monitor.cli", "train"]
    rng = random.Random(time.time_ns())
    first = [*rlvr, *SMALL, "--steps", str(STEPS), "--store", str(whole), "--run", "cut"]
    resume = [*rlvr, "--resume", "cut", "--store", str(whole)]
    delays = [rng.uniform(0, 0.1), rng.uniform(0, 0.1)]  # three steps and the last checkpoint take longer
    assert killed_after(first, whole, 1, 2, delays[0]), delays
    assert killed_after(resume, whole, 2, 5, delays[1]), delays
    done = subprocess.run(resume, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for part, expected in recorded(whole, "whole").items():
        assert recorded(whole, "cut")[part] == expected, (part, delays)
    policies = [load_file(whole / "policies" / run / "model.safetensors") for run in ("whole", "cut")]
    assert all(torch.equal(policies[1][name], value) for name, value in policies[0].items())
    attempts = json.loads((whole / "runs" / "cut" / "run.json").read_text())["attempts"]
    assert [one["attempt"] for one in attempts] == [1, 2, 3]


def test_a_run_with_background_checkpoints_is_cut_off_and_goes_on_bit_identically(whole):
    """SIGKILL after a checkpoint was begun: whether that one or the one before is there, all steps agree."""
    rlvr = [sys.executable, "-m", "monitor.cli", "train"]
    options = [*SMALL, "--checkpoint.background", "always", "--steps", str(STEPS), "--store", str(whole)]
    delay = random.Random(time.time_ns()).uniform(0, 0.2)
    assert killed_after([*rlvr, *options, "--run", "behind"], whole, 1, 4, delay, run="behind"), delay
    done = subprocess.run([*rlvr, "--resume", "behind", "--store", str(whole)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part, expected in recorded(whole, "whole").items():
        assert recorded(whole, "behind")[part] == expected, (part, delay)


def test_the_newest_checkpoints_are_kept_and_steps_may_be_raised(whole, capsys):
    folder = whole / "checkpoints" / "whole"
    assert [path.name for path in checkpoints_of(folder)] == ["step-00000006", "step-00000008"]
    assert not list(folder.glob("*.tmp"))
    assert main(["--resume", "whole", "--store", str(whole)]) == 2
    assert "has reached its 8 steps. Raise --steps" in capsys.readouterr().err
    assert main([*SMALL, "--steps", str(STEPS + 2), "--store", str(whole), "--run", "long"]) == 0
    assert main(["--resume", "whole", "--store", str(whole), "--steps", str(STEPS + 2)]) == 0
    last = [row for row in recorded(whole, "long")["tokens"] if row[0] > STEPS]
    assert [row for row in recorded(whole, "whole")["tokens"] if row[0] > STEPS] == last != []


def test_what_cannot_be_resumed_is_refused(whole, capsys):
    for options, message in [
        (["--resume", "hole"], "Did you mean 'whole'?"),
        (["--resume=whole", "--seed", "3"], "only --steps may be raised: --seed 3 cannot be given"),
        (["--resume", "whole", "--steps", "3"], "--steps is 3 but the run is to have"),
    ]:
        assert main([*options, "--store", str(whole)]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture
def saved(tmp_path):
    """Parts of a run and a folder with two checkpoints of it, 1 and 2."""
    parts = prepare(parse_config([*SMALL, "--steps", "4"]))
    config, actions = parts.config.checkpoint, ActionState()
    checkpoints = checkpoint.Checkpoints(tmp_path / "c", parts, None, AlertEngine(), config, actions)
    for step in (1, 2):
        next(parts.stream)
        checkpoints.save(step)
    return parts, checkpoints


def test_a_torn_checkpoint_falls_back_to_the_one_before(saved, caplog):
    parts, checkpoints = saved
    newest = checkpoints_of(checkpoints.folder)[-1] / "parameters.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    assert checkpoint.resume(checkpoints.folder, parts, AlertEngine(), ActionState()) == 1
    assert "step-00000002 cannot be used" in caplog.text
    for path in checkpoints_of(checkpoints.folder):
        (path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints"):
        checkpoint.resume(checkpoints.folder, parts, AlertEngine(), ActionState())


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """A disk that takes small files only: no file of this process may grow past n_bytes (Python ignores SIGXFSZ)."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


SMALL_FILES = 1_000_000  # enough for the store; the parameters take 3.3 MB


def test_a_failed_write_leaves_the_old_checkpoints_alone(saved):
    checkpoints = saved[1]
    with file_size_limit(SMALL_FILES), pytest.raises(OSError, match="File too large"):
        checkpoints.save(3)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001", "step-00000002"]
    assert checkpoints.save(3).name == "step-00000003"  # once there is room


def test_a_checkpoint_that_cannot_be_written_is_one_event_and_the_next_is_tried(saved, tmp_path, caplog):
    checkpoints = saved[1]
    with Recorder(tmp_path / "store", "r") as checkpoints.recorder:
        for step, limit in ((2, SMALL_FILES), (4, resource.RLIM_INFINITY)):
            checkpoints.recorder.record(StepRecord(step, {"reward": 0.5}))
            with file_size_limit(limit):
                checkpoints.after(StepRecord(step, {}))
    assert [path.name for path in checkpoints_of(checkpoints.folder)] == ["step-00000002", "step-00000004"]
    told = rows(tmp_path / "store", "SELECT step, message FROM events WHERE kind = 'checkpoint_error'")
    assert [step for step, _ in told] == [2] and [record.message for record in caplog.records] == [told[0][1]]
    assert rows(tmp_path / "store", "SELECT step, message FROM events WHERE kind = 'checkpoint'") == [
        (4, f"Saved as {checkpoints.folder / 'step-00000004'}.")
    ]
    assert re.fullmatch(r"No checkpoint at step 2 in .*: .*File too large.*\. Training goes on.*", told[0][1])


@pytest.fixture
def held(monkeypatch):
    """Files of checkpoints are written once this event is set."""
    may_write, save = threading.Event(), checkpoint._save

    def slow(*args):
        assert may_write.wait(60)
        save(*args)

    monkeypatch.setattr(checkpoint, "_save", slow)
    return may_write


@pytest.fixture
def in_background(tmp_path):
    """Parts of a run of 6 steps, and its checkpoints, written in the background each 2 steps."""
    parts = prepare(parse_config([*SMALL, "--steps", "6", "--checkpoint.background", "always"]))
    config, actions = parts.config.checkpoint, ActionState()
    with Recorder(tmp_path / "store", "r") as recorder:
        yield parts, checkpoint.Checkpoints(tmp_path / "c", parts, recorder, AlertEngine(), config, actions)


def step_of(parts, checkpoints, step: int) -> None:
    rollouts, scored = sample_step(parts)
    parts.updater.update(token_batch(rollouts, scored, parts.task.correct_at, parts.config), step)
    checkpoints.after(StepRecord(step, {}))


def test_a_background_checkpoint_is_of_its_step_though_training_goes_on(in_background, held, tmp_path):
    parts, checkpoints = in_background
    for step in (1, 2):
        step_of(parts, checkpoints, step)
    half = checkpoints.folder / "step-00000002.tmp"
    assert half.is_dir() and checkpoints_of(checkpoints.folder) == []
    expected = {name: value.detach().clone() for name, value in parts.policy.trained().items()}
    moments = {key: v.clone() for key, v in parts.updater.optimizer.state[parts.updater.trained[0]].items()}
    generator = parts.generator.get_state().clone()
    step_of(parts, checkpoints, 3)  # while nothing of step 2 is written yet
    assert any(not torch.equal(expected[name], value) for name, value in parts.policy.trained().items())
    held.set()
    checkpoints._pending.thread.join(60)
    checkpoints.after(StepRecord(3, {}))  # the next step finds it written
    assert [path.name for path in checkpoints_of(checkpoints.folder)] == ["step-00000002"] and not half.exists()
    assert checkpoint.resume(checkpoints.folder, parts, AlertEngine(), ActionState()) == 2
    assert all(torch.equal(expected[name], value) for name, value in parts.policy.trained().items())
    found = parts.updater.optimizer.state[parts.updater.trained[0]]
    assert found.keys() == moments.keys() and all(torch.equal(found[key], moments[key]) for key in moments)
    assert torch.equal(parts.generator.get_state(), generator)


def test_the_next_background_checkpoint_and_the_last_one_wait_for_the_one_before(in_background, held):
    parts, checkpoints = in_background
    step_of(parts, checkpoints, 2)
    threading.Timer(0.5, held.set).start()
    step_of(parts, checkpoints, 4)
    assert [path.name for path in checkpoints_of(checkpoints.folder)] == ["step-00000002"]
    step_of(parts, checkpoints, 6)  # the last step's is there when `after` returns
    assert [path.name for path in checkpoints_of(checkpoints.folder)] == ["step-00000004", "step-00000006"]
    assert list(checkpoints.folder.glob("*.tmp")) == []


def test_a_background_checkpoint_that_fails_is_an_event_and_no_good_one_to_go_back_to(in_background, tmp_path):
    parts, checkpoints = in_background
    step_of(parts, checkpoints, 2)
    checkpoints.finish()
    with file_size_limit(SMALL_FILES):
        step_of(parts, checkpoints, 4)
        checkpoints._pending.thread.join(60)
    assert checkpoints.actions.good == 4
    checkpoints.finish()
    assert checkpoints.actions.good == 2
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000002"]
    checkpoints.recorder.flush(10)
    ((step, message),) = rows(tmp_path / "store", "SELECT step, message FROM events WHERE kind = 'checkpoint_error'")
    assert step == 4 and "File too large" in message
    saved = rows(tmp_path / "store", "SELECT step, message FROM events WHERE kind = 'checkpoint'")
    assert saved == [(2, f"Saved as {checkpoints.folder / 'step-00000002'}.")], "said once, of what is there"


def test_an_error_of_the_writing_thread_is_told_and_publishes_nothing(in_background, monkeypatch, caplog):
    parts, checkpoints = in_background
    monkeypatch.setattr(checkpoint, "_save", lambda *_: 1 / 0)
    step_of(parts, checkpoints, 2)
    checkpoints.finish()
    assert list(checkpoints.folder.iterdir()) == [] and "ZeroDivisionError: division by zero" in caplog.text


def test_a_policy_that_cannot_be_written_fails_the_run_and_keeps_the_older_one(tmp_path, monkeypatch, capsys):
    """Checkpoints neither: training goes on to its end. With room again the run trains its lost steps and is saved."""
    store, policy, full = tmp_path / "store", tmp_path / "policy", tmp_path / "full"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "filling.py").write_text(  # once the run is open, the disk is full
        "import os, resource\n"
        "def score(completions, **columns):\n"
        f"    if os.path.exists({str(full)!r}):\n"
        f"        resource.setrlimit(resource.RLIMIT_FSIZE, ({SMALL_FILES}, resource.RLIM_INFINITY))\n"
        "    return [float(len(text) % 2) for text in completions]\n"
    )
    options = [*SMALL, "--eval.every", "0", "--store", str(store), "--save", str(policy), "--reward", "filling:score"]
    assert main([*options, "--steps", "2", "--run", "older"]) == 0
    before = {path.name: path.read_bytes() for path in policy.iterdir()}
    capsys.readouterr()
    full.touch()
    with file_size_limit(resource.RLIM_INFINITY):
        assert main([*options, "--steps", "4", "--run", "r", "--seed", "1"]) == 1
    full.unlink()
    told = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(told) == 1 and f"to {policy}: " in told[0] and "too large" in told[0] and "--resume r" in told[0]
    assert {path.name: path.read_bytes() for path in policy.iterdir()} == before
    assert get_run(store, "r").status == "failed"
    assert rows(store, "SELECT max(step) FROM steps WHERE run = 'r' AND name = 'reward'") == [(4,)]
    assert rows(store, "SELECT step FROM events WHERE kind = 'checkpoint_error' ORDER BY 1") == [(2,), (4,)]
    assert rows(store, "SELECT count(*) FROM events WHERE kind = 'failed' AND message LIKE '%cannot be written%'") == [
        (1,)
    ]
    assert main(["--resume", "r", "--store", str(store)]) == 0
    trained = load_file(store / "checkpoints" / "r" / "step-00000004" / "parameters.safetensors")
    saved = load_file(policy / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in trained.items())
    assert sorted(path.name for path in policy.iterdir()) == sorted(before)


def test_a_run_whose_policy_alone_could_not_be_written_is_resumed_to_save_it(tmp_path):
    options = [*SMALL, "--eval.every", "0", "--steps", "2", "--store", str(tmp_path), "--run", "r"]
    (tmp_path / "policies").write_text("in the way")
    assert main(options) == 1
    (tmp_path / "policies").unlink()
    assert main(["--resume", "r", "--store", str(tmp_path)]) == 0
    assert (tmp_path / "policies" / "r" / "model.safetensors").exists()
    assert main(["--resume", "r", "--store", str(tmp_path)]) == 2  # done, and saved


def test_steps_that_were_lost_are_told_and_the_exit_code_is_1(tmp_path, monkeypatch, capsys):
    """How a recorder loses steps: tests/monitor/test_store_full.py."""
    monkeypatch.setattr(Recorder, "lost_steps", 2)
    assert main([*SMALL, "--eval.every", "0", "--steps", "1", "--store", str(tmp_path), "--run", "r"]) == 1
    assert "Run r failed: 2 steps could not be written to the store" in capsys.readouterr().err


def test_a_folder_for_the_policy_that_cannot_be_made_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*SMALL, "--steps", "1", "--store", str(tmp_path / "s"), "--save", str(tmp_path / "file" / "p")]) == 2
    assert "where nothing can be written: Not a directory" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_another_model_or_task_does_not_take_the_state(saved, caplog):
    parts, checkpoints = saved
    parts.stream._prompts = parts.stream._prompts[1:]
    with pytest.raises(CheckpointError):
        checkpoint.resume(checkpoints.folder, parts, AlertEngine(), ActionState())
    assert "training prompts then and has" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", "{}", "[" * 100_000, '{"format": 1}', "CHANGED"])
def test_a_damaged_state_falls_back_to_the_checkpoint_before(saved, caplog, text):
    """CHANGED: one digit is another, so the file still is what it was in every other way."""
    parts, checkpoints = saved
    path = checkpoints_of(checkpoints.folder)[-1] / "state.json"
    whole = path.read_text()
    path.write_text(whole.replace('"warmup_steps": 0', '"warmup_steps": 9') if text == "CHANGED" else text)
    assert path.read_text() != whole
    assert checkpoint.resume(checkpoints.folder, parts, AlertEngine(), ActionState()) == 1
    assert "step-00000002 cannot be used" in caplog.text
    path.write_text(whole)
    assert checkpoint.resume(checkpoints.folder, parts, AlertEngine(), ActionState()) == 2


@pytest.mark.parametrize("name", ["parameters", "optimizer", "rng-r000"])
def test_tensors_of_other_names_or_shapes_fall_back_to_the_checkpoint_before(saved, caplog, name):
    parts, checkpoints = saved
    for parameter in parts.updater.trained:
        parameter.grad = torch.ones_like(parameter)
    parts.updater.optimizer.step()  # so that it has moments
    parts.updater.optimizer.zero_grad()
    path = checkpoints.save(3) / f"{name}.safetensors"
    whole = load_file(path)
    first = max(whole, key=lambda key: whole[key].ndim)
    for changed in (
        {key: value for key, value in whole.items() if key != first},
        whole | {f"{first}2": whole[first].clone()},
        whole | {first: whole[first][:-1].clone()},
    ):
        save_file(changed, path)
        caplog.clear()
        assert checkpoint.resume(checkpoints.folder, parts, AlertEngine(), ActionState()) == 2
        assert "step-00000003 cannot be used" in caplog.text and "differ, the first is" in caplog.text
    save_file(whole, path)
    assert checkpoint.resume(checkpoints.folder, parts, AlertEngine(), ActionState()) == 3


def test_checkpoints_without_a_crc_are_read(saved):
    """As older versions have written them."""
    parts, checkpoints = saved
    path = checkpoints_of(checkpoints.folder)[-1] / "state.json"
    state = json.loads(path.read_text())
    del state["crc32"]
    path.write_text(json.dumps(state | {"format": 1}))
    assert checkpoint.resume(checkpoints.folder, parts, AlertEngine(), ActionState()) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "Run 'r' has no configuration of `rlvr train`"),
        ({"steps": "many"}, "that run 'r' has stored cannot be used: steps is 'many'"),
        ({"weighting": 3}, "that run 'r' has stored cannot be used: weighting is 3"),
        ({"weighting": {"kind": []}}, r"that run 'r' has stored cannot be used: Unknown weighting \[\]"),
    ],
)
def test_a_run_whose_stored_configuration_is_damaged_is_refused_in_one_line(tmp_path, capsys, config, message):
    Recorder(tmp_path, RunInfo("r", config=config)).close()
    assert main(["--resume", "r", "--store", str(tmp_path)]) == 2
    assert re.match(rf"rlvr train: .*{message}.*\n$", capsys.readouterr().err)
