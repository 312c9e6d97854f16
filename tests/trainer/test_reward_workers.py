"""Rewards in worker processes: the same figures, and an answer that hangs or crashes costs its own reward alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_train import rows, run

from trainer.errors import RewardError
from trainer.rewards.workers import RewardWorkers

FUNCTIONS = """
import os, time

def length(prompts, completions, completion_ids, **columns):
    for text in completions:
        if text == "hangs":
            while True:
                pass
        if text == "sleeps":
            time.sleep(1000)
        if text == "dies":
            os._exit(9)
        if text == "raises":
            raise ValueError("no such answer")
    return [len(text) + len(set(prompts)) / 10 for text in completions]

def size(prompts, completions, completion_ids, **columns):
    return [len(text) for text in completions]

def slow_if_odd(prompts, completions, completion_ids, **columns):
    if os.path.exists("slow") and int(prompts[0].rstrip(":")) % 2:
        time.sleep(1000)
    return [1.0] * len(prompts)
"""
PROMPTS = ["p"] * 4 + ["q"] * 4 + ["r"] * 2


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worked_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)


def given(workers: RewardWorkers, completions: list[str]) -> list[float | None]:
    return workers.rewards(
        "worked_rewards:length", prompts=PROMPTS, completions=completions, completion_ids=[[1]] * len(PROMPTS)
    )


def test_what_hangs_sleeps_or_crashes_has_no_reward_and_nothing_else_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    workers = RewardWorkers("chain", ["worked_rewards:length"], 2, 1.0)
    texts = ["a", "bb", "hangs", "dddd", "a", "bb", "ccc", "dddd", "dies", "sleeps"]
    # the length of each, and .1 because a call has one prompt
    expected = [1.1, 2.1, None, 4.1, 1.1, 2.1, 3.1, 4.1, None, None]
    assert given(workers, texts) == expected and workers.lost == 3
    assert given(workers, ["a"] * 10) == [1.1] * 10 and workers.lost == 3
    assert given(workers, texts) == expected and workers.lost == 6
    [record] = caplog.records  # told once
    assert "worked_rewards:length took more than 1 s" in record.message and "'hangs'" in record.message


def test_a_function_that_raises_is_an_error_as_without_workers() -> None:
    workers = RewardWorkers("chain", ["worked_rewards:length"], 1, 5.0)
    with pytest.raises(RewardError, match="worked_rewards:length raised ValueError: no such answer"):
        given(workers, ["a"] * 9 + ["raises"])
    assert given(workers, ["a"] * 10) == [1.1] * 10


def test_no_rollouts() -> None:
    assert RewardWorkers("chain", ["task"], 1, 5.0).rewards("task", prompts=[], completions=[], completion_ids=[]) == []


def test_the_processes_end_with_the_one_that_made_them(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom trainer.rewards.workers import RewardWorkers\n"
        "if __name__ == '__main__':\n"
        "    workers = RewardWorkers('chain', ['worked_rewards:length'], 2, 60.0)\n"
        "    workers.rewards('worked_rewards:length', prompts=['p'], completions=['a'], completion_ids=[[1]])\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(float(sys.argv[1]))\n"
    )
    (tmp_path / "made.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])}
    for how in ("kill", "end"):
        child = subprocess.Popen(
            [sys.executable, "made.py", "0" if how == "end" else "100"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
        )  # fmt: skip
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        if how == "kill":
            os.kill(child.pid, signal.SIGKILL)
        child.wait(timeout=30)
        child.stdout.close()
        until = time.monotonic() + 30
        while processes_of(child.pid) and time.monotonic() < until:
            time.sleep(0.05)
        assert processes_of(child.pid) == []


def processes_of(session: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            told = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(told[3]) == session and told[0] != "Z":
            found.append(path.parent.name)
    return found


OPTIONS = ["--steps", "3", "--weighting.kind", "uniform", "--eval.every", "0", "--seed", "3"]


def test_a_run_is_the_same_with_workers(tmp_path: Path) -> None:
    options = [*OPTIONS, "--reward", "task,worked_rewards:size=.01"]
    assert run(tmp_path, *options, "--run", "here") == 0
    assert run(tmp_path, *options, "--run", "there", "--reward-workers", "2") == 0
    names = ("reward", "reward/task", "reward/size", "entropy", "grad_norm")
    of_run = "SELECT step, name, value FROM steps WHERE run = '{}' AND name IN {} ORDER BY ALL"
    here, there = (rows(tmp_path, of_run.format(name, names)) for name in ("here", "there"))
    assert here == there and len(here) == 3 * len(names)
    late = rows(tmp_path, "SELECT run, value FROM steps WHERE name = 'reward_timeout_share'")
    assert late == [("there", 0.0)] * 3


def test_the_share_of_rewards_out_of_time_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    options = ["--reward", "task,worked_rewards:slow_if_odd", "--reward-workers", "2", "--reward-seconds", "1"]
    assert run(tmp_path, *OPTIONS, *options, "--run", "late") == 0
    late = rows(tmp_path, "SELECT step, value FROM steps WHERE name = 'reward_timeout_share' ORDER BY step")
    odd = rows(tmp_path, "SELECT step, avg((rtrim(prompt, ':')::INT % 2)) FROM samples GROUP BY step ORDER BY step")
    # one of two rewards is late where the prompt is odd
    np.testing.assert_allclose([value for _, value in late], [share / 2 for _, share in odd])
    assert any(share > 0 for _, share in odd)
