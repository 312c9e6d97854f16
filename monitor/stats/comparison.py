"""The paired table of a comparison: arms x seeds in, a row for each (moment, figure, arm) out; stored as JSON and CSV.

There are three moments. "last": the newest values of each run. "equal": an arm and the baseline at equal pass@1, seed
by seed: each where its held-out pass@1 first reaches the lower of their two best levels. "run": the whole run.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NotRequired, cast

import duckdb
import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from monitor.errors import StoreError, nearest
from monitor.metrics import metric
from monitor.queries.alerts import alert_log, alert_spans
from monitor.queries.differences import config_difference, figures_of, setting
from monitor.queries.series import NOTHING, Series, whole_series
from monitor.records import finite
from monitor.stats.comparison_verdict import comparison_verdicts
from monitor.stats.paired import holm, paired_difference
from monitor.store.runs import read_json

Runs = Mapping[str, Mapping[int, str]]  # arm -> seed -> run
LEVEL = "eval/heldout/pass@1"
STATED = ("steps", "weight_mean", "effective_sample_share", "weight_over_denominator")  # follow from settings: no tests
OWN_FIGURES = {  # figures of the whole run, which no step records: (label, unit)
    "step": ("Step", ""),
    "entropy_kept": ("Entropy kept, of the first step's", "share"),
    "steps": ("Steps", ""),
    "weight_over_denominator": ("Sum of weights over the loss's denominator", ""),
    "median_step_s": ("Step time, median", "s"),
    "tokens_trained": ("Tokens with weight, whole run", "tokens"),
    "alerts_fired": ("Alerts fired", ""),
}
TITLES = {
    "last": "At the last step",
    "equal": "At equal pass@1 (each arm and the baseline where they first reach the lower of their two best levels)",
    "run": "Whole run",
}


def figure_names(k: int) -> list[str]:
    """Recorded figures of the table, for evaluations with pass@k."""
    heldout = ["pass@1", f"pass@{k}", "distinct", "response_length"]
    names = [f"eval/heldout/{name}" for name in heldout]
    names += ["eval/ood/pass@1", f"eval/ood/pass@{k}", "eval/multipath/distinct"]
    return list(dict.fromkeys([*names, "reward", "entropy", "entropy_kept", "renyi2"]))


def paired_comparison(
    con: duckdb.DuckDBPyConnection,
    name: str,
    arms: Runs,
    configs: Mapping[str, Mapping[str, Any]],
    *,
    k: int = 4,
    failed: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that is stored of a comparison, as plain JSON types. The first arm is the baseline.

    "rows" has one entry for each moment, figure and arm. It holds n, mean and sd over the arm's seeds, and values by
    seed. Paired by seed with the baseline it also holds baseline_mean, and the fields of PairedDifference as
    difference, low, high, p, p_smallest, p_t, pairs. At "last" and "equal", p_holm and p_t_holm are p and p_t corrected
    for the number of arms. Figures that no run has are left out. "verdicts" has a sentence for each arm.
    """
    baseline, names = next(iter(arms)), figure_names(k)
    runs = [run for of in arms.values() for run in of.values()]
    series = whole_series(con, runs, [*names, "weight_mean", "effective_sample_share"])
    last = figures_of(series, runs, [*names, "weight_mean", "effective_sample_share"], LEVEL)["last"]
    first, whole = whole_run_figures(con, runs, configs, last)
    for run in runs:
        last[run]["entropy_kept"] = last[run].get("entropy", np.nan) / first[run]
    rows, levels = _last_and_equal(series, arms, names, last, first)
    _correct_for_arms(rows)
    per_run = {arm: {seed: whole[run] for seed, run in of.items()} for arm, of in arms.items()}
    rows += _rows("run", ["median_step_s", "tokens_trained", "alerts_fired", *STATED], per_run, per_run[baseline])
    settings = {arm: configs.get(next(iter(of.values()), ""), {}) for arm, of in arms.items()}
    differing = config_difference(settings)
    found = {
        "comparison": name,
        "created": time.time(),
        "baseline": baseline,
        "arms": _by_text(arms),
        "failed": list(failed),
        "levels": levels,
        "samples": _eval_samples(settings),
        "normalise": {arm: setting(of, "weighting.normalise", str) or "selected" for arm, of in settings.items()},
        "rows": rows,
        "configuration": {o: row for o, row in differing.items() if o not in ("run", "seed", "save", "comparison")},
    }
    stored = cast(dict[str, Any], finite(found))
    return stored | {"verdicts": comparison_verdicts(stored)}


def live_comparison(
    con: duckdb.DuckDBPyConnection,
    arms: Runs,
    configs: Mapping[str, Mapping[str, Any]],
    k: int = 4,
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """The "verdicts" of `paired_comparison`, and the "rows" that they rest on and of `names`, at the last step and at
    equal pass@1. It costs under half of the whole, for a page that redraws as runs train.
    """
    names = [LEVEL, f"eval/heldout/pass@{k}", "eval/heldout/distinct", "reward", "entropy", *names]
    runs = [run for of in arms.values() for run in of.values()]
    series = whole_series(con, runs, names)
    last = figures_of(series, runs, names, LEVEL)["last"]
    rows, levels = _last_and_equal(series, arms, list(dict.fromkeys(names)), last, {})
    settings = {arm: configs.get(next(iter(of.values()), ""), {}) for arm, of in arms.items()}
    found = {"baseline": next(iter(arms)), "arms": _by_text(arms), "levels": levels, "rows": rows}
    told = cast(dict[str, Any], finite(found | {"samples": _eval_samples(settings)}))
    return told | {"verdicts": comparison_verdicts(told)}


def live_verdicts(
    con: duckdb.DuckDBPyConnection, arms: Runs, configs: Mapping[str, Mapping[str, Any]], k: int = 4
) -> dict[str, str]:
    """The "verdicts" of `live_comparison`."""
    return dict(live_comparison(con, arms, configs, k)["verdicts"])


def _by_text(of_arms: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[str, Any]]:
    """With seeds as text, as JSON has keys."""
    return {arm: {str(seed): value for seed, value in of.items()} for arm, of in of_arms.items()}


def _eval_samples(settings: Mapping[str, Mapping[str, Any]]) -> int | None:
    """Samples of each prompt in an evaluation; None where the arms differ in it or do not say."""
    found = {n for of in settings.values() if (n := setting(of, "eval.samples", int)) is not None}
    return found.pop() if len(found) == 1 else None


def _last_and_equal(
    series: Mapping[str, Mapping[str, Series]],
    arms: Runs,
    names: Sequence[str],
    last: Mapping[str, Mapping[str, float]],
    first: Mapping[str, float],
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The rows of the moments "last" and "equal", and the levels of the latter by arm and seed."""
    baseline = next(iter(arms))
    at_last = {arm: {seed: last[run] for seed, run in of.items()} for arm, of in arms.items()}
    rows = _rows("last", names, at_last, at_last[baseline])
    levels: dict[str, dict[int, float]] = {}
    for arm in [arm for arm in arms if arm != baseline]:
        mine, theirs, levels[arm] = _at_equal_level(series, arms[arm], arms[baseline], names, first)
        rows += _rows("equal", ["step", *(name for name in names if name != LEVEL)], {arm: mine}, theirs)
    return rows, _by_text(levels)


def whole_run_figures(
    con: duckdb.DuckDBPyConnection,
    runs: Sequence[str],
    configs: Mapping[str, Mapping[str, Any]],
    last: Mapping[str, Mapping[str, float]],
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """{run: entropy of the first step} and {run: figures of the whole run}."""
    names = ("entropy", "perf/step_s", "tokens", "selected_share")
    series = whole_series(con, runs, names)
    spans = alert_spans(alert_log(con, runs))
    first: dict[str, float] = {}
    whole: dict[str, dict[str, float]] = {}
    for run in runs:
        entropy, times, tokens, share = (series.get(run, {}).get(name, NOTHING)[1] for name in names)
        first[run] = float(entropy[0]) if len(entropy) else np.nan
        weight = last[run].get("weight_mean", np.nan)
        to_all = setting(configs.get(run), "weighting.normalise", str) == "all"
        whole[run] = {
            "median_step_s": float(np.median(times)) if len(times) else np.nan,
            "tokens_trained": float((tokens * share).sum()) if len(tokens) == len(share) else np.nan,
            "alerts_fired": float((spans["run"] == run).sum()),
            "steps": last[run]["step"],
            "weight_mean": weight,
            "effective_sample_share": last[run].get("effective_sample_share", np.nan),
            "weight_over_denominator": weight if to_all else 1.0,
        }
    return first, whole


def _at_equal_level(
    series: Mapping[str, Mapping[str, Series]],
    runs: Mapping[int, str],
    baseline: Mapping[int, str],
    names: Sequence[str],
    first: Mapping[str, float],
) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, float]], dict[int, float]]:
    """An arm's figures by seed, the baseline's, and the level at which both were taken."""
    mine: dict[int, dict[str, float]] = {}
    theirs: dict[int, dict[str, float]] = {}
    levels: dict[int, float] = {}
    for seed in sorted(runs.keys() & baseline.keys()):
        pair = (runs[seed], baseline[seed])
        found = figures_of(series, pair, names, LEVEL)
        for run, into in zip(pair, (mine, theirs), strict=True):
            if run in found["equal"]:
                figures = found["equal"][run]
                into[seed] = figures | {"entropy_kept": figures.get("entropy", np.nan) / first.get(run, np.nan)}
                levels[seed] = found["level"]
    return mine, theirs, levels


def _rows(
    when: str,
    names: Sequence[str],
    arms: Mapping[str, Mapping[int, Mapping[str, float]]],
    baseline: Mapping[int, Mapping[str, float]],
) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        for arm, of in arms.items():
            values = {seed: float(figures[name]) for seed, figures in sorted(of.items()) if name in figures}
            finite = np.array([value for value in values.values() if np.isfinite(value)])
            if not len(finite):
                continue
            row: dict[str, Any] = {"when": when, "figure": name, "arm": arm, "n": len(finite)}
            row |= {"mean": float(finite.mean()), "sd": float(finite.std(ddof=1)) if len(finite) > 1 else np.nan}
            if of is not baseline and name not in STATED:
                both = [seed for seed in values if name in baseline.get(seed, {})]
                base = np.array([baseline[seed][name] for seed in both])
                gap = asdict(paired_difference(base, np.array([values[seed] for seed in both])))
                row |= {"baseline_mean": float(base.mean()) if len(base) else np.nan}
                row |= {"difference": gap.pop("mean"), "pairs": gap.pop("n"), **gap}
            rows.append(row | {"values": {str(seed): value for seed, value in values.items()}})
    return rows


def _correct_for_arms(rows: Sequence[dict[str, Any]]) -> None:
    """Adds p_holm and p_t_holm to the rows that have a p: one family is a figure at one moment, over all arms."""
    for p in ("p", "p_t"):
        families: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in rows:
            if np.isfinite(row.get(p, np.nan)):
                families.setdefault((row["when"], row["figure"]), []).append(row)
        for family in families.values():
            for row, corrected in zip(family, holm(np.array([row[p] for row in family])), strict=True):
                row[f"{p}_holm"] = float(corrected)


def figure_label(name: str) -> tuple[str, str]:
    """(label, unit) of a figure of the table."""
    if name in OWN_FIGURES:
        return OWN_FIGURES[name]
    try:
        found = metric(name)
    except ValueError:  # stored by a newer version
        return name, ""
    return found.label, found.unit


def save_comparison(store: Path, comparison: Mapping[str, Any]) -> Path:
    """Writes STORE/comparisons/NAME.json and NAME.csv, each by rename; returns the path of the JSON."""
    folder = store / "comparisons"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{comparison['comparison']}.json"
    part = path.with_suffix(".json.tmp")
    part.write_text(json.dumps(comparison, indent=1) + "\n")
    part.replace(path)
    columns = ["when", "figure", "arm", "n", "mean", "sd", "baseline_mean", "difference", "pairs", "low", "high", "p",
               "p_smallest", "p_t", "p_holm", "p_t_holm"]  # fmt: skip
    part = path.with_suffix(".csv.tmp")
    with part.open("w", newline="") as sink:
        writer = csv.DictWriter(sink, columns, extrasaction="ignore", restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(comparison["rows"])
    part.replace(path.with_suffix(".csv"))
    return path


def load_comparison(store: Path, name: str) -> dict[str, Any]:
    """What `save_comparison` wrote; an older file gets its verdicts here. Raises StoreError with the nearest name."""
    path = store / "comparisons" / f"{name}.json"
    if not path.exists():
        known = sorted(each.stem for each in path.parent.glob("*.json"))
        listed = f" Known: {', '.join(known)}." if known else " It has none: `rlvr compare` makes one."
        raise StoreError(f"No comparison {name!r} in store {str(store)!r}.{nearest(name, known)}{listed}")
    try:
        found = read_json(path) or {}
        _check_stored(found)
        return found if "verdicts" in found else found | {"verdicts": comparison_verdicts(found)}
    except (ValueError, LookupError, StopIteration, TypeError) as error:
        why = str(error).partition("\n")[0]
        raise StoreError(f"{str(path)!r} does not hold a comparison: {why}. Run `rlvr compare` again.") from None


class _Row(TypedDict):
    when: str
    figure: str
    arm: str
    mean: float
    sd: float | None
    values: dict[str, float | None]
    difference: NotRequired[float | None]
    baseline_mean: NotRequired[float | None]
    low: NotRequired[float | None]
    high: NotRequired[float | None]
    p: NotRequired[float | None]
    pairs: NotRequired[int]


class _Stored(TypedDict):
    """What readers of a stored comparison rely on."""

    comparison: str
    created: Annotated[float, Field(ge=0, lt=1e11)]
    baseline: str
    arms: dict[str, dict[Annotated[str, Field(pattern=r"^\d+$")], str]]
    failed: list[str]
    levels: dict[str, dict[str, float | None]]
    normalise: dict[str, str]
    rows: list[_Row]
    configuration: dict[str, dict[str, Any]]
    samples: NotRequired[int | None]
    stopped: NotRequired[dict[str, int]]
    verdicts: NotRequired[dict[str, str]]


def _check_stored(found: Mapping[str, Any]) -> None:
    """Raises ValueError, in one line, for what is not shaped like a stored comparison."""
    if not found:
        raise ValueError("it is no JSON object, or cut off")
    try:
        TypeAdapter(_Stored).validate_python(found, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    arms = found["arms"]
    if not {found["baseline"], *found.get("verdicts", ()), *(row["arm"] for row in found["rows"])} <= arms.keys():
        raise ValueError(f"it names an arm that is none of its arms, {', '.join(arms)}")
    for row in found["rows"]:
        if row.get("difference") is not None and not _is_paired(row):
            raise ValueError(f"its row of {row['figure']} and {row['arm']} is not whole")


def _is_paired(row: Mapping[str, Any]) -> bool:
    """Whether a row has all that belongs to a difference."""
    whole = row.get("baseline_mean") is not None and {"low", "high", "p", "pairs"} <= row.keys()
    return whole and (row["low"] is None) == (row["high"] is None)
