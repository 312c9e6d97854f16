"""`rlvr compare`: a tiny comparison end to end, then what a rerun does, with children that only pretend to train."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from monitor.children import RLVR
from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord
from trainer.commands import compare
from trainer.compare import jobs as jobs_module
from trainer.compare.arms import parse_arms
from trainer.compare.jobs import Job, run_jobs, settle, stopped_by_alert
from trainer.config import ConfigError, TrainConfig

SMALL = (
    "--steps 2 --rollout.prompts 4 --rollout.group-size 2 --eval.prompts 2 --eval.choice first --eval.samples 4 "
    "--eval.splits heldout --weighting.warmup-steps 0"
).split()


def rlvr(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RLVR, *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, crowded_folder) -> tuple[list[str], Path, subprocess.CompletedProcess[str]]:
    store = tmp_path_factory.mktemp("compare") / "store"
    command = ["compare", "--arms", "uniform", "ict:keep=0.3", "--seeds", "2", *SMALL, "--store", str(store)]
    return command, store, rlvr(crowded_folder, *command)


def test_arms_and_seeds_are_trained_paired_and_stored(compared):
    _, store, done = compared
    assert done.returncode == 0, done.stderr
    runs = {f"compare-{arm}-s{seed}" for arm in ("uniform", "ict-keep0.3") for seed in (0, 1)}
    assert {path.name for path in (store / "runs").iterdir()} == runs | {"_seed"}
    infos = {run: json.loads((store / "runs" / run / "run.json").read_text()) for run in runs}
    assert {info["comparison"] for info in infos.values()} == {"compare"}
    assert infos["compare-ict-keep0.3-s1"]["config"]["weighting"]["keep"] == 0.3
    assert {info["environment"]["threads"] for info in infos.values()} == {1}
    found = json.loads((store / "comparisons" / "compare.json").read_text())
    assert found["arms"]["ict:keep=0.3"] == {"0": "compare-ict-keep0.3-s0", "1": "compare-ict-keep0.3-s1"}
    steps = [row for row in found["rows"] if row["figure"] == "steps"]
    assert [row["mean"] for row in steps] == [2.0, 2.0]
    assert done.stdout.startswith(f"{found['verdicts']['ict:keep=0.3']}\n")
    assert found["verdicts"]["ict:keep=0.3"].startswith("ict:keep=0.3 against uniform, 2 pairs: too few to tell; ")
    assert "At the last step" in done.stdout and "4/4: compare-" in done.stderr
    assert (store / "comparisons" / "compare.html").stat().st_size > 1e6


def test_a_rerun_trains_nothing_and_other_settings_are_an_error(compared, crowded_folder, capsys):
    command, store, first = compared
    before = {path: path.stat().st_mtime_ns for path in (store / "runs").rglob("*.parquet")}
    again = rlvr(crowded_folder, *command)
    assert again.returncode == 0 and "0 runs to do" in again.stderr and again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in (store / "runs").rglob("*.parquet")} == before
    assert compare.main([*command[1:], "--optim.lr", "0.5"]) == 2
    told = capsys.readouterr().err
    assert "'compare-uniform-s0'" in told and "optim.lr was 0.0001, now 0.5" in told
    assert compare.main(["--store", str(store), "--show", "compare", "--markdown"]) == 0
    assert "| pass@1, heldout |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "uniform", "itc"], "Did you mean 'ict'?"),
        (["--arms", "uniform"], "needs at least two arms"),
        (["--seeds", "0"], "--seeds is 0, expected how many"),
        (["--seeds", "1", "1"], "--seeds is 1 1, expected how many"),
        (["--jobs", "0"], "--jobs is 0, expected at least 1"),
        (["--seed", "3"], "--seed is set for every run by rlvr compare"),
        (["--weighting.kind", "ict"], "--weighting.kind is set for every run"),
        (["--comparison", "a/b"], "--comparison is 'a/b'"),
        (["dmo"], "No preset 'dmo'. Did you mean 'demo'?"),
        (["--save", "x"], "--save is set for every run"),
        (["--show", "nothing"], "No comparison 'nothing'"),
    ],
)
def test_wrong_use_is_told_before_anything_starts(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = compare.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def stored_run(
    store: Path, name: str, config: TrainConfig, status: str, *, steps: int = 1, alert: bool = False
) -> None:
    """alert: the run's last event is that of the action `stop`."""
    info = RunInfo(name=name, model="m", task="t", weighting="ict", seed=0, config=config.model_dump(mode="json"))
    recorder = Recorder(store, info)
    for step in range(1, steps + 1):
        recorder.record(StepRecord(step, {"reward": 1.0, "entropy": 0.5}))
    if alert:
        recorder.event("action", "stop for entropy_collapse (warning): Entropy is low.", steps)
    recorder.close(status)


def test_what_is_left_to_do_depends_on_what_the_store_holds(tmp_path):
    config = TrainConfig(steps=5)
    assert settle(tmp_path, "new", ["a"], config) == Job("new", ["a", "--run", "new"], config)
    stored_run(tmp_path, "done", TrainConfig(steps=5, threads=1, comparison="old"), "finished")
    assert settle(tmp_path, "done", ["a"], config).todo == "nothing"
    stored_run(tmp_path, "cut", config, "stopped")
    assert settle(tmp_path, "cut", ["a"], config) == Job("cut-2", ["a", "--run", "cut-2"], config)
    assert (tmp_path / "runs" / "cut" / "run.json").exists()  # what it recorded stays
    (tmp_path / "checkpoints" / "cut").mkdir(parents=True)
    assert settle(tmp_path, "cut", ["a"], config).todo == "start"  # an empty folder holds no checkpoint
    (tmp_path / "checkpoints" / "cut" / "step-3").mkdir()
    resumed = settle(tmp_path, "cut", ["a"], config)
    assert resumed == Job("cut", ["--resume", "cut", "--store", str(tmp_path)], config, "resume")
    stored_run(tmp_path, "cut-2", config, "finished")
    assert settle(tmp_path, "cut", ["a"], config) == Job("cut-2", [], config, "nothing")
    (tmp_path / "runs" / "torn").mkdir()  # killed before it wrote its metadata
    assert settle(tmp_path, "torn", ["a"], config).run == "torn-2"
    with pytest.raises(ConfigError, match=r"'done' .* other settings: steps was 5, now 6"):
        settle(tmp_path, "done", [], TrainConfig(steps=6))
    live = Recorder(tmp_path, RunInfo(name="live", model="m", task="t", weighting="ict", seed=0))
    with pytest.raises(ConfigError, match=r"'live' .* is running: another process trains it"):
        settle(tmp_path, "live", [], config)
    live.close("finished")


def test_a_run_that_an_alert_stopped_is_finished_until_it_is_resumed(tmp_path):
    config = TrainConfig(steps=5)
    stored_run(tmp_path, "early", config, "stopped", alert=True)
    (tmp_path / "checkpoints" / "early" / "step-1").mkdir(parents=True)
    assert settle(tmp_path, "early", ["a"], config) == Job("early", [], config, "nothing")
    assert stopped_by_alert(tmp_path, "early") == 1
    Recorder(tmp_path, "early", resume=True).close("stopped")  # someone went on with it, and it was interrupted
    assert stopped_by_alert(tmp_path, "early") is None
    assert settle(tmp_path, "early", ["a"], config).todo == "resume"
    stored_run(tmp_path, "lost", config, "failed", alert=True)  # its steps could not be written: it did fail
    assert settle(tmp_path, "lost", ["a"], config).todo == "start"


def test_a_comparison_keeps_the_figures_of_a_run_that_an_alert_stopped(tmp_path, monkeypatch, capsys):
    """The run ends with code 3, which is no failure: its one step stands in the table, and the exit code is 0."""
    arguments = ["--arms", "uniform", "ict", "--seeds", "1", "--comparison", "c", "--store", str(tmp_path)]
    base = TrainConfig(store=str(tmp_path))
    grid = compare.plan(base, [], parse_arms(["uniform", "ict"]), [0], "c", on_cpu=True)
    stored_run(tmp_path, "c-uniform-s0", grid["uniform", 0].config, "finished", steps=3)
    pretend(monkeypatch, "import sys; sys.exit(3)")
    told = Console(file=io.StringIO(), width=200)
    stored_run(tmp_path, "c-ict-s0", grid["ict", 0].config, "stopped", alert=True)
    assert run_jobs(tmp_path, [grid["ict", 0]], 1, [], told) == []
    said = told.file.getvalue()
    assert "1/1: c-ict-s0 was stopped by an alert at step 1 after" in said and "code 3" not in said
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **kw: SimpleNamespace(returncode=0))  # no report
    assert compare.main(arguments) == 0
    assert "Stopped by an alert, with fewer steps than the others: c-ict-s0 at step 1." in " ".join(
        capsys.readouterr().out.split()
    )
    found = json.loads((tmp_path / "comparisons" / "c.json").read_text())
    assert found["arms"]["ict"] == {"0": "c-ict-s0"} and found["failed"] == []
    assert {row["arm"]: row["mean"] for row in found["rows"] if row["figure"] == "steps"} == {"uniform": 3, "ict": 1}


def test_the_plan_goes_seed_by_seed_and_refuses_what_belongs_to_one_run(tmp_path):
    base = TrainConfig(store=str(tmp_path))
    arms = parse_arms(["uniform", "ict:lr=1e-5"])
    grid = compare.plan(base, ["--steps", "3"], arms, [4, 7], "c", on_cpu=True)
    assert [job.run for job in grid.values()] == [
        "c-uniform-s4", "c-ict-lr1e-5-s4", "c-uniform-s7", "c-ict-lr1e-5-s7"
    ]  # fmt: skip
    job = grid["ict:lr=1e-5", 7]
    assert job.config.optim.lr == 1e-5 and job.config.seed == 7
    assert (
        job.arguments
        == (
            "--steps 3 --threads 1 --weighting.kind ict --optim.lr 1e-5 --seed 7 --comparison c --run c-ict-lr1e-5-s7"
        ).split()
    )
    with pytest.raises(ConfigError, match="but a comparison has many runs"):
        compare.plan(TrainConfig(save="x"), [], arms, [0], "c", on_cpu=True)


def pretend(monkeypatch, script: str) -> list[tuple[str, str]]:
    """Children run `script` with the run's name as argument; returns (run, device) of each start."""
    started: list[tuple[str, str]] = []

    def start(arguments, log, environment):
        started.append((log.stem, environment.get("CUDA_VISIBLE_DEVICES", "")))
        return subprocess.Popen([sys.executable, "-c", script, log.stem], text=True, start_new_session=True)

    monkeypatch.setattr(jobs_module, "start_trainer", start)
    monkeypatch.setattr(jobs_module, "POLL_S", 0.05)
    return started


def test_a_failed_run_is_reported_and_the_others_go_on_over_all_devices(tmp_path, monkeypatch):
    started = pretend(monkeypatch, "import sys, time; time.sleep(0.3); sys.exit(sys.argv[1] == 'b')")
    jobs = [Job(name, [], TrainConfig()) for name in "abcd"] + [Job("done", [], TrainConfig(), "nothing")]
    told = Console(file=io.StringIO(), width=200)
    assert run_jobs(tmp_path, jobs, 2, ["0", "3"], told) == ["b"]
    assert sorted(run for run, _ in started) == ["a", "b", "c", "d"]
    assert {device for _, device in started[:2]} == {"0", "3"} == {device for _, device in started}
    said = told.file.getvalue()
    assert "b ended with code 1: see" in said and "4/4: " in said


def test_no_more_than_the_asked_number_runs_at_a_time(tmp_path, monkeypatch):
    """Children end only where the loop would sleep, one at a time: how many run then is no matter of speed."""
    children: list[subprocess.Popen[str]] = []
    counts: list[int] = []

    def start(arguments, log, environment):
        children.append(subprocess.Popen([sys.executable, "-c", "input()"], text=True, stdin=subprocess.PIPE))
        return children[-1]

    def sleep(seconds):
        running = [child for child in children if child.poll() is None]
        counts.append(len(running))
        running[0].communicate("\n")

    monkeypatch.setattr(jobs_module, "start_trainer", start)
    monkeypatch.setattr(jobs_module, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    assert run_jobs(tmp_path, [Job(n, [], TrainConfig()) for n in "abcde"], 2, [], Console(file=io.StringIO())) == []
    assert counts == [2, 2, 2, 2, 1]


def test_ctrl_c_ends_every_child(tmp_path):
    """A real comparison, interrupted while two children train: both close their runs, nothing is left running."""
    command = [*RLVR, "compare", "--seeds", "1", "--arms", "uniform", "ict", "--jobs", "2"]
    options = [*SMALL, "--steps", "5000", "--eval.every", "0", "--store", str(tmp_path)]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    beats = [tmp_path / "runs" / f"compare-{arm}-s0" / "heartbeat-r000-a001.json" for arm in ("uniform", "ict")]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not all(
        beat.exists() and (json.loads(beat.read_text())["acknowledged"] or 0) >= 1 for beat in beats
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "The same command goes on from here." in told
    ended = [json.loads(beat.read_text()) for beat in beats]
    assert {beat["status"] for beat in ended} == {"stopped"}
    for beat in ended:
        with pytest.raises(ProcessLookupError):
            os.kill(beat["pid"], 0)
