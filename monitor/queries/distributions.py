"""Questions about histograms: counts over time, quantiles, joint counts.

Distributions come back with at most `max_columns` columns of steps. Where there are more steps, neighbouring ones are
pooled by adding their counts. That is exact, because all histograms of a metric share their cells.
"""

from __future__ import annotations

import duckdb
import numpy as np

from monitor.metrics import n_cells
from monitor.queries.frames import MAX_POINTS, Frame, frame, n_rows
from monitor.records import quantiles_from_counts

QUANTILES = (0.05, 0.25, 0.50, 0.75, 0.95, 0.99)


_ONE_SPLIT = (
    "run = ? AND metric = ? AND split = ? "
    "AND (CAST(? AS INTEGER) IS NULL OR step > (SELECT max(step) FROM steps WHERE run = ?) - CAST(? AS INTEGER))"
)


def count_matrix(
    con: duckdb.DuckDBPyConnection,
    run: str,
    metric: str,
    split: str = "all",
    max_columns: int = MAX_POINTS,
    newest: int | None = None,
) -> Frame:
    """step, last_step [S], counts int64 [S, cells], n, sum, min, max [S], summed over ranks; S <= max_columns.

    newest: take only this many of the last steps.
    """
    rows = frame(
        con,
        f"SELECT step, edges_id, counts, n, sum, min, max FROM histograms WHERE {_ONE_SPLIT} ORDER BY step",
        [run, metric, split, newest, run, newest],
    )
    steps, first = np.unique(rows["step"], return_index=True)
    if not len(steps):
        empty = np.zeros(0)
        return {"step": empty, "last_step": empty, "counts": np.zeros((0, 1), np.int64), "n": empty, "sum": empty,
                "min": empty, "max": empty, "edges_id": np.array([], object)}  # fmt: skip
    bins = min(max_columns, len(steps))
    starts = first[np.unique(-(-np.arange(bins) * len(steps) // bins))]
    last = np.append(starts[1:], len(rows["step"])) - 1
    return {
        "step": rows["step"][starts],
        "last_step": rows["step"][last],
        "counts": np.add.reduceat(np.stack(list(rows["counts"])), starts),
        "n": np.add.reduceat(rows["n"], starts),
        "sum": np.add.reduceat(rows["sum"], starts),
        "min": np.minimum.reduceat(rows["min"], starts),
        "max": np.maximum.reduceat(rows["max"], starts),
        "edges_id": rows["edges_id"][starts],
    }


def counts_of_step(
    con: duckdb.DuckDBPyConnection, run: str, metric: str, split: str = "all", step: int | None = None
) -> Frame:
    """As `count_matrix`, of one step alone: the last one up to `step`, or the first of all where there is none."""
    rows = frame(
        con,
        "SELECT step, any_value(edges_id) AS edges_id, sum(n) AS n, list(counts) AS counts FROM histograms "
        "WHERE run = ? AND metric = ? AND split = ? GROUP BY step "
        "ORDER BY step <= CAST(? AS BIGINT) DESC NULLS LAST, "
        "CASE WHEN step <= CAST(? AS BIGINT) THEN -step ELSE step END LIMIT 1",
        [run, metric, split, step, step],
    )
    counts = [np.sum(np.stack(list(per_rank)), axis=0) for per_rank in rows["counts"]]
    return {name: rows[name] for name in ("step", "n", "edges_id")} | {
        "counts": np.stack(counts) if counts else np.zeros((0, 1), np.int64)
    }


def quantile_series(
    con: duckdb.DuckDBPyConnection, run: str, metric: str, split: str = "all", max_columns: int = MAX_POINTS
) -> Frame:
    """step, mean, n and p5, p25, p50, p75, p95, p99 of a metric's distribution at each step, from counts."""
    matrix = count_matrix(con, run, metric, split, max_columns)
    if not len(matrix["step"]):
        return {name: np.zeros(0) for name in ("step", "mean", "n", *(f"p{round(q * 100)}" for q in QUANTILES))}
    edges_id = str(matrix["edges_id"][0])
    values = quantiles_from_counts(matrix["counts"], edges_id, QUANTILES, low=matrix["min"], high=matrix["max"])
    mean = np.where(matrix["n"] > 0, matrix["sum"] / np.maximum(matrix["n"], 1), np.nan)
    result = {"step": matrix["step"], "mean": mean, "n": matrix["n"]}
    return result | {f"p{round(q * 100)}": values[:, i] for i, q in enumerate(QUANTILES)}


def joint_counts(
    con: duckdb.DuckDBPyConnection,
    run: str,
    metric: str = "entropy*deviation",
    split: str = "all",
    newest: int | None = None,
) -> np.ndarray:
    """Joint counts int64 [cells(a), cells(b)] of a metric "a*b", summed over all steps or the last `newest`."""
    rows = frame(
        con,
        f"SELECT edges_id, counts FROM histograms WHERE {_ONE_SPLIT}",
        [run, metric, split, newest, run, newest],
    )
    if not n_rows(rows):
        return np.zeros((0, 0), np.int64)
    shape = tuple(n_cells(part) for part in str(rows["edges_id"][0]).split("*"))
    return np.stack(list(rows["counts"])).sum(0).reshape(shape)
