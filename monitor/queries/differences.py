"""Questions about several runs: differences of distributions and of configurations, and their final figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, TypeVar

import duckdb
import numpy as np

from monitor.queries.distributions import pooled
from monitor.queries.frames import MAX_POINTS, Frame
from monitor.queries.series import NOTHING, Series, whole_series

T = TypeVar("T")


def difference_of(baseline: Sequence[Frame], other: Sequence[Frame], max_columns: int = 300) -> Frame:
    """step [S], difference [S, cells]: share of tokens in each cell, `other` minus `baseline`, at the steps that all
    runs have. Each run is what `monitor.queries.distributions.summed` has of it."""
    runs = [pooled(rows, MAX_POINTS) for rows in (*baseline, *other)]
    common = reduce(np.intersect1d, (rows["step"] for rows in runs)) if runs else np.zeros(0)
    if not len(common):
        return {"step": np.zeros(0), "difference": np.zeros((0, 1))}
    gap = _shares(runs[len(baseline) :], common) - _shares(runs[: len(baseline)], common)
    bins = min(max_columns, len(common))
    starts = np.unique(-(-np.arange(bins) * len(common) // bins))
    widths = np.diff(np.append(starts, len(common)))[:, None]
    return {"step": common[starts], "difference": np.add.reduceat(gap, starts) / widths}


def _shares(runs: Sequence[Frame], steps: np.ndarray) -> np.ndarray:
    """Share of tokens in each cell at each of `steps`, mean over the runs: float64 [S, cells]."""
    total = np.zeros(())
    for rows in runs:
        shares = rows["counts"][np.isin(rows["step"], steps)].astype(np.float64)
        shares /= np.maximum(shares.sum(1, keepdims=True), 1)
        total = total + shares
    return np.asarray(total / len(runs))


def first_difference(con: duckdb.DuckDBPyConnection, one: str, other: str) -> int | None:
    """The first step that both runs have at which their entropy, reward or loss is not the same; None without any.

    Two runs of equal seed begin alike, until what differs between them first acts.
    """
    sql = """
        SELECT min(step) FROM steps a JOIN steps b USING (step, name)
        WHERE a.run = ? AND b.run = ? AND name IN ('entropy', 'reward', 'loss') AND a.value IS DISTINCT FROM b.value
    """
    found = con.execute(sql, [one, other]).fetchone()
    return None if found is None or found[0] is None else int(found[0])


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


def setting(config: object, option: str, kind: type[T]) -> T | None:
    """The value of a dotted option of a configuration, if it is of that type. Trainers of others store what they like.

    Example: setting({"eval": {"k": 4}}, "eval.k", int) is 4, and setting({"eval": True}, "eval.k", int) is None.
    """
    for name in option.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config if isinstance(config, kind) and not isinstance(config, bool) else None


def config_difference(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{option: {run: value}} of every option that differs between the runs' configurations; '' where a run lacks it."""
    flat = {run: flatten(config) for run, config in configs.items()}
    options = sorted({option for values in flat.values() for option in values})
    table = {option: {run: values.get(option, "") for run, values in flat.items()} for option in options}
    return {option: row for option, row in table.items() if len({str(value) for value in row.values()}) > 1}


def final_figures(
    con: duckdb.DuckDBPyConnection, runs: Sequence[str], names: Sequence[str], level_name: str = "eval/heldout/pass@1"
) -> dict[str, Any]:
    """{"last": {run: {name: value, "step": step}}, "equal": the same, "level": the equal level}.

    "last" has each run's newest values. "equal" has each run's values where its `level_name` first reaches the level,
    which is the lowest of the runs' best ones, so that runs are compared at equal pass@1. Values between evaluations
    lie on straight lines. "equal" is {} if some run never evaluated.
    """
    return figures_of(whole_series(con, runs, [*names, level_name]), runs, names, level_name)


def figures_of(
    series: Mapping[str, Mapping[str, Series]],
    runs: Sequence[str],
    names: Sequence[str],
    level_name: str = "eval/heldout/pass@1",
) -> dict[str, Any]:
    """`final_figures` of `whole_series`, which hold at least these runs and names."""
    levels = {run: series.get(run, {}).get(level_name, NOTHING) for run in runs}
    reachable = bool(runs) and all(len(values) for _, values in levels.values())
    level = min(np.nanmax(values) for _, values in levels.values()) if reachable else np.nan
    result: dict[str, Any] = {"last": {}, "equal": {}, "level": float(level)}
    for run in runs:
        recorded = series.get(run, {})
        found = {name: recorded[name] for name in dict.fromkeys([*names, level_name]) if name in recorded}
        result["last"][run] = {name: float(values[-1]) for name, (_, values) in found.items()} | {
            "step": float(max((steps[-1] for steps, _ in found.values()), default=np.nan))
        }
        if reachable:
            step = crossing(*levels[run], level)
            result["equal"][run] = {name: float(np.interp(step, *pair)) for name, pair in found.items()} | {
                "step": step
            }
    return result


def crossing(steps: np.ndarray, values: np.ndarray, level: float) -> float:
    """The step, which may be fractional, at which the polyline through (steps, values) first reaches `level`.

    Example: steps 0, 20 with values 0.2, 0.6 reach 0.5 at 0 + 20 * (0.5 - 0.2) / (0.6 - 0.2) = 15.
    """
    above = int(np.argmax(values >= level))
    if above == 0:
        return float(steps[0])
    share = (level - values[above - 1]) / (values[above] - values[above - 1])
    return float(steps[above - 1] + share * (steps[above] - steps[above - 1]))
