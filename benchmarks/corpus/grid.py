"""The settings of the corpus's runs: drawn at random, one number a run, so that outcomes vary.

Run i is drawn from a generator of seed i and trains with seed i. Even numbers are the development part, odd ones the
test part: decided here, before any run was made, and the same for every later run.

Numbers below SECOND are drawn from WIDE, whose rates lost nine of ten small policies within ten steps, where no alert
can be early. The rest are drawn from SLOW: lower rates, more of the larger policy, longer runs. Both stay.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from trainer.config import TrainConfig

EVERY, PROMPTS, SAMPLES, K = 10, 12, 16, 8
RUNS = 320
SECOND = 100  # the first run that is drawn from SLOW

Choices = tuple[tuple[Any, int], ...]  # (value, weight)

_TASKS = (("chain", 70), ("chain:10-40", 10), ("chain:60-99", 12), ("chain:200-299", 8))
_WEIGHTINGS = (
    (("uniform", {}), 40), (("ict", {"keep": 0.1}), 12), (("ict", {"keep": 0.3}), 14), (("random", {"keep": 0.3}), 8),
    (("top_entropy", {"keep": 0.2}), 10), (("ict_soft", {}), 6), (("advantage_reweight", {}), 5), (("stapo", {}), 5),
)  # fmt: skip
_LOSSES = (("grpo", 55), ("dapo", 25), ("dr_grpo", 12), ("cispo", 8))


@dataclass(frozen=True, slots=True)
class Draw:
    """What differs between the two halves of the corpus."""

    steps: int
    models: Choices
    rates: dict[str, Choices]  # by model
    bonuses: Choices  # entropy coefficients
    groups: Choices  # (prompts, group size)
    updates: Choices  # (epochs, mini-batches)
    splits: tuple[str, ...]  # evaluated


_WIDE_RATES = ((3e-5, 8), (1e-4, 24), (2e-4, 20), (3e-4, 22), (6e-4, 14), (1e-3, 8), (2e-3, 4))
WIDE = Draw(
    steps=100,
    models=(("builtin", 40), ("builtin-small", 60)),
    rates={"builtin": _WIDE_RATES, "builtin-small": _WIDE_RATES},
    bonuses=((0.0, 66), (0.005, 6), (0.02, 8), (0.05, 6), (0.1, 5), (0.2, 5), (-0.02, 4)),
    groups=(((8, 8), 50), ((4, 8), 25), ((4, 16), 15), ((16, 4), 10)),
    updates=(((1, 1), 56), ((2, 1), 20), ((1, 2), 14), ((2, 2), 5), ((4, 1), 5)),
    splits=("heldout", "ood"),
)
SLOW = Draw(
    steps=120,
    models=(("builtin", 75), ("builtin-small", 25)),
    rates={
        "builtin": ((5e-5, 10), (1e-4, 30), (2e-4, 32), (3e-4, 22), (4e-4, 6)),
        "builtin-small": ((1e-5, 20), (2e-5, 30), (5e-5, 30), (1e-4, 20)),
    },
    bonuses=((0.0, 68), (0.003, 6), (0.01, 6), (0.03, 6), (-0.005, 8), (-0.01, 6)),
    groups=(((8, 8), 30), ((4, 8), 50), ((8, 4), 20)),
    updates=(((1, 1), 60), ((2, 1), 25), ((1, 2), 15)),
    splits=("heldout",),
)


@dataclass(frozen=True, slots=True)
class CorpusRun:
    """One run of the corpus: its name, part ("development" or "test") and configuration."""

    name: str
    part: str
    config: TrainConfig


def corpus_run(number: int) -> CorpusRun:
    """The settings of run `number`, always the same for the same number."""
    rng = random.Random(number)

    def draw(choices: Any) -> Any:
        return rng.choices([value for value, _ in choices], [weight for _, weight in choices])[0]

    half = WIDE if number < SECOND else SLOW
    kind, own = draw(_WEIGHTINGS)
    prompts, group = draw(half.groups)
    epochs, mini_batches = draw(half.updates)
    model = draw(half.models)
    config = TrainConfig(
        model=model,
        task=draw(_TASKS),
        steps=half.steps,
        seed=number,
        threads=1,
        rollout={
            "prompts": prompts,
            "group_size": group,
            "max_new_tokens": draw(((48, 45), (36, 35), (24, 20))),
            "temperature": draw(((0.6, 22), (0.8, 16), (1.0, 50), (1.2, 12))),
        },
        weighting={
            "kind": kind,
            "warmup_steps": 5,
            "normalise": draw((("selected", 65), ("all", 35))),
            **own,
        },
        loss={
            "kind": draw(_LOSSES),
            "clip_high": draw(((0.2, 60), (0.28, 25), (0.5, 15))),
            "kl_coef": draw(((0.0, 72), (0.01, 12), (0.05, 10), (0.2, 6))),
            "entropy_coef": draw(half.bonuses),
            "scale_by_std": draw(((True, 80), (False, 20))),
        },
        optim={"lr": draw(half.rates[model]), "epochs": epochs, "mini_batches": mini_batches},
        eval={"every": EVERY, "prompts": PROMPTS, "choice": "first", "samples": SAMPLES, "k": K, "splits": half.splits},
        checkpoint={"every": 0},
        record={"probe_every": 0},
    )
    return CorpusRun(f"c{number:03d}", "test" if number % 2 else "development", config)
