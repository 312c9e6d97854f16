"""From a configuration to the parts of a run. Everything is checked before any work starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from monitor.records import RunInfo
from monitor.token_texts import TokenTexts
from trainer.config import TrainConfig
from trainer.learning import optimizers
from trainer.policy.policy import Policy, WithoutAdapters, pick_device
from trainer.policy.sources import ensure_model
from trainer.rewards.weighted import Rewards, rewards_of
from trainer.rollout.prompts import PromptStream, encode_prompts, evaluation_prompts, system_prompt
from trainer.rollout.vllm_engine import check_usable, start_engine
from trainer.runtime.clock import StepClock
from trainer.runtime.environment import environment
from trainer.runtime.ranks import Ranks
from trainer.tasks import Task, make_task
from trainer.update import Updater


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """All that `train` needs. `stream` yields the prompts of each step; `generator` samples the rollouts."""

    config: TrainConfig
    policy: Policy
    task: Task
    rewards: Rewards
    updater: Updater
    stream: PromptStream
    generator: torch.Generator
    ranks: Ranks
    texts: TokenTexts
    clock: StepClock


def prepare(config: TrainConfig, ranks: Ranks = Ranks()) -> Parts:  # noqa: B008, frozen
    """Loads the task, the reward and the policy, and checks prompts and lengths.

    Every rank takes its share of each step's prompts and draws its own random numbers: its seeds are those of rank 0
    plus 7919 times the rank.

    Raises ValueError (RewardError for reward functions) with what to change.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    _check_ranks(config, ranks)
    if config.rollout.backend == "vllm":
        check_usable(ranks.world)
    optimizers.check_usable(config.optim)
    torch.manual_seed(config.seed)
    task = make_task(config.task)
    train_prompts = list(task.prompts("train"))
    stream = PromptStream(train_prompts, config.rollout.prompts, config.seed)
    rewards = rewards_of(config, task)
    source = ensure_model(config.model)
    device = pick_device()
    spread = ranks if config.shard else Ranks()
    policy = Policy.load(source, device, config.lora, spread).converse(config.rollout)
    evaluated = evaluation_prompts(config, task) if config.eval.every else {}
    sampled = [*train_prompts, *(prompt for prompts in evaluated.values() for prompt in prompts)]
    encoded = encode_prompts(policy, sampled, system_prompt(config, task), config.rollout.max_new_tokens)
    kl_to_initial = config.loss.kl_coef and config.loss.kl_reference == "initial"
    reference: Policy | WithoutAdapters | None = None
    if kl_to_initial:
        reference = WithoutAdapters(policy) if config.lora.rank else Policy.load(source, device, spread=spread)
    if config.optim.gradient_checkpointing:
        policy.checkpoint_layers()
    if config.shard and ranks.world > 1:
        for sharded in (policy, reference):
            if isinstance(sharded, Policy):
                sharded.shard(ranks, half_layers=config.shard_gather == "bfloat16")
    if config.rollout.backend == "vllm":
        start_engine(policy, config, max(map(len, encoded)))
    seed = config.seed + 7_919 * ranks.rank
    return Parts(
        config=config,
        policy=policy,
        task=task,
        rewards=rewards,
        updater=Updater(policy, reference, config, ranks),
        stream=stream,
        generator=torch.Generator(device).manual_seed(seed),
        ranks=ranks,
        texts=TokenTexts(policy.tokenizer.decode),
        clock=StepClock(),
    )


def _check_ranks(config: TrainConfig, ranks: Ranks) -> None:
    """Raises ValueError unless all processes get equally many groups, and each of their mini-batches at least one."""
    prompts, mini_batches = config.rollout.prompts, config.optim.mini_batches
    mine, left = divmod(prompts, ranks.world)
    if left:
        nearest = " or ".join(str(n * ranks.world) for n in (mine, mine + 1) if n)
        raise ValueError(
            f"rollout.prompts is {prompts} for {ranks.world} processes, but each must take the same number of whole "
            f"groups. Set it to {nearest}, or another multiple of {ranks.world}."
        )
    if mini_batches > mine:
        raise ValueError(
            f"optim.mini_batches is {mini_batches} but each of the {ranks.world} processes has {mine} of the "
            f"{prompts} groups of a step, and a mini-batch needs at least one whole group of each. Set "
            f"optim.mini_batches to {mine} or less, or rollout.prompts to {mini_batches * ranks.world} or more."
        )


def run_info(config: TrainConfig, name: str, processes: int = 1) -> RunInfo:
    """What the store records of the run: its resolved configuration, commit, packages and hardware."""
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
