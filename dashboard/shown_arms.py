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


def default_arms(entries: Sequence[RunEntry]) -> tuple[Arm, ...]:
    """Uniform and every other weighting of one `comparison`, each at the seeds that it shares with uniform.

    They come by name, and `random`, which is a control, last. Entries are tried in order until one's comparison has
    such a pair. If none has, the first two runs are compared.
    """
    for comparison in dict.fromkeys(str(entry.info["comparison"]) for entry in entries if entry.info.get("comparison")):
        members = [entry for entry in entries if entry.info.get("comparison") == comparison]
        by_kind: dict[str, dict[int, str]] = {}
        for entry in members:
            of_kind = by_kind.setdefault(str(entry.info.get("weighting")), {})
            of_kind.setdefault(int(entry.info.get("seed", 0)), entry.name)  # the newest, where a run was started anew
        base, *others = sorted(by_kind, key=lambda kind: (kind != "uniform", kind == "random", kind))
        shared = {kind: sorted(by_kind[base].keys() & by_kind[kind].keys()) for kind in others}
        arms = [Arm(kind, tuple(by_kind[kind][seed] for seed in seeds)) for kind, seeds in shared.items() if seeds]
        if arms:
            seeds = sorted(set().union(*shared.values()))
            return (Arm(base, tuple(by_kind[base][seed] for seed in seeds)), *arms)
    first, second = sorted(entries[:2], key=lambda entry: entry.info.get("weighting") != "uniform")
    return Arm(first.name, (first.name,)), Arm(second.name, (second.name,))


def partner_arms(entry: RunEntry, entries: Sequence[RunEntry]) -> list[tuple[Arm, ...]]:
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


def doubts(arms: Sequence[Arm], entries: Mapping[str, RunEntry]) -> list[str]:
    """What makes a comparison of these arms less than it looks, a sentence each."""
    told = list[str]()
    every = [run for arm in arms for run in arm.runs]
    twice = sorted({run for run in every if every.count(run) > 1})
    if twice:
        told.append(f"{', '.join(twice)} is on more than one side.")
    known = {run: entries[run] for run in every if run in entries}
    short = {run: entry.status for run, entry in known.items() if entry.status in ("crashed", "failed", "stopped")}
    if short:
        names = ", ".join(f"{run} ({status})" for run, status in sorted(short.items()))
        told.append(f"Not all runs came to their end, so their newest values may be of other steps: {names}.")
    unknown = sorted(run for run, entry in known.items() if not entry.info)
    if unknown:
        told.append(f"The settings of {', '.join(unknown)} cannot be read: rlvr store check says what is wrong.")
    for arm in arms:
        kinds = sorted({str(entries[run].info.get("weighting")) for run in arm.runs if run in entries})
        if len(kinds) > 1:
            told.append(f"{arm.name} mixes weightings: {', '.join(kinds)}.")
    seeds = [{int(entries[run].info.get("seed") or 0) for run in arm.runs if run in entries} for arm in arms]
    for arm, of in zip(arms[1:], seeds[1:], strict=True):
        alone = sorted(of ^ seeds[0])
        if alone:
            told.append(f"Seeds that only {arm.name} or {arms[0].name} has are in no pair: {_listed(alone)}.")
    for what, path in (("code", ("commit",)), ("torch", ("packages", "torch")), ("machine", ("device",))):
        found = {_setting(entries[run].info.get("environment"), path) for run in every if run in entries} - {""}
        if len(found) > 1:
            told.append(f"The runs are of different {what}: {', '.join(sorted(one[:12] for one in found))}.")
    return told


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + ("…" if len(numbers) > 8 else "")


def _setting(of: Any, path: Sequence[str]) -> str:
    for name in path:
        of = of.get(name) if isinstance(of, Mapping) else None
    return of if isinstance(of, str) else ""


def figures_table(
    arms: Sequence[Arm],
    figures: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
    paired: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
) -> dict[str, list[str]]:
    """Columns: figure, the mean of each arm over its runs, and each one's difference to the first arm.

    paired: {(arm, figure): its row of monitor.stats.comparison}. With it a difference is that of pairs of equal seed,
    with its 95 % interval and the p of its paired t test. Rows without values are left out.
    """
    means = {
        arm.name: {name: _mean([figures[run].get(name) for run in arm.runs]) for name in ("step", *names)}
        for arm in arms
    }
    kept = [name for name in ("step", *names) if any(np.isfinite(means[arm.name][name]) for arm in arms)]
    table = {"figure": [_title(name) for name in kept]}
    for arm in arms:
        table[arm.name] = [_text(means[arm.name][name], name) for name in kept]
    base = means[arms[0].name]
    for arm in arms[1:]:
        if paired is None:
            cells = [_text(means[arm.name][name] - base[name], name, signed=True) for name in kept]
        else:
            cells = [_interval(paired.get((arm.name, name), {}), name) for name in kept]
        table[f"{arm.name} minus {arms[0].name}"] = cells
    return table


def _interval(row: Mapping[str, Any], name: str) -> str:
    """'-4.0 pp [-12.0, +1.0], p .031', without interval and p where there are none."""
    if row.get("difference") is None:
        return "–"
    share = label(name)[1] == "share"
    middle, low, high = (
        "" if row[of] is None else f"{100 * row[of]:+.1f}" if share else f"{row[of]:+.3g}"
        for of in ("difference", "low", "high")
    )
    p = "" if row.get("p_t") is None else f", p {row['p_t']:.2g}".replace(" 0.", " .")
    return f"{middle}{' pp' if share else ''}" + (f" [{low}, {high}]" if low and high else "") + p


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
