"""A rollout batch of TRL's trainer, from its generation to the record of the step that ends with its last update."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from monitor.integrations.trl.inside import Head
from monitor.integrations.trl.ranks import Ranks
from monitor.records import SampleTable, StepRecord, TokenTable
from monitor.signals import TokenSignals
from monitor.signals.completions import repetition, same_text
from monitor.signals.outcomes import outcome_scalars
from monitor.signals.slabs import CUDA_SLAB_ELEMENTS, SLAB_ELEMENTS, slab_signals
from monitor.signals.stats import Statistics, loss_statistics, signal_statistics, step_record
from monitor.token_texts import TokenTexts


@dataclass(frozen=True, slots=True, eq=False)
class Used:
    """What one call of the loss used, of the rows [b] of its micro-batch; tensors [b, T], detached."""

    rows: Tensor
    log_ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl: Tensor


@dataclass(slots=True, eq=False)
class Rollouts:
    """This rank's n rows of a rollout batch, in the order before TRL shuffles them: rows of a group follow each other.

    mask bool [n, T]: tokens that the loss may use: without padding, tools' results and what TRL leaves out as
    truncated. response bool [n, T]: without padding only. group_ids int [n] on the host, counted over all ranks.
    rewards float32 [n_all, functions] and total [n_all] on the host, of all ranks; nan where no function said anything.
    old float [n, T]: log-probabilities of TRL's own pass before the updates, None if it makes none.
    sampler float [n, T]: those that vLLM reported, or None. lengths, truncated: lists on the host.
    hidden [n, T, D]: kept until there are signals. uses: micro-batches that the loss has had.
    """

    token_ids: Tensor
    mask: Tensor
    response: Tensor
    advantages: Tensor
    group_ids: Tensor
    group_size: int
    rewards: Tensor
    total: Tensor
    first: int  # of this rank's rows among those of all ranks
    prompts: list[str]
    completions: list[str]
    prompt_ids: list[str]
    completion_ids: list[list[int]]
    truncated: list[bool]
    correct_at: float
    old: Tensor | None = None
    sampler: Tensor | None = None
    hidden: Tensor | None = None
    signals: TokenSignals | None = None
    weights: Tensor | None = None
    scale: Tensor | None = None  # what the weighting's whole batch multiplies weights by, 0-d
    with_reference: bool = False
    with_clip: bool = True
    used: list[Used] = field(default_factory=list)

    @property
    def own(self) -> slice:
        """This rank's rows among those of all ranks."""
        return slice(self.first, self.first + len(self.mask))

    @property
    def correct(self) -> Tensor:
        """bool [n], on the host."""
        return self.total[self.own] >= self.correct_at

    @property
    def counted(self) -> Tensor:
        """float32 [n, T]: the weights, 1 without a weighting."""
        return self.mask.float() if self.weights is None else self.weights

    def hear(self, rows: Tensor, states: Tensor) -> None:
        """Keeps the hidden states [b, T, D] of some rows."""
        if self.hidden is None:
            self.hidden = states.new_zeros((len(self.mask), *states.shape[1:]))
        self.hidden.index_copy_(0, rows, states)


def made(
    trainer: Any,
    out: Mapping[str, Any],
    scored: tuple[Any, Any, Any, Any],
    rewards: Tensor,
    ranks: Ranks,
    correct_at: float,
) -> Rollouts:
    """The rollout batch of TRL's `out`. scored: (inputs, prompts, completions, completion_ids) given to the rewards."""
    inputs, prompts, completions, completion_ids = scored
    response = out["completion_mask"].bool()
    mask = response & out["tool_mask"].bool() if "tool_mask" in out else response
    n, size = len(mask), int(trainer.num_generations)
    first = ranks.rank * n
    tokenizer, ends = trainer._tokenizer, {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}
    prompt_ids, there = out["prompt_ids"].cpu(), out["prompt_mask"].cpu().bool()
    texts = [
        # of a conversation what the model saw
        prompt if isinstance(prompt, str) else str(tokenizer.decode(prompt_ids[row][there[row]].tolist()))
        for row, prompt in enumerate(prompts)
    ]
    rewards = rewards.detach().float().cpu()
    return Rollouts(
        token_ids=out["completion_ids"],
        mask=mask,
        response=response,
        advantages=out["advantages"],
        group_ids=torch.arange(first, first + n) // size,
        group_size=size,
        rewards=rewards,
        total=total_rewards(trainer, rewards),
        first=first,
        prompts=texts,
        completions=[
            text if isinstance(text, str) else tokenizer.decode(ids, skip_special_tokens=True)
            for text, ids in zip(completions, completion_ids, strict=True)
        ],
        prompt_ids=[_prompt_id(row, text) for row, text in zip(inputs, texts, strict=True)],
        completion_ids=[list(ids) for ids in completion_ids],
        truncated=[not len(ids) or ids[-1] not in ends for ids in completion_ids],
        correct_at=correct_at,
        sampler=out.get("sampling_per_token_logps"),
    )


def total_rewards(trainer: Any, rewards: Tensor) -> Tensor:
    """The weighted sum of the reward functions, float32 [n] on the host; nan where none of them said anything."""
    rewards = rewards.detach().float().cpu()
    total = (rewards * trainer.reward_weights.float().cpu()).nansum(1)
    total[rewards.isnan().all(1)] = torch.nan
    return total


def evaluation_scalars(totals: Tensor, group_size: int, correct_at: float) -> dict[str, float]:
    """pass@1 and, of several rollouts a prompt, pass@k with k their number; totals [prompts x k], by prompt."""
    correct = (totals >= correct_at).view(-1, group_size).float()
    found = {"eval/heldout/pass@1": float(correct.mean())}
    if group_size > 1:
        found[f"eval/heldout/pass@{group_size}"] = float(correct.amax(1).mean())
    return found


def _prompt_id(row: Mapping[str, Any], text: str) -> str:
    """The data's own id, else one that follows from the text, so that a prompt that comes again is known."""
    for name in ("prompt_id", "id"):
        if row.get(name) is not None:
            return str(row[name])
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:8]


def group_signals(batch: Rollouts, head: Head, temperature: float, ranks: Ranks) -> TokenSignals:
    """TokenSignals [n, T] of this rank's rows, from their hidden states; a group's rows may be on several ranks.

    Where they are, ranks exchange hidden states, one slab of positions at a time, and each rank works out all rows of
    the groups that it has a part of. Extra memory: a slab of hidden states of all ranks, and of logits as ever.
    """
    hidden = batch.hidden
    assert hidden is not None
    n, width, _ = hidden.shape
    most = (CUDA_SLAB_ELEMENTS if hidden.is_cuda else SLAB_ELEMENTS) // head.vocabulary
    size = batch.group_size
    if n % size == 0:  # the same on all ranks
        with head.ready() as project:
            return slab_signals(
                hidden, project, most, batch.token_ids, batch.mask, batch.group_ids, temperature=temperature
            )
    longest = ranks.largest(width)
    hidden = functional.pad(hidden, (0, 0, 0, longest - width))
    token_ids, mask = (
        ranks.gather(functional.pad(tensor, (0, longest - width))) for tensor in (batch.token_ids, batch.mask.int())
    )
    rows = slice(batch.first // size * size, -(-(batch.first + n) // size) * size)
    ids, span = torch.arange(rows.start, rows.stop) // size, max(1, most // (n + 2 * size))
    parts: list[TokenSignals] = []
    error: Exception | None = None
    with head.ready() as project:
        for start in range(0, longest, span):
            columns = slice(start, start + span)
            states = ranks.gather(hidden[:, columns])[rows]
            try:
                if error is None:
                    parts.append(
                        slab_signals(
                            states, project, most, token_ids[rows, columns], mask[rows, columns].bool(), ids,
                            temperature=temperature,
                        )
                    )  # fmt: skip
            except Exception as found:  # the other ranks go on to exchange, so this one must
                error = found
    if error is not None:
        raise error
    own = TokenSignals.concat(parts, dim=1).rows(batch.first - rows.start, batch.first - rows.start + n)
    return _of_width(own, width)


def _of_width(signals: TokenSignals, width: int) -> TokenSignals:
    """The signals cut or padded with zeros to a number of positions."""
    columns = [getattr(signals, name) for name in TokenSignals.__dataclass_fields__]
    fitted = [functional.pad(column, (0, width - column.shape[1])) for column in columns]
    return TokenSignals(*fitted)


def record_of(
    step: int,
    batches: Sequence[Rollouts],
    scalars: Mapping[str, float | Tensor],
    names: Sequence[str],
    texts: TokenTexts,
    ranks: Ranks,
) -> tuple[StepRecord, TokenTable, SampleTable]:
    """The record of a step from all rollout batches whose last update it had; one device-to-host copy.

    names: of the reward functions.
    """
    found = [batch.signals for batch in batches]
    signals = [of_batch for of_batch in found if of_batch is not None]
    assert len(signals) == len(batches)
    width = max(batch.mask.shape[1] for batch in batches)
    statistics: Statistics = reduce(operator.add, map(_signal_statistics, batches))
    losses = [_loss_statistics(batch) for batch in batches if batch.used]
    record, tokens = step_record(
        step,
        TokenSignals.concat([_of_width(of_batch, width) for of_batch in signals], dim=0),
        _rows([batch.token_ids for batch in batches], width),
        _rows([batch.mask for batch in batches], width),
        _rows([batch.counted for batch in batches], width),
        statistics,
        reduce(operator.add, losses) if losses else None,
        scalars={**_outcomes(batches, ranks), **_rewards(batches, names), **scalars},
        sum_over_ranks=ranks.sum if ranks.world > 1 else None,
    )
    unknown = [] if all(batch.with_reference for batch in batches) else ["kl"]
    unknown += [] if all(batch.with_clip for batch in batches) else ["clip_share_low", "clip_share_high"]
    kept = {key: value for key, value in record.scalars.items() if key not in unknown}
    return StepRecord(step, kept, record.histograms), tokens, _samples(batches, texts)


def _rows(tensors: Sequence[Tensor], width: int) -> Tensor:
    return torch.cat([functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])


def _signal_statistics(batch: Rollouts) -> Statistics:
    assert batch.signals is not None
    return signal_statistics(
        batch.signals,
        batch.mask,
        batch.counted,
        batch.correct,
        advantages=batch.advantages,
        sampler_logprobs=batch.sampler,
    )


def _loss_statistics(batch: Rollouts) -> Statistics:
    rows = torch.cat([used.rows for used in batch.used])
    columns = [torch.cat([getattr(used, name) for used in batch.used]) for name in Used.__dataclass_fields__]
    correct = batch.correct.to(rows.device)
    return loss_statistics(batch.mask[rows], batch.counted[rows], correct[rows], *columns[1:])


def _outcomes(batches: Sequence[Rollouts], ranks: Ranks) -> dict[str, Tensor]:
    """Scalars over the rollouts of all ranks. Rollouts without a reward are left out of those of rewards."""
    parts = []
    for number, batch in enumerate(batches):
        n, device = len(batch.mask), batch.mask.device
        total = batch.total[batch.own]
        groups = batch.group_ids + number * n * ranks.world
        lengths = [len(ids) for ids in batch.completion_ids]
        columns = {
            "rewards": total.to(device),
            "correct": (total >= batch.correct_at).to(device),
            "truncated": torch.tensor(batch.truncated, device=device),
            "lengths": torch.tensor(lengths, device=device),
            "repetition": repetition(batch.token_ids, batch.response),
            "group_ids": groups.to(device),
            "text": _text_keys(batch),
        }
        parts.append(torch.stack([column.double() for column in columns.values()], 1))
    names = ("rewards", "correct", "truncated", "lengths", "repetition", "group_ids", "text")
    rows = ranks.gather(torch.cat(parts))
    rows = rows[~rows[:, 0].isnan()] if any(batch.total.isnan().any() for batch in batches) else rows
    of_all = dict(zip(names, rows.unbind(1), strict=True))
    keys = of_all.pop("text").unsqueeze(1)
    return outcome_scalars(
        **of_all,
        same_text=same_text(keys, torch.ones_like(keys, dtype=torch.bool), of_all["group_ids"]),
    )


def _text_keys(batch: Rollouts) -> Tensor:
    """A hash of each response's tokens, small enough for float64 to hold exactly."""
    keys = [
        int.from_bytes(hashlib.sha1(np.array(ids, np.int64).tobytes()).digest()[:6]) for ids in batch.completion_ids
    ]
    return torch.tensor(keys, dtype=torch.float64, device=batch.mask.device)


def _rewards(batches: Sequence[Rollouts], names: Sequence[str]) -> dict[str, float]:
    """The mean of each reward function, where there are several."""
    if len(names) < 2:
        return {}
    means = torch.cat([batch.rewards for batch in batches]).nanmean(0).tolist()
    return {f"reward/{name}": mean for name, mean in zip(names, means, strict=True)}


def _samples(batches: Sequence[Rollouts], texts: TokenTexts) -> SampleTable:
    def joined(column: Callable[[Rollouts], Any]) -> list[Any]:
        return [value for batch in batches for value in column(batch)]

    groups = np.concatenate([batch.group_ids.numpy() for batch in batches])
    starts = np.repeat(np.arange(len(batches)), [len(batch.mask) for batch in batches])
    per_batch = max(len(batch.total) // batch.group_size for batch in batches)
    completion_ids = joined(lambda batch: batch.completion_ids)
    return SampleTable(
        sample=np.arange(len(groups), dtype=np.int32),
        group_id=(groups + starts * per_batch).astype(np.int32),
        prompt_id=joined(lambda batch: batch.prompt_ids),
        split=["train"] * len(groups),
        reward=np.concatenate([batch.total[batch.own].numpy() for batch in batches]),
        correct=np.concatenate([batch.correct.numpy() for batch in batches]),
        advantage=torch.cat([batch.advantages for batch in batches]).float().cpu().numpy(),
        n_tokens=np.array([len(ids) for ids in completion_ids], dtype=np.int32),
        truncated=np.array(joined(lambda batch: batch.truncated), dtype=bool),
        prompt=joined(lambda batch: batch.prompts),
        completion=joined(lambda batch: batch.completions),
        token_texts=texts(completion_ids),
    )
