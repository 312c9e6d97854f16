"""The best settings of a set of rules, chosen on labelled runs: most damage seen in time for few false alarms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Labels(NamedTuple):
    """Of each run [runs]: step of the damage, infinite where there is none; may a warning count as a false alarm?"""

    damage: np.ndarray
    healthy: np.ndarray


class Choice(NamedTuple):
    """For each rule the number of its chosen setting, or None: off. `rank`: as `ranks` has it, larger is better."""

    settings: dict[str, int | None]
    rank: tuple[float, ...]


def choose(first: Mapping[str, np.ndarray], labels: Labels, at_most: float) -> Choice:
    """The settings of all rules together, by coordinate ascent from everything off and from each single setting.

    first: for each rule float [settings, runs], the step of its first warning, infinite without one. A run is warned by
    its first warning of any rule. at_most: share of the healthy runs that may be warned. Equal choices: the one with
    fewer rules on, then with the earlier settings.
    """
    silent = np.full((1, len(labels.damage)), np.inf)
    options = {rule: np.concatenate([silent, steps]) for rule, steps in first.items()}  # row 0: off
    off = dict.fromkeys(options, 0)
    starts = [off, *(off | {rule: row} for rule, steps in options.items() for row in range(1, len(steps)))]
    rows, rank = max((_ascend(options, start, labels, at_most) for start in starts), key=lambda found: found[1])
    return Choice({rule: row - 1 if row else None for rule, row in rows.items()}, rank)


def _ascend(
    options: Mapping[str, np.ndarray], start: Mapping[str, int], labels: Labels, at_most: float
) -> tuple[dict[str, int], tuple[float, ...]]:
    """Rule by rule the best row given the others, until none gains; of equal rows the earlier one is better."""
    rows = dict(start)
    rank = tuple(ranks(np.min([options[rule][row] for rule, row in rows.items()], axis=0)[None], labels, at_most)[0])
    gained = True
    while gained:
        gained = False
        for rule, steps in options.items():
            others = np.min([options[other][row] for other, row in rows.items() if other != rule] or [steps[0]], axis=0)
            table = ranks(np.minimum(steps, others), labels, at_most)
            top = max(range(len(table)), key=lambda row: tuple(table[row]))
            if (*table[top], -top) > (*rank, -rows[rule]):
                rows[rule], rank, gained = top, tuple(table[top]), True
    return rows, tuple(map(float, rank))


def ranks(warned: np.ndarray, labels: Labels, at_most: float) -> np.ndarray:
    """How good choices are, [choices, 4], compared from the left: allowed, damaged runs warned before the damage,
    minus the healthy runs warned, mean lead (the share of the steps to the damage that was left, 0 if not in time).

    warned: float [choices, runs], the step of the first warning, infinite without one.
    """
    damaged = np.isfinite(labels.damage)
    damage, of_damaged = labels.damage[damaged], warned[:, damaged]
    in_time = of_damaged < damage
    lead = np.where(in_time, 1 - of_damaged / damage, 0.0).sum(axis=1) / max(1, len(damage))
    alarms = np.isfinite(warned[:, labels.healthy]).sum(axis=1)
    allowed = alarms <= at_most * labels.healthy.sum()
    return np.stack([allowed, in_time.sum(axis=1), -alarms, lead], axis=1).astype(float)
