"""Which runs the Compare page sets against each other, and the table of their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dashboard.figures.theme import label
from monitor.store.tail import RunEntry


@dataclass(frozen=True, slots=True)
class Arm:
    """One side of a comparison: a name (its weighting) and its runs."""

    name: str
    runs: tuple[str, ...]


def default_arms(entries: Sequence[RunEntry]) -> tuple[Arm, Arm]:
    """Uniform and the first other weighting among the runs of one `comparison`, at the seeds that both have.

    `random`, which is a control, is taken only if there is no other weighting. Entries are tried in order until one's
    comparison has such a pair. If none has, the first two runs are compared.
    """
    for comparison in dict.fromkeys(str(entry.info.get("comparison") or "") for entry in entries):
        members = [entry for entry in entries if comparison and entry.info.get("comparison") == comparison]
        by_kind: dict[str, dict[int, str]] = {}
        for entry in members:
            of_kind = by_kind.setdefault(str(entry.info.get("weighting")), {})
            of_kind.setdefault(int(entry.info.get("seed", 0)), entry.name)  # the newest, where a run was started anew
        kinds = sorted(by_kind, key=lambda kind: (kind != "uniform", kind == "random"))
        for other in kinds[1:]:
            seeds = sorted(by_kind[kinds[0]].keys() & by_kind[other].keys())
            if seeds:
                return tuple(Arm(kind, tuple(by_kind[kind][seed] for seed in seeds)) for kind in (kinds[0], other))  # type: ignore[return-value]
    first, second = sorted(entries[:2], key=lambda entry: entry.info.get("weighting") != "uniform")
    return Arm(first.name, (first.name,)), Arm(second.name, (second.name,))


def partner_arms(entry: RunEntry, entries: Sequence[RunEntry]) -> list[tuple[Arm, Arm]]:
    """Uniform beside the weighting of `entry`, from their comparison; for a uniform run beside each other weighting."""
    name, kind = entry.info.get("comparison"), str(entry.info.get("weighting"))
    members = [other for other in entries if name and other.info.get("comparison") == name]
    others = {str(other.info.get("weighting")) for other in members} - {"uniform"}
    pairs = [
        default_arms([other for other in members if str(other.info.get("weighting")) in ("uniform", shown)])
        for shown in sorted(others if kind == "uniform" else others & {kind})
        if len(members) > 1
    ]
    return [pair for pair in pairs if pair[0].name == "uniform"]


def by_seed(entries: Sequence[RunEntry]) -> dict[int, str] | None:
    """{seed: run}, which pairs the runs of two arms; None if two runs have the same seed."""
    seeds = {int(entry.info.get("seed") or 0): entry.name for entry in entries}
    return seeds if len(seeds) == len(entries) else None


def figures_table(
    arms: Sequence[Arm],
    figures: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
    paired: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, list[str]]:
    """Columns: figure, the mean of each arm over its runs, and their difference. Rows without values are left out.

    paired: {figure: its row of monitor.stats.comparison}. With it the difference is that of pairs of equal seed, with
    its 95 % interval, the p of its paired t test and the number of pairs.
    """
    means = {
        arm.name: {name: _mean([figures[run].get(name) for run in arm.runs]) for name in ("step", *names)}
        for arm in arms
    }
    kept = [name for name in ("step", *names) if any(np.isfinite(means[arm.name][name]) for arm in arms)]
    table = {"figure": [_title(name) for name in kept]}
    for arm in arms:
        table[arm.name] = [_text(means[arm.name][name], name) for name in kept]
    first, second = (means[arm.name] for arm in arms)
    if paired is None:
        table["difference"] = [_text(second[name] - first[name], name, signed=True) for name in kept]
        return table
    rows = [paired.get(name, {}) for name in kept]
    table["difference, 95 % interval"] = [_interval(row, name) for row, name in zip(rows, kept, strict=True)]
    table["p"] = ["–" if row.get("p_t") is None else f"{row['p_t']:.2g}" for row in rows]
    table["pairs"] = [str(row.get("pairs", "–")) for row in rows]
    return table


def _interval(row: Mapping[str, Any], name: str) -> str:
    """'-4.0 pp [-12.0, +1.0]', without the interval where there is none."""
    if row.get("difference") is None:
        return "–"
    share = label(name)[1] == "share"
    middle, low, high = (
        "" if row[of] is None else f"{100 * row[of]:+.1f}" if share else f"{row[of]:+.3g}"
        for of in ("difference", "low", "high")
    )
    return f"{middle}{' pp' if share else ''}" + (f" [{low}, {high}]" if low and high else "")


def _mean(values: Sequence[float | None]) -> float:
    finite = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def _title(name: str) -> str:
    if name == "step":
        return "Step"
    text, unit, _ = label(name)
    return text if unit in ("", "share") else f"{text} ({unit})"


def _text(value: float, name: str, signed: bool = False) -> str:
    if not np.isfinite(value):
        return "–"
    sign = "+" if signed else ""
    if name == "step":
        return f"{value:{sign}.0f}"
    if label(name)[1] == "share":
        return f"{100 * value:{sign}.1f} pp" if signed else f"{value:.1%}"
    return f"{value:{sign}.3g}"
