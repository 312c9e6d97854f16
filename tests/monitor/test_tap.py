"""`rlvr tap -- COMMAND`: unchanged code that logs to wandb records here, without the real wandb or beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import rlvr_monitor
from monitor.children import HOME, RLVR
from monitor.commands.tap import SHIM

WANDB = find_spec("wandb") is not None
SCRIPT = """
import wandb
run = wandb.init(project="p", name="mine", config={"lr": 0.1}, mode="offline")
wandb.config.update({"depth": 2})
for step in range(1, 4):
    wandb.log({"actor/entropy": 1 / step, "my/own": step}, step=step)
wandb.finish()
"""


def tap(tmp_path: Path, *arguments: str, script: str = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script under `rlvr tap`; `arguments` before the `--`."""
    (tmp_path / "script.py").write_text(script)
    command = [*RLVR, "tap", *arguments, "--", sys.executable, "script.py"]
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "RLVR_"))}
    settings |= {"PYTHONPATH": str(HOME), "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path), **environment}
    return subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=240)


def ask(tmp_path: Path, query: str) -> list[tuple[Any, ...]]:
    with rlvr_monitor.open_store(tmp_path / "runs") as opened:
        return list(opened.sql(query).rows)


RECORDED = [
    ("entropy", 1, 1.0), ("entropy", 2, 0.5), ("entropy", 3, 1 / 3),
    ("my/own", 1, 1.0), ("my/own", 2, 2.0), ("my/own", 3, 3.0),
]  # fmt: skip
SERIES = "SELECT name, step, value FROM steps WHERE name NOT LIKE 'perf/%' ORDER BY name, step"


def test_without_the_real_wandb_everything_is_recorded_and_nothing_else_is_made(tmp_path):
    done = tap(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert ask(tmp_path, SERIES) == RECORDED
    with rlvr_monitor.open_store(tmp_path / "runs") as opened:
        state = opened.run("mine")
    assert (state.status, state.info["config"]) == ("finished", {"lr": 0.1, "depth": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "script.py"]


@pytest.mark.skipif(not WANDB, reason="wandb is not installed")
def test_beside_the_real_wandb_both_record(tmp_path):
    script = SCRIPT.replace("wandb.finish()", "assert wandb.Artifact and run.offline\nwandb.finish()")
    done = tap(tmp_path, "--real", script=script)
    assert done.returncode == 0, done.stderr
    assert ask(tmp_path, SERIES) == RECORDED
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")  # its own file is there too
    assert written.stat().st_size > 500
    with rlvr_monitor.open_store(tmp_path / "runs") as opened:
        state = opened.run("mine")
    assert (state.status, state.info["config"]) == ("finished", {"lr": 0.1, "depth": 2})


def test_children_are_tapped_the_store_is_where_the_command_began_and_the_exit_code_is_its_own(tmp_path):
    child = "import wandb; wandb.init(); wandb.log({'reward': 1.0})"
    script = (
        "import os, subprocess, sys\nos.makedirs('elsewhere')\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], cwd='elsewhere', check=True)\n"
        "print('out'); print('err', file=sys.stderr); sys.exit(7)"
    )
    done = tap(tmp_path, "--run", "child", script=script)
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    assert ask(tmp_path, "SELECT run, name, value FROM steps WHERE name = 'reward'") == [("child", "reward", 1.0)]
    again = tap(tmp_path, "--run", "child", script=script)
    assert again.returncode == 2 and "Run 'child' already exists in store 'runs'" in again.stderr


def test_callers_find_the_submodules_and_the_version_they_look_for(tmp_path):
    script = """
import importlib.metadata, importlib.util, sys
assert importlib.util.find_spec("wandb") is not None
import wandb, wandb.sdk, wandb.apis.public
from wandb.sdk.lib.config_util import ConfigError
from wandb.sdk.wandb_run import Run
from wandb.errors import CommError, UsageError
assert issubclass(ConfigError, Exception) and issubclass(CommError, Exception)
assert hasattr(wandb, "run") and wandb.run is None and importlib.util.find_spec("wandb") is not None
assert importlib.metadata.version("wandb")
import rlvr_monitor.wandb
assert sys.modules["rlvr_monitor.wandb"] is wandb
"""
    done = tap(tmp_path, script=script)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tap has no command. Expected: rlvr tap [OPTIONS] -- COMMAND"),
        (["--", "no-such-program"], "'no-such-program' is no program here"),
        (["--run", "a b", "--", "python"], "--run is 'a b', expected up to 100 letters"),
    ],
)
def test_wrong_use_is_told(tmp_path, arguments, message):
    done = subprocess.run([*RLVR, "tap", *arguments], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(HOME)})  # fmt: skip
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize("real", [True, False])
def test_a_python_without_our_packages_is_told_and_the_real_wandb_goes_on(tmp_path, real):
    """-S: none of the installed packages; what stands for the real wandb lies in a folder of PYTHONPATH."""
    (tmp_path / "wandb.py").write_text("name = 'the real one'")
    environment = {"PYTHONPATH": os.pathsep.join([str(SHIM), str(tmp_path)]), "RLVR_TAP": "real" if real else "alone"}
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", "import wandb; print(wandb.name)"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert f"rlvr tap: the Python that runs this, {sys.executable}, cannot import rlvr-monitor" in done.stderr
    assert (done.returncode, done.stdout) == ((0, "the real one\n") if real else (1, ""))


HF = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
import torch
from transformers import Trainer, TrainingArguments
import tiny_trl
data = [{{"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7]}} for _ in range(8)]
args = TrainingArguments(output_dir="out", max_steps=3, logging_steps=1, report_to="wandb", use_cpu=True, bf16=False,
                         run_name="hf", disable_tqdm=True, save_strategy="no", eval_strategy="steps", eval_steps=3,
                         per_device_train_batch_size=4, seed=11)
Trainer(model=tiny_trl.model(), args=args, train_dataset=data, eval_dataset=data).train()
"""
TRL = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
from pathlib import Path
import tiny_trl
from trl import GRPOTrainer
GRPOTrainer._send_telemetry = lambda self: None
trainer = tiny_trl.trainer(Path("."), report_to="wandb", run_name="trl", log_completions=True)
trainer.train()
"""
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")


@needs_trl
@pytest.mark.parametrize("real", [False, True])
def test_transformers_own_callback_records(tmp_path, real):
    if real and not WANDB:
        pytest.skip("wandb is not installed")
    script = HF.format(tests=str(HOME / "tests"))
    done = tap(tmp_path, *(["--real"] if real else []), script=script, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    found = {(name, step): value for name, step, value in ask(tmp_path, SERIES)}
    assert [step for name, step in found if name == "loss"] == [1, 2, 3]
    assert [step for name, step in found if name == "grad_norm"] == [1, 2, 3]
    assert found["lr", 1] == pytest.approx(5e-5) and ("eval/loss", 3) in found  # learning_rate; a loss of its own
    with rlvr_monitor.open_store(tmp_path / "runs") as opened:
        state = opened.run("hf")
    assert (state.status, state.info["seed"]) == ("finished", 11)
    assert state.info["config"]["max_steps"] == 3 and state.info["config"]["model/num_parameters"] > 1000


@needs_trl
def test_trls_own_log_records_with_its_completions(tmp_path):
    done = tap(tmp_path, script=TRL.format(tests=str(HOME / "tests")))
    assert done.returncode == 0, done.stderr
    found = {(name, step): value for name, step, value in ask(tmp_path, SERIES)}
    for name in ("reward", "entropy", "lr", "zero_variance_share", "response_length", "clip_share_high"):
        assert [step for key, step in found if key == name] == [1, 2, 3], name
    assert ("rewards/low_words/mean", 1) in {(name.removeprefix("train/"), step) for name, step in found}
    samples = ask(tmp_path, "SELECT step, count(*), min(length(completion)) FROM samples GROUP BY step ORDER BY step")
    assert [(step, n) for step, n, _ in samples] == [(1, 8), (2, 8), (3, 8)] and min(row[2] for row in samples) > 0


VERL = """
from verl.utils.tracking import Tracking, ValidationGenerationsLogger
tracking = Tracking("project", "mine", ["console", "wandb"], {"trainer": {"project_name": "project"}})
validation = ValidationGenerationsLogger(project_name="project", experiment_name="mine")
for step in (1, 2):
    tracking.log({"actor/entropy": 0.5 / step, "critic/score/mean": 0.25, "training/global_step": step,
                  "val-core/math/acc/mean@4": 0.5}, step)
    validation.log(["wandb"], [["question", "answer", 1.0]], step)
tracking.finish()
"""


@pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")
@pytest.mark.parametrize("real", [False, True])
def test_verls_own_tracking_records(tmp_path, real):
    if real and not WANDB:
        pytest.skip("wandb is not installed")
    done = tap(tmp_path, *(["--real"] if real else []), script=VERL, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert ask(tmp_path, SERIES) == [
        ("entropy", 1, 0.5), ("entropy", 2, 0.25), ("eval/math/pass@1", 1, 0.5), ("eval/math/pass@1", 2, 0.5),
        ("reward", 1, 0.25), ("reward", 2, 0.25),
    ]  # fmt: skip
    with rlvr_monitor.open_store(tmp_path / "runs") as opened:
        assert opened.run("mine").status == "finished"


OPENRLHF = """
from argparse import Namespace
from openrlhf.utils.logging_utils import WandbLogger
wandb = Namespace(key="k", org=None, project="p", group="g", run_name="mine")
logger = WandbLogger(Namespace(logger=Namespace(wandb=wandb), seed=5))
for step in (1, 2):
    logger.log_train(step, {"entropy_loss": 0.5 / step, "ppo_clip_ratio": 0.1, "reward": 0.25, "actor_lr": None,
                            "generated_samples": ["a text", 1.0]})
logger.log_eval(2, {"eval_math_pass1": 0.75})
logger.close()
"""


@pytest.mark.skipif(find_spec("openrlhf") is None, reason="openrlhf is not installed")
def test_openrlhfs_own_logger_records(tmp_path):
    done = tap(tmp_path, script=OPENRLHF)
    assert done.returncode == 0, done.stderr
    assert ask(tmp_path, SERIES) == [
        ("entropy", 1, 0.5), ("entropy", 2, 0.25), ("eval/math/pass@1", 2, 0.75), ("reward", 1, 0.25),
        ("reward", 2, 0.25), ("train/ppo_clip_ratio", 1, 0.1), ("train/ppo_clip_ratio", 2, 0.1),
    ]  # fmt: skip
    assert ask(tmp_path, "SELECT step, completion, reward FROM samples ORDER BY step") == [
        (1, "a text", 1.0), (2, "a text", 1.0)
    ]  # fmt: skip
