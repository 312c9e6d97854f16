"""Evaluation: pass@1, the unbiased pass@k and the number of distinct correct answers, for each split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from trainer.config import TrainConfig
from trainer.policy.policy import Policy
from trainer.rewards.scoring import score
from trainer.rewards.weighted import Rewards
from trainer.rollout.prompts import encode_prompts, evaluation_prompts, system_prompt
from trainer.rollout.sampling import sample
from trainer.rollout.truncation import Truncation
from trainer.runtime.build import Parts
from trainer.tasks import Prompt, Task


def pass_at_k(n_correct: np.ndarray, n_samples: int, k: int) -> np.ndarray:
    """Unbiased chance that at least one of k samples is correct: 1 - C(n - c, k) / C(n, k).

    n_correct int [prompts], of n_samples drawn -> float64 [prompts] in [0, 1]. Computed as
    1 - prod_{i = n - c + 1}^{n} (1 - k / i). Raises ValueError if k > n_samples.
    Source: Chen et al. 2021, arXiv 2107.03374. Example: c = 1 of n = 4, k = 2: 1 - C(3,2)/C(4,2) = 0.5.
    """
    if k > n_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples of each prompt, got {n_samples}. Raise eval.samples.")
    i = np.arange(1, n_samples + 1)
    factors = np.where(i > n_samples - np.asarray(n_correct)[:, None], 1.0 - k / i, 1.0)
    return 1.0 - np.prod(np.clip(factors, 0.0, 1.0), axis=1)


class Evaluable(Protocol):
    """What an evaluation needs of a run's Parts."""

    @property
    def config(self) -> TrainConfig: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def task(self) -> Task: ...
    @property
    def rewards(self) -> Rewards: ...


@dataclass(frozen=True, slots=True, eq=False)
class SplitOutcome:
    """What `samples` samples of each prompt of one split gave; every array is [prompts].

    n_correct: how many were correct. distinct: how many distinct forms the correct ones had, None if the task has no
    forms. response_length: their mean length in tokens. truncated: the share cut off at max_new_tokens.
    """

    samples: int
    n_correct: np.ndarray
    distinct: np.ndarray | None
    response_length: np.ndarray
    truncated: np.ndarray


def evaluate(parts: Parts, step: int, check: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Scalars "eval/<split>/<name>" of every configured split that the task has.

    Samples are drawn at rollout.temperature from a generator seeded with (seed, step), so runs with equal seeds draw
    alike. With several ranks each takes a share of the prompts. `check` is called before each split and may end the
    evaluation by raising (`Stops.check`).
    """
    config = parts.config
    scalars: dict[str, float] = {}
    generator = torch.Generator(parts.policy.device)
    generator.manual_seed(1_000_003 * (config.seed + 1) + step + 7_919 * parts.ranks.rank)
    for split, prompts in evaluation_prompts(config, parts.task).items():
        check()
        found = split_scalars(sample_over_ranks(parts, prompts, generator), config.eval.k)
        scalars |= {f"eval/{split}/{name}": value for name, value in found.items()}
    return scalars


def sample_over_ranks(parts: Parts, prompts: list[Prompt], generator: torch.Generator) -> SplitOutcome:
    """`sample_split` with the prompts dealt to the ranks in equal numbers. Every rank gets the whole outcome."""
    ranks = parts.ranks
    dealt = prompts + prompts[:1] * (-len(prompts) % ranks.world)
    mine = sample_split(parts, dealt[ranks.rank :: ranks.world], generator)
    if ranks.world == 1:
        return mine
    distinct = np.full(len(mine.n_correct), -1) if mine.distinct is None else mine.distinct
    rows = np.stack([mine.n_correct, distinct, mine.response_length, mine.truncated], 1)
    everyone = ranks.gather(torch.tensor(rows, device=parts.policy.device))
    everyone = everyone.reshape(ranks.world, -1, 4).transpose(0, 1).reshape(-1, 4)  # dealt in turn
    n_correct, distinct, lengths, truncated = everyone[: len(prompts)].cpu().numpy().T
    forms = None if (distinct < 0).any() else distinct
    return SplitOutcome(mine.samples, n_correct.astype(int), forms, lengths, truncated)


def split_scalars(outcome: SplitOutcome, k: int) -> dict[str, float]:
    """pass@1, pass@k, distinct (if the task has forms), response_length and truncated_share of one split."""
    ks = sorted({1, k})
    found = {f"pass@{k}": float(pass_at_k(outcome.n_correct, outcome.samples, k).mean()) for k in ks}
    if outcome.distinct is not None:
        found["distinct"] = float(outcome.distinct.mean())
    found["response_length"] = float(outcome.response_length.mean())
    found["truncated_share"] = float(outcome.truncated.mean())
    return found


def sample_split(parts: Evaluable, prompts: list[Prompt], generator: torch.Generator) -> SplitOutcome:
    """Draws and judges `config.eval.samples` samples of each prompt."""
    rollout, samples = parts.config.rollout, parts.config.eval.samples
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    rollouts = sample(
        parts.policy,
        encode_prompts(parts.policy, repeated, system_prompt(parts.config, parts.task), rollout.max_new_tokens),
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        generator=generator,
        max_batch=rollout.max_batch,
        backend=rollout.backend,
        truncation=Truncation.of(rollout),
    )
    scored = score(parts.policy, rollouts, repeated, parts.rewards)
    correct = (np.array(scored.judged) >= parts.task.correct_at).reshape(len(prompts), samples)
    forms: list[set[str]] = [set() for _ in prompts]
    has_forms = parts.task.has_forms
    for row in np.flatnonzero(correct):
        form = parts.task.canonical(repeated[row], scored.completions[row])
        has_forms &= form is not None  # a user's own reward may accept an answer that the task has no form for
        forms[row // samples].add(form or "")
    lengths = rollouts.mask.sum(1).double().cpu().numpy().reshape(len(prompts), samples)
    truncated = rollouts.truncated.double().cpu().numpy().reshape(len(prompts), samples)
    return SplitOutcome(
        samples=samples,
        n_correct=correct.sum(1),
        distinct=np.array([len(group) for group in forms]) if has_forms else None,
        response_length=lengths.mean(1),
        truncated=truncated.mean(1),
    )
