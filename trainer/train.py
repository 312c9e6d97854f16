"""READ FIRST: the training loop, on one screen.

A step samples G rollouts for each of Q prompts, rewards them, compares each with its group, measures every token's
entropy and deviation, weights the tokens, updates the policy, and records all of it.

Left out on purpose: no value network (the group is the baseline), no sampler in another process (the policy samples
for itself, so rollouts are on-policy), and no recomputation for the record: what is stored is what the loss used.
`runtime/build.py` builds the parts, `update.py` is the optimizer's side, `config/` the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from torch import Tensor

from monitor.recorder import Recorder
from monitor.records import StepRecord, TokenTable
from monitor.signals.stats import signal_statistics, step_record
from trainer.errors import NonFiniteError
from trainer.evaluate import evaluate
from trainer.flow import Rollouts, Scored, TokenBatch
from trainer.learning.batch import token_batch
from trainer.learning.schedule import learning_rate
from trainer.rewards.scoring import score
from trainer.rollout.outcomes import answer_sums, function_means, lost_rewards, rollout_scalars, sampling_scalars
from trainer.rollout.prompts import encode_prompts, system_prompt
from trainer.rollout.replacement import flat_groups, with_groups_replaced
from trainer.rollout.sampling import sample
from trainer.rollout.truncation import Truncation
from trainer.runtime.build import Parts
from trainer.runtime.samples import sample_table
from trainer.runtime.stops import Stops
from trainer.update import Update

Progress = Callable[[StepRecord], None]


def train(
    parts: Parts,
    recorder: Recorder,
    progress: Progress = lambda record: None,
    *,
    first: int = 1,
    after: Sequence[Callable[[StepRecord], None]] = (),
    stops: Stops = Stops(),  # noqa: B008, without handlers
) -> None:
    """Trains `parts.policy` up to step `config.steps`, from 1 or, resumed, from `first`, and records each step.

    `after` are called with the record of each step, and of the evaluation before the first: actions, checkpoints. What
    they raise ends the run, with the weights and the record of a whole step. A signal ends the run (Interrupted, see
    `Stops`) with the weights and the record of a whole step.

    Raises NonFiniteError, naming the step, when logits, loss or gradient are not finite: the weights are untouched
    by that step and the steps recorded before stay.
    """
    config, clock = parts.config, parts.clock
    if config.eval.every and first == 1:
        with recorder.busy("evaluation"):
            before = StepRecord(0, evaluate(parts, 0, stops.check))
        recorder.record(before)
        for action in after:
            action(before)
    for step in range(first, config.steps + 1):
        with _named(step):
            clock.start()
            rollouts, scored = sample_step(parts)
            clock.lap("rollout")
            with stops.held():
                batch = token_batch(rollouts, scored, parts.task.correct_at, config)
                update = parts.updater.update(batch, step)
                clock.lap("update")
                record, tokens = describe(step, batch, scored, update, parts)
                parts.updater.control.observe(record.scalars["entropy"])
                samples = sample_table(batch, scored, parts.texts)
                clock.lap("record")
                scalars = {**record.scalars, **clock.scalars(len(tokens))}
                if config.eval.every and (step % config.eval.every == 0 or step == config.steps):
                    with recorder.busy("evaluation"):
                        scalars |= stops.cut_short(partial(evaluate, parts, step, stops.check)) or {}
                clock.skip()
                record = StepRecord(step, scalars, record.histograms)
                recorder.record(record, tokens=tokens, samples=samples)
                clock.lap("handover")
                progress(record)
                for action in after:
                    action(record)


@contextmanager
def _named(step: int) -> Iterator[None]:
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"Step {step}: {error} Lower optim.lr or optim.grad_clip.") from error


def sample_step(parts: Parts) -> tuple[Rollouts, Scored]:
    """The next step's rollouts, groups contiguous, with their rewards.

    With rollout.extra_rounds, groups whose rewards are all equal give way to others. All ranks sample a round together.
    """
    rollout, pad_id = parts.config.rollout, parts.policy.pad_id
    rollouts, scored = sample_round(parts)
    for _ in range(rollout.extra_rounds):
        if not parts.ranks.any(any(flat_groups(scored, rollout.group_size))):
            break
        others = sample_round(parts)
        rollouts, scored = with_groups_replaced(rollouts, scored, *others, rollout.group_size, pad_id)
    return rollouts, scored


def sample_round(parts: Parts) -> tuple[Rollouts, Scored]:
    """Rollouts of the next prompts, groups contiguous, with their rewards."""
    rollout = parts.config.rollout
    mine = next(parts.stream)[parts.ranks.rank :: parts.ranks.world]
    prompts = [prompt for prompt in mine for _ in range(rollout.group_size)]
    rollouts = sample(
        parts.policy,
        encode_prompts(parts.policy, prompts, system_prompt(parts.config, parts.task), rollout.max_new_tokens),
        max_new_tokens=rollout.max_new_tokens,
        temperature=parts.updater.control.temperature,
        generator=parts.generator,
        max_batch=rollout.max_batch,
        backend=rollout.backend,
        truncation=Truncation.of(rollout),
    )
    return rollouts, score(parts.policy, rollouts, prompts, parts.rewards)


def describe(
    step: int, batch: TokenBatch, scored: Scored, update: Update, parts: Parts
) -> tuple[StepRecord, TokenTable]:
    """The step's record and tokens, from what the update used; one device-to-host copy."""
    statistics = signal_statistics(
        update.signals,
        batch.mask,
        update.weights,
        batch.correct,
        advantages=batch.advantages,
        sampler_logprobs=batch.sampler_logprobs,
        sampler_ratio_max=parts.updater.config.loss.sampler_ratio_max,
        probe=update.probe,
    )
    answers = {name: value.to(batch.rewards.device) for name, value in answer_sums(batch, scored, parts.task).items()}
    statistics = replace(statistics, sums=statistics.sums | answers)
    scalars: dict[str, float | Tensor] = {
        **rollout_scalars(batch, parts.ranks),
        **function_means(scored, parts.ranks, batch.rewards.device),
        **(lost_rewards(scored, parts.ranks, batch.rewards.device) if parts.rewards.workers else {}),
        **(sampling_scalars(scored, parts.ranks, batch.rewards.device) if parts.config.rollout.extra_rounds else {}),
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "lr": learning_rate(parts.updater.config, step),
        "temperature": parts.updater.control.temperature,
        "entropy_coef": parts.updater.control.coefficient,
    }
    if (share := parts.updater.control.share) is not None:
        scalars["budget_share"] = share
    return step_record(
        step,
        update.signals,
        batch.token_ids,
        batch.mask,
        update.weights,
        statistics,
        update.loss_stats,
        scalars=scalars,
        sum_over_ranks=parts.ranks.sum if parts.ranks.world > 1 else None,
    )
