"""Checkpoints and `rlvr train --resume`: bit-identical after SIGKILL, atomic, kept, refused where they cannot serve."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from monitor.alerts.engine import AlertEngine
from monitor.store.reader import open_store
from trainer.commands.train import main, parse_config
from trainer.runtime import checkpoint
from trainer.runtime.build import prepare
from trainer.runtime.checkpoint import CheckpointError, checkpoints_of

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


def killed_after(command: list[str], beats: Path, attempt: int, step: int, delay_s: float) -> bool:
    """SIGKILL `delay_s` after `step` is durable; False if the run ended before."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    beat = beats / f"heartbeat-r000-a{attempt:03d}.json"
    try:
        while process.poll() is None:
            if beat.exists() and (json.loads(beat.read_text())["acknowledged"] or 0) >= step:
                time.sleep(delay_s)
                process.kill()
            time.sleep(0.02)
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
    beats = whole / "runs" / "cut"
    rng = random.Random(time.time_ns())
    first = [*rlvr, *SMALL, "--steps", str(STEPS), "--store", str(whole), "--run", "cut"]
    resume = [*rlvr, "--resume", "cut", "--store", str(whole)]
    delays = [rng.uniform(0, 0.6), rng.uniform(0, 0.6)]
    assert killed_after(first, beats, 1, 2, delays[0]), delays
    assert killed_after(resume, beats, 2, 5, delays[1]), delays
    done = subprocess.run(resume, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for part, expected in recorded(whole, "whole").items():
        assert recorded(whole, "cut")[part] == expected, (part, delays)
    policies = [load_file(whole / "policies" / run / "model.safetensors") for run in ("whole", "cut")]
    assert all(torch.equal(policies[1][name], value) for name, value in policies[0].items())
    attempts = json.loads((whole / "runs" / "cut" / "run.json").read_text())["attempts"]
    assert [one["attempt"] for one in attempts] == [1, 2, 3]


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
    checkpoints = checkpoint.Checkpoints(tmp_path / "c", parts, None, AlertEngine(), parts.config.checkpoint)
    for step in (1, 2):
        next(parts.stream)
        checkpoints.save(step)
    return parts, checkpoints


def test_a_torn_checkpoint_falls_back_to_the_one_before(saved, caplog):
    parts, checkpoints = saved
    newest = checkpoints_of(checkpoints.folder)[-1] / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    assert checkpoint.resume(checkpoints.folder, parts, AlertEngine()) == 1
    assert "step-00000002 cannot be used" in caplog.text
    for path in checkpoints_of(checkpoints.folder):
        (path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints"):
        checkpoint.resume(checkpoints.folder, parts, AlertEngine())


def test_a_failed_write_leaves_the_old_checkpoints_alone(saved, monkeypatch):
    checkpoints = saved[1]

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(3)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001", "step-00000002"]


def test_training_goes_on_without_a_disk_for_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.Checkpoints, "save", lambda self, step: (_ for _ in ()).throw(OSError("disk full")))
    assert main([*SMALL, "--steps", "2", "--eval.every", "0", "--store", str(tmp_path), "--run", "r"]) == 0
    assert rows(tmp_path, "SELECT step, message FROM events WHERE kind = 'checkpoint_error'") == [
        (2, "No checkpoint at step 2: disk full.")
    ]


def test_another_model_or_task_does_not_take_the_state(saved):
    parts, checkpoints = saved
    for path in checkpoints_of(checkpoints.folder):
        state = json.loads((path / "state.json").read_text())
        state["stream"]["prompts"] += 1
        (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError):
        checkpoint.resume(checkpoints.folder, parts, AlertEngine())
