"""ALIASES: what other trainers call the metrics that METRICS names, and `match`, which finds both among columns.

Each name was read in the source of the trainer and version that stands above it. A name is here only if it means what
METRICS says, in the same unit. Left out on purpose: totals of both sides of the clip (`actor/pg_clipfrac`,
`clip_ratio/region_mean`, `ppo_clip_ratio`), as METRICS counts the sides apart; means of signed log-ratios
(`actor/ppo_kl`, `vllm_kl`), which are near 0 whatever the policy does; differences of probabilities
(`training/rollout_probs_diff_mean`); rewards of evaluations, which need not be a share of correct answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from monitor.errors import MonitorError, nearest
from monitor.metrics import METRICS, is_known, metric

# where several are there, the first. "_step" counts calls of wandb.log, so a trainer's own count goes before it
STEP_COLUMNS = ("step", "global_step", "train/global_step", "_step", "training/global_step")
PREFIX = "train/"  # what TRL's names get in wandb and TensorBoard; taken off where a known name is left


@dataclass(frozen=True, slots=True)
class Alias:
    """A trainer's name for a key. {split} stands for a data set, {k} and {n} for numbers, in the key as well.

    beside: a column that must be there too, for a name that means something else in another trainer.
    """

    column: str
    key: str
    beside: str = ""


# of two names of one trainer for a key the upper one is used
ALIASES: dict[str, tuple[Alias, ...]] = {
    # entropy, reward, reward_std, kl, loss, grad_norm and entropy_coef are called as in METRICS
    "TRL 1.16": (
        Alias("frac_reward_zero_std", "zero_variance_share"),
        Alias("completions/mean_length", "response_length"),
        Alias("completions/clipped_ratio", "truncated_share"),
        Alias("clip_ratio/low_mean", "clip_share_low"),
        Alias("clip_ratio/high_mean", "clip_share_high"),
        Alias("sampling/sampling_logp_difference/mean", "sampler_mismatch"),
        Alias("learning_rate", "lr"),
        Alias("step_time", "perf/step_s"),
    ),
    "verl 0.9.1": (
        Alias("actor/entropy", "entropy"),
        Alias("critic/score/mean", "reward"),  # of the reward function
        Alias("critic/rewards/mean", "reward"),  # less the KL penalty, where it is part of the reward
        Alias("response_length/mean", "response_length"),
        Alias("response_length/clip_ratio", "truncated_share"),
        Alias("actor/loss", "loss"),
        Alias("actor/kl_loss", "kl"),
        Alias("actor/reward_kl_penalty", "kl"),
        Alias("actor/grad_norm", "grad_norm"),
        Alias("actor/lr", "lr"),
        Alias("rollout_corr/k3_kl", "sampler_mismatch_k3"),
        Alias("perf/time_per_step", "perf/step_s"),
        Alias("val-core/{split}/acc/mean@{n}", "eval/{split}/pass@1"),
        Alias("val-core/{split}/acc/best@{k}/mean", "eval/{split}/pass@{k}"),  # by bootstrap: a little low
        Alias("val-aux/{split}/acc/best@{k}/mean", "eval/{split}/pass@{k}"),
    ),
    # train/agg since rollouts have agents; "<name>/all/mean" and "<name>/mean" before
    "prime-rl": (
        Alias("entropy/all/mean", "entropy"),
        Alias("entropy/mean", "entropy"),
        Alias("train/agg/all/reward/mean", "reward"),  # of every rollout
        Alias("train/agg/effective/reward/mean", "reward"),  # of those that the filters left
        Alias("reward/all/mean", "reward"),
        Alias("reward/mean", "reward"),
        Alias("train/agg/all/num_output_tokens/mean", "response_length"),
        Alias("train/agg/effective/num_output_tokens/mean", "response_length"),
        Alias("decode_len/all/mean", "response_length"),
        Alias("decode_len/mean", "response_length"),
        Alias("train/agg/all/is_truncated/mean", "truncated_share"),
        Alias("train/agg/effective/is_truncated/mean", "truncated_share"),
        Alias("is_truncated/all/mean", "truncated_share"),
        Alias("is_truncated/mean", "truncated_share"),
        Alias("solve_all/all", "all_correct_share"),
        Alias("batch/solve_all", "all_correct_share"),
        Alias("solve_none/all", "all_wrong_share"),
        Alias("batch/solve_none", "all_wrong_share"),
        Alias("mismatch_kl/all/mean", "sampler_mismatch_k3"),
        Alias("mismatch_kl/mean", "sampler_mismatch_k3"),
        Alias("sampling/temperature", "temperature"),
        Alias("loss/mean", "loss"),
        Alias("optim/grad_norm", "grad_norm"),
        Alias("optim/lr", "lr"),
        Alias("time/step", "perf/step_s"),
        Alias("eval/{split}/all/pass@{k}", "eval/{split}/pass@{k}"),
        Alias("eval/{split}/effective/pass@{k}", "eval/{split}/pass@{k}"),
        Alias("eval/{split}/completion_len/mean", "eval/{split}/response_length"),
        Alias("eval/{split}/all/is_truncated/mean", "eval/{split}/truncated_share"),
        Alias("eval/{split}/is_truncated/mean", "eval/{split}/truncated_share"),
    ),
    # train/reward, train/response_length and train/kl are called as in METRICS
    "OpenRLHF 0.11.2": (
        Alias("train/entropy_loss", "entropy", beside="train/ppo_clip_ratio"),  # stable-baselines3: the negative
        Alias("train/truncated", "truncated_share"),
        Alias("train/actor_grad_norm", "grad_norm"),
        Alias("train/actor_lr", "lr"),
        Alias("train/timing/step_total", "perf/step_s"),
        Alias("eval/eval_{split}_pass{k}", "eval/{split}/pass@{k}"),
        Alias("eval/eval_{split}_truncated_rate", "eval/{split}/truncated_share"),
        Alias("eval/eval_{split}_response_length_mean", "eval/{split}/response_length"),
    ),
    # train/loss and train/grad_norm are called as in METRICS; entropy_loss is the mean entropy, with its own sign
    "slime, miles": (
        Alias("train/entropy_loss", "entropy", beside="train/pg_clipfrac"),
        Alias("rollout/raw_reward", "reward"),  # before a group's normalisation
        Alias("rollout/response_len/mean", "response_length"),
        Alias("rollout/truncated_ratio", "truncated_share"),
        Alias("train/kl_loss", "kl"),
        Alias("train/train_rollout_logprob_abs_diff", "sampler_mismatch"),
        Alias("train/lr-pg_0", "lr"),
        Alias("perf/rollout_time", "perf/rollout_s"),
        Alias("perf/step_time", "perf/step_s"),
        Alias("eval/{split}-pass@{k}", "eval/{split}/pass@{k}"),
        Alias("eval/{split}-truncated_ratio", "eval/{split}/truncated_share"),
        Alias("eval/{split}/response_len/mean", "eval/{split}/response_length"),
    ),
}


# as the command line calls them: {name: its table in ALIASES}
TRAINERS = {name.lower(): table for table in ALIASES for name in re.split(", ", re.sub(r" [\d.]+$", "", table))}


def match(
    source: str, names: Mapping[str, str], chosen: Mapping[str, str], trainer: str | None = None
) -> dict[str, str]:
    """{key: column} of the step and of every column whose name is a known key or alias; "step" first.

    names: {column: the name to look at, which is shorter where a file puts the run's name before it}. chosen: {key:
    column or name} that go before anything found. A column called exactly as the key wins; else two columns for one
    key are an error, unless they are one trainer's, for which ALIASES has an order. trainer: of TRAINERS, whose aliases
    alone are used; None: all. Raises MonitorError for two columns, for an unknown key or column in `chosen`, and if
    there is no step.
    """
    given = {_known(key): _column(source, names, key, column) for key, column in chosen.items()}
    step = given.pop("step", None) or _step_column(source, names)
    candidates: dict[str, list[_Candidate]] = {}
    present = set(names.values())
    for column, name in names.items():
        if column not in (step, *given.values()):
            for key, of, order in _meanings(name, present, trainer and TRAINERS[trainer]):
                candidates.setdefault(key, []).append(_Candidate(column, name == key, of, order))
    found = {key: _choose(source, key, of_key) for key, of_key in candidates.items() if key not in given}
    keys = [key for key in METRICS if key in found or key in given]
    keys += sorted(key for key in found.keys() | given.keys() if key not in METRICS)  # evaluations
    return {"step": step} | {key: given.get(key) or found[key] for key in keys}


class _Candidate(NamedTuple):
    column: str
    exact: bool  # called as the key is
    trainer: str  # whose alias it is; "" for METRICS' own name after a prefix or in capitals
    order: int  # in the trainer's table


def _choose(source: str, key: str, candidates: list[_Candidate]) -> str:
    exact = [candidate for candidate in candidates if candidate.exact]
    first: dict[str, int] = {}
    for candidate in candidates:
        first[candidate.trainer] = min(candidate.order, first.get(candidate.trainer, candidate.order))
    left = exact or [candidate for candidate in candidates if candidate.order == first[candidate.trainer]]
    if len(left) > 1:
        raise MonitorError(
            f"{source!r}: {key} could be {' or '.join(repr(candidate.column) for candidate in left)}. "
            f"Choose one: --map '{key}={left[0].column}'"
        )
    return left[0].column


def _meanings(name: str, present: set[str], table: str | None) -> list[tuple[str, str, int]]:
    """(key, trainer, order in its table) of a column's name, as it is or else without PREFIX; none: unknown.

    table: the one of ALIASES to look in; None: all of them.
    """
    for spelling in (name, name.removeprefix(PREFIX)):
        key = spelling if is_known(spelling) else spelling.lower()
        of_function = key.startswith("reward/")  # in another trainer's log "reward/mean" is no function called mean
        if is_known(key) and not of_function:
            return [(key, "", 0)]
        found: dict[str, tuple[str, str, int]] = {}  # by trainer, its first alias that fits
        for trainer, order, pattern, alias in _patterns():
            fits = pattern.fullmatch(spelling) if table in (None, trainer) else None
            is_this_trainers = table is not None or not alias.beside or alias.beside in present
            if fits and is_this_trainers and trainer not in found:
                parts = {part: text.replace("/", "_") for part, text in fits.groupdict().items()}
                found[trainer] = (alias.key.format(**parts), trainer, order)
        if found or of_function:
            return list(found.values()) or [(key, "", 0)]
    return []


@cache
def _patterns() -> list[tuple[str, int, re.Pattern[str], Alias]]:
    fields = {"split": "(?P<split>.+)", "k": r"(?P<k>\d+)", "n": r"(?P<n>\d+)"}
    found = []
    for trainer, aliases in ALIASES.items():
        for order, alias in enumerate(aliases):
            parts = re.split(r"\{(\w+)\}", alias.column)  # text, field, text, ...
            pattern = "".join(fields[part] if index % 2 else re.escape(part) for index, part in enumerate(parts))
            found.append((trainer, order, re.compile(pattern), alias))
    return found


def _step_column(source: str, names: Mapping[str, str]) -> str:
    for wanted in STEP_COLUMNS:
        for column, name in names.items():
            if name.lower() == wanted:
                return column
    raise MonitorError(
        f"{source!r} has no column of the step. Expected one of {', '.join(STEP_COLUMNS)}. Its columns: "
        f"{_listed(names)}. Say which it is: --map step=COLUMN"
    )


def _known(key: str) -> str:
    if key != "step":
        try:
            metric(key)
        except ValueError as error:
            raise MonitorError(f"--map: {error}") from None
    return key


def _column(source: str, names: Mapping[str, str], key: str, column: str) -> str:
    found = [column] if column in names else [full for full, name in names.items() if name == column]
    if len(found) == 1:
        return found[0]
    if found:
        raise MonitorError(
            f"--map {key}={column}: {source!r} has it {len(found)} times: {', '.join(found)}. Give the whole name."
        )
    raise MonitorError(
        f"--map {key}={column}: {source!r} has no column {column!r}.{nearest(column, names)} "
        f"Its columns: {_listed(names)}."
    )


def _listed(names: Mapping[str, str]) -> str:
    return shortened(list(names)) or "none"


def shortened(names: list[str], width: int = 200) -> str:
    """The names with commas, as many as fit in `width` characters, and how many more there are."""
    shown: list[str] = []
    for name in names:
        if shown and sum(len(text) + 2 for text in shown) + len(name) > width:
            return f"{', '.join(shown)} and {len(names) - len(shown)} more"
        shown.append(name)
    return ", ".join(shown)
