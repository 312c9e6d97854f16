"""Commands in a folder whose modules are called like ours, each as a process of its own, as a user starts it.

tests/trainer/test_compare.py, test_demo.py and test_parallel.py run commands that start others in the same folder.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from trainer.commands.train import parse_config
from trainer.errors import RewardError
from trainer.rewards.loading import load_reward

SMALL = (
    "--steps 2 --rollout.prompts 2 --rollout.group-size 2 --rollout.max-new-tokens 8 --eval.prompts 2 "
    "--eval.samples 2 --eval.k 2 --eval.splits heldout --weighting.warmup-steps 0"
).split()
SCRIPT = Path(sys.executable).with_name("rlvr")


def rlvr(folder: Path, *arguments: str, command: tuple[str, ...] = (str(SCRIPT),)) -> str:
    """Standard output of `rlvr ARGUMENTS`, which must end well."""
    done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(crowded_folder: Path) -> Path:
    rlvr(crowded_folder, "train", *SMALL, "--run", "r", "--reward", "my_rewards:always")
    return crowded_folder


def test_train_takes_the_users_reward_and_our_trainer(trained: Path) -> None:
    answer = "SELECT avg(reward), count(*) FROM samples WHERE split = 'train'"
    assert json.loads(rlvr(trained, "sql", answer, "--format", "json")) == [{"avg(reward)": 1.0, "count_star()": 8}]


def test_ls_show_and_check_read_the_run(trained: Path) -> None:
    assert [run["run"] for run in json.loads(rlvr(trained, "ls", "--json"))] == ["r"]
    assert json.loads(rlvr(trained, "show", "r", "--json"))["status"] == "finished"
    assert json.loads(rlvr(trained, "check", "r", "--json"))["alerts"] == []
    assert "0 damaged" in rlvr(trained, "store", "check")


def test_eval_samples_the_final_policy(trained: Path) -> None:
    options = "--samples 2 --k 1 --prompts 2 --split heldout --max-new-tokens 8 --json".split()
    assert json.loads(rlvr(trained, "eval", "r", *options))["splits"]["heldout"]["prompts"] == 2


def test_dashboard_serves_our_pages(trained: Path) -> None:
    command = [str(SCRIPT), "dashboard", "--no-browser"]
    process = subprocess.Popen(command, cwd=trained, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.removeprefix("Dashboard: ").strip()
        assert url.startswith("http://127.0.0.1:"), line + (process.stderr.read() if not line else "")
        with urllib.request.urlopen(f"{url}/app/static/plotly.min.js", timeout=10) as answer:
            assert answer.status == 200
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_module_run_does_not_search_the_working_folder(crowded_folder: Path, tmp_path: Path) -> None:
    """`python -m monitor.cli` puts the working folder first; only a module called monitor can still be in the way."""
    for name in ("trainer", "dashboard"):
        (tmp_path / f"{name}.py").write_text((crowded_folder / "trainer.py").read_text())
    command = (sys.executable, "-m", "monitor.cli")
    assert "--steps" in rlvr(tmp_path, "train", "--help", command=command)
    assert "--port" in rlvr(tmp_path, "dashboard", "--help", command=command)


def test_a_reward_in_a_file_that_is_called_like_ours_is_told_so() -> None:
    with pytest.raises(RewardError, match=r"has no function 'mine'\. .*'trainer' is a package of rlvr-monitor: call"):
        load_reward("trainer:mine")


def test_presets_go_before_folders_and_files_of_their_name(crowded_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(crowded_folder)
    assert parse_config(["demo"]) == parse_config([str(Path(__file__).parents[1] / "trainer/presets/demo.toml")])
    (tmp_path / "paper-math").write_text("steps = 3")
    monkeypatch.chdir(tmp_path)
    assert parse_config(["paper-math"]).rollout.max_new_tokens == 2048
    assert parse_config(["./paper-math"]).steps == 3  # a path says that the file is meant
