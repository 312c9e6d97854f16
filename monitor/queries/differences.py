"""Questions about several runs: differences of distributions and of configurations, and their final figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import duckdb
import numpy as np

from monitor.queries.distributions import count_matrix
from monitor.queries.frames import Frame
from monitor.queries.series import scalar_series, series_of

T = TypeVar("T")


def arm_shares(
    con: duckdb.DuckDBPyConnection, runs: Sequence[str], metric: str, steps: np.ndarray, split: str = "all"
) -> np.ndarray:
    """Share of tokens in each cell at each of `steps`, mean over the runs: float64 [S, cells]."""
    total = None
    for run in runs:
        matrix = count_matrix(con, run, metric, split)
        shares = matrix["counts"][np.isin(matrix["step"], steps)].astype(np.float64)
        shares /= np.maximum(shares.sum(1, keepdims=True), 1)
        total = shares if total is None else total + shares
    return np.zeros((0, 1)) if total is None else total / len(runs)


def difference_matrix(
    con: duckdb.DuckDBPyConnection,
    baseline: Sequence[str],
    other: Sequence[str],
    metric: str = "entropy",
    max_columns: int = 300,
) -> Frame:
    """step [S], difference [S, cells]: share of tokens in each cell, `other` minus `baseline`, at the steps that all
    runs have."""
    common: np.ndarray | None = None
    for run in (*baseline, *other):
        steps = count_matrix(con, run, metric)["step"]
        common = steps if common is None else np.intersect1d(common, steps)
    if common is None or not len(common):
        return {"step": np.zeros(0), "difference": np.zeros((0, 1))}
    gap = arm_shares(con, other, metric, common) - arm_shares(con, baseline, metric, common)
    bins = min(max_columns, len(common))
    starts = np.unique(-(-np.arange(bins) * len(common) // bins))
    widths = np.diff(np.append(starts, len(common)))[:, None]
    return {"step": common[starts], "difference": np.add.reduceat(gap, starts) / widths}


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
    rows = scalar_series(con, runs, [*names, level_name], max_points=None)
    series = {run: {name: series_of(rows, run, name) for name in {*names, level_name}} for run in runs}
    levels = {run: series[run][level_name] for run in runs}
    reachable = bool(runs) and all(len(values) for _, values in levels.values())
    level = min(np.nanmax(values) for _, values in levels.values()) if reachable else np.nan
    result: dict[str, Any] = {"last": {}, "equal": {}, "level": float(level)}
    for run in runs:
        found = {name: (steps, values) for name, (steps, values) in series[run].items() if len(steps)}
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
