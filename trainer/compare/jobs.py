"""Many `rlvr train` processes, at most N at a time. Finished runs are left alone, interrupted ones are resumed.

A run that an alert's action `stop` ended has done what its alerts file asks for: it is finished, a few steps shorter.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from monitor.queries.alerts import stop_step
from monitor.queries.differences import config_difference
from monitor.queries.series import latest_scalars, value_at
from monitor.store.reader import open_store
from monitor.store.runs import RunState, run_state
from monitor.store.tail import Tail
from trainer.config import ConfigError, TrainConfig
from trainer.runtime.children import end_all, run_bars, start_trainer

# settings that say where a run is stored and what it computes on: they may differ between the runs of a comparison
INCIDENTAL = ("run", "store", "mirror", "save", "wandb", "threads", "comparison")
POLL_S = 0.5


@dataclass(slots=True)
class Job:
    """One run of a comparison: its name in the store, the arguments of `rlvr train`, and what is left to do."""

    run: str
    arguments: list[str]
    config: TrainConfig
    todo: str = "start"  # start, resume or nothing


@dataclass(slots=True)
class _Active:
    job: Job
    process: subprocess.Popen[str]
    device: str
    started: float = field(default_factory=time.monotonic)


def settle(store: Path, run: str, arguments: Sequence[str], config: TrainConfig) -> Job:
    """The job for `run`, given what the store already holds of it.

    For a finished run, and for one that an alert stopped, nothing is left to do. An interrupted run is resumed if it
    has checkpoints. Without checkpoints it starts anew under the next free name `run-2`, `run-3`, ..., and the old
    record stays. Raises ConfigError if the stored run had other settings or is being trained at this moment.
    """
    name, state, number = run, None, 1
    while (found := _state(store, f"{run}-{number}" if number > 1 else run)) is not None:
        name, state, number = found.name, found, number + 1
    fresh = f"{run}-{number}" if number > 1 else run
    if state is None:
        return Job(run, [*arguments, "--run", run], config)
    _check_same(store, state, config)
    if state.status in ("running", "stalled"):
        raise ConfigError(f"Run {name!r} in {str(store)!r} is {state.status}: another process trains it. Wait for it.")
    if state.status == "finished" or stopped_by_alert(store, name) is not None:
        return Job(name, [], config, "nothing")
    if has_checkpoint(store, name):
        return Job(name, ["--resume", name, "--store", str(store)], config, "resume")
    return Job(fresh, [*arguments, "--run", fresh], config)


def stopped_by_alert(store: Path, run: str) -> int | None:
    """The step at which an alert's action `stop` ended the run; None if it ended in another way, or goes on."""
    state = run_state(store, run)
    if state is None or state.status != "stopped":
        return None
    with open_store(store) as opened:
        return stop_step(opened, run, state.attempt)


def has_checkpoint(store: Path, run: str) -> bool:
    """Whether `rlvr train --resume` has something to go on from."""
    folder = store / "checkpoints" / run
    return folder.is_dir() and any(folder.iterdir())


def devices() -> list[str]:
    """CUDA devices as CUDA_VISIBLE_DEVICES names them; [] on a machine without CUDA."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(store: Path, jobs: Sequence[Job], at_once: int, cuda: Sequence[str], console: Console) -> list[str]:
    """Runs what is left to do, at most `at_once` at a time, spread over the devices; returns the runs that failed.

    A run that fails does not stop the others; one that an alert stopped did not fail. When this returns or raises, also
    after Ctrl-C, every child process has ended and closed its run.
    """
    waiting = deque(job for job in jobs if job.todo != "nothing")
    active: list[_Active] = []
    failed: list[str] = []
    total, began = len(waiting), time.monotonic()
    tail = Tail(store, histograms=False)
    with run_bars(console, disable=not console.is_terminal) as bars:
        overall = bars.add_task("all runs", total=sum(job.config.steps for job in jobs), now="")
        tasks: dict[str, Any] = {}
        try:
            while waiting or active:
                while waiting and len(active) < at_once:
                    job = waiting.popleft()
                    active.append(_start(store, job, _least_used(cuda, active)))
                    tasks[job.run] = bars.add_task(job.run, total=job.config.steps, now="starting")
                    console.print(f"{'Resumed' if job.todo == 'resume' else 'Started'} {job.run}")
                time.sleep(POLL_S)
                for ended in [each for each in active if each.process.poll() is not None]:
                    active.remove(ended)
                    bars.remove_task(tasks.pop(ended.job.run))
                    if not _tell_end(console, store, ended, total - len(waiting) - len(active), total, began):
                        failed.append(ended.job.run)
                _advance(tail, bars, overall, tasks, jobs)
        finally:
            end_all([each.process for each in active])
            tail.close()
    return failed


def _state(store: Path, run: str) -> RunState | None:
    """The run's state, None if there is no such run. A folder without run.json is a run that was killed at once."""
    state = run_state(store, run)
    if state is None and (store / "runs" / run).exists():
        return RunState(run, "crashed", 0.0, 1, None, None, 0, 0, 0)
    return state


def _check_same(store: Path, state: RunState, config: TrainConfig) -> None:
    stored = state.info.get("config")
    if not stored:
        return
    try:
        known: dict[str, Any] = TrainConfig.of_run(stored).model_dump(mode="json", exclude=set(INCIDENTAL))
    except ConfigError:  # written by another version
        known = {key: value for key, value in stored.items() if key not in INCIDENTAL}
    asked = config.model_dump(mode="json", exclude=set(INCIDENTAL))
    differing = config_difference({"stored": known, "asked": asked})
    if differing:
        told = "; ".join(f"{key} was {row['stored']!r}, now {row['asked']!r}" for key, row in differing.items())
        raise ConfigError(
            f"Run {state.name!r} in {str(store)!r} was trained with other settings: {told}. Give those settings again, "
            "or choose another --comparison name."
        )


def _start(store: Path, job: Job, device: str) -> _Active:
    environment = {"CUDA_VISIBLE_DEVICES": device} if device else {"OMP_NUM_THREADS": str(job.config.threads or 1)}
    return _Active(job, start_trainer(job.arguments, store / "logs" / f"{job.run}.log", environment), device)


def _least_used(cuda: Sequence[str], active: Sequence[_Active]) -> str:
    in_use = [each.device for each in active]
    return min(cuda, key=in_use.count) if cuda else ""


def _advance(tail: Tail, bars: Progress, overall: Any, tasks: dict[str, Any], jobs: Sequence[Job]) -> None:
    if bars.disable:
        return
    tail.poll()
    latest = latest_scalars(tail.cursor(), [job.run for job in jobs])
    done = 0
    for job in jobs:
        steps = latest["step"][latest["run"] == job.run]
        step = int(steps.max()) if len(steps) else 0
        done += step
        if job.run in tasks and step:
            reward, entropy = (value_at(latest, job.run, name) for name in ("reward", "entropy"))
            now = f"reward {reward:.2f}  entropy {entropy:.2f} nats"
            bars.update(tasks[job.run], completed=step, now=now)
    bars.update(overall, completed=done, now=f"{done} steps")


def _tell_end(console: Console, store: Path, ended: _Active, done: int, total: int, began: float) -> bool:
    """Says how a run ended; whether it is as it should be."""
    now = time.monotonic()
    left = (now - began) / done * (total - done) / 60
    code, run = ended.process.returncode, ended.job.run
    stopped = stopped_by_alert(store, run) if code else None
    how = "finished" if not code else "failed" if stopped is None else f"was stopped by an alert at step {stopped}"
    if how == "failed":
        console.print(f"{run} ended with code {code}: see {store / 'logs' / f'{run}.log'}", style="red")
    told = f", about {left:.0f} min left" if done < total else ""
    console.print(f"{done}/{total}: {run} {how} after {now - ended.started:.0f} s{told}")
    return how != "failed"
