"""From a configuration to the parts of a run, everything checked before any work starts."""

from __future__ import annotations

import platform
import resource
import subprocess
import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from monitor.records import RunInfo
from trainer.config import TrainConfig
from trainer.models import ensure_model
from trainer.parallel import Ranks
from trainer.policy import Policy, pick_device
from trainer.rewards import checked_rewards, load_reward
from trainer.rollout import encode_prompts
from trainer.scoring import PromptStream, RewardFunction, TokenTexts, evaluation_prompts
from trainer.tasks import Task, make_task
from trainer.update import Updater

_PACKAGES = ("rlvr-monitor", "torch", "transformers", "duckdb", "numpy", "wandb")


class StepClock:
    """Wall times of a step's parts, seconds. The hand-over to the recorder counts into the next step's figures."""

    def __init__(self) -> None:
        self._laps: dict[str, float] = {}
        self._handover = 0.0
        self._mark = 0.0

    def start(self) -> None:
        self._handover = self._laps.get("handover", 0.0)
        self._laps = {}
        self._mark = time.perf_counter()

    def skip(self) -> None:
        """The time since the last lap (the evaluation) counts into nothing."""
        self._mark = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = now - self._mark
        self._mark = now

    def scalars(self, tokens: int) -> dict[str, float]:
        """The perf/ scalars of the step that is being recorded."""
        record_s = self._laps["record"] + self._handover
        step_s = self._laps["rollout"] + self._laps["update"] + record_s
        return {
            "perf/step_s": step_s,
            "perf/rollout_s": self._laps["rollout"],
            "perf/update_s": self._laps["update"],
            "perf/record_s": record_s,
            "perf/tokens_per_s": tokens / step_s,
            "perf/memory_gib": peak_memory_gib(),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """All that `train` needs. `stream` yields the prompts of each step; `generator` samples the rollouts."""

    config: TrainConfig
    policy: Policy
    task: Task
    reward: RewardFunction
    updater: Updater
    stream: PromptStream
    generator: torch.Generator
    ranks: Ranks
    texts: TokenTexts
    clock: StepClock


def prepare(config: TrainConfig, ranks: Ranks = Ranks()) -> Parts:  # noqa: B008, frozen
    """Loads the task, the reward and the policy, and checks prompts and lengths.

    Every rank has its own random numbers and takes its share of each step's prompts; seeds are those of rank 0 plus
    7919 times the rank.

    Raises ValueError (RewardError for reward functions) with what to change.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    _check_ranks(config, ranks)
    torch.manual_seed(config.seed)
    task = make_task(config.task)
    train_prompts = list(task.prompts("train"))
    stream = PromptStream(train_prompts, config.rollout.prompts, config.seed)
    reward = partial(checked_rewards, load_reward(config.reward) if config.reward else task.reward)
    source = ensure_model(config.model)
    device = pick_device()
    policy = Policy.load(source, device, config.lora)
    evaluated = evaluation_prompts(config, task) if config.eval.every else {}
    for prompts in (train_prompts, *evaluated.values()):
        encode_prompts(policy, prompts, task.system_prompt, config.rollout.max_new_tokens)
    kl_to_initial = config.loss.kl_coef and config.loss.kl_reference == "initial"
    reference = Policy.load(source, device) if kl_to_initial else None
    if config.shard and ranks.world > 1:
        for sharded in (policy, reference) if reference else (policy,):
            sharded.shard(ranks)
    seed = config.seed + 7_919 * ranks.rank
    return Parts(
        config=config,
        policy=policy,
        task=task,
        reward=reward,
        updater=Updater(policy, reference, config, ranks),
        stream=stream,
        generator=torch.Generator(device).manual_seed(seed),
        ranks=ranks,
        texts=TokenTexts(policy),
        clock=StepClock(),
    )


def _check_ranks(config: TrainConfig, ranks: Ranks) -> None:
    mine, left = divmod(config.rollout.prompts, ranks.world)
    if left or config.optim.mini_batches > mine:
        raise ValueError(
            f"rollout.prompts is {config.rollout.prompts} for {ranks.world} processes and {config.optim.mini_batches} "
            "mini-batches: every process takes as many whole groups, and a mini-batch at least one. Set it "
            f"to a multiple of {ranks.world * config.optim.mini_batches}."
        )


def run_info(config: TrainConfig, name: str, processes: int = 1) -> RunInfo:
    """Who the run is: resolved configuration, commit, packages, hardware."""
    return RunInfo(
        name=name,
        model=config.model,
        task=config.task,
        weighting=config.weighting.kind,
        seed=config.seed,
        comparison=config.comparison,
        warmup_steps=config.weighting.warmup_steps,
        config=config.model_dump(mode="json"),
        environment=environment() | {"processes": processes},
    )


def environment() -> dict[str, Any]:
    """Commit, package versions and hardware, for the run's metadata."""
    folder = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=False)
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "commit": git.stdout.strip() or None,
        "uncommitted_changes": bool(dirty.stdout.strip()),
        "python": platform.python_version(),
        "packages": versions,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "device_count": torch.cuda.device_count() if cuda else 1,
        "threads": torch.get_num_threads(),
    }


def peak_memory_gib() -> float:
    """Peak memory in GiB: of the device on CUDA, else the process's largest resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
