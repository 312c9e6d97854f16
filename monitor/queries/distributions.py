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


HISTOGRAMS = (
    "SELECT step, edges_id, counts, n, sum, min, max FROM histograms WHERE run = ? AND metric = ? AND split = ?"
)
_SUMS = ("n", "sum")


def count_matrix(
    con: duckdb.DuckDBPyConnection, run: str, metric: str, split: str = "all", max_columns: int = MAX_POINTS
) -> Frame:
    """step, last_step [S], counts int64 [S, cells], n, sum, min, max [S], summed over ranks; S <= max_columns."""
    return pooled(summed(frame(con, f"{HISTOGRAMS} ORDER BY step", [run, metric, split])), max_columns)


def summed(rows: Frame) -> Frame:
    """Rows of histograms, by step, with those of several ranks added up."""
    steps, first = np.unique(rows["step"], return_index=True)
    if not len(steps):
        empty = np.zeros(0)
        return {"step": np.zeros(0, np.int64), "counts": np.zeros((0, 1), np.int64), "n": empty, "sum": empty,
                "min": empty, "max": empty, "edges_id": np.array([], object)}  # fmt: skip
    return {
        "step": steps,
        "counts": np.add.reduceat(np.stack(list(rows["counts"])), first),
        **{name: np.add.reduceat(rows[name], first) for name in _SUMS},
        "min": np.minimum.reduceat(rows["min"], first),
        "max": np.maximum.reduceat(rows["max"], first),
        "edges_id": rows["edges_id"][first],
    }


def pooled(rows: Frame, most: int, *, whole: bool = False) -> Frame:
    """`summed` with neighbouring steps added up, in at most `most` columns, and their last_step.

    A column pools a power of two of steps, so that columns stay the same while a run grows. The sums are exact, because
    all histograms of a metric share their cells. whole: without the newest column while steps are still to come to it.
    """
    size = 1
    while -(-len(rows["step"]) // size) > most:
        size *= 2
    if whole:
        rows = {name: column[: len(column) // size * size] for name, column in rows.items()}
    first = np.arange(0, len(rows["step"]), size)
    if not len(first):
        return {"last_step": rows["step"], **rows}
    last = np.append(first[1:], len(rows["step"])) - 1
    return {
        "step": rows["step"][first],
        "last_step": rows["step"][last],
        "counts": np.add.reduceat(rows["counts"], first),
        **{name: np.add.reduceat(rows[name], first) for name in _SUMS},
        "min": np.minimum.reduceat(rows["min"], first),
        "max": np.maximum.reduceat(rows["max"], first),
        "edges_id": rows["edges_id"][first],
    }


def quantile_series(
    con: duckdb.DuckDBPyConnection, run: str, metric: str, split: str = "all", max_columns: int = MAX_POINTS
) -> Frame:
    """`quantiles` of a metric's distribution at each step."""
    return quantiles(count_matrix(con, run, metric, split, max_columns))


def quantiles(matrix: Frame) -> Frame:
    """step, mean, n and p5, p25, p50, p75, p95, p99 of each column of a `count_matrix`, from its counts."""
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
    after: int = -1,
    until: int | None = None,
) -> np.ndarray:
    """Joint counts int64 [cells(a), cells(b)] of a metric "a*b", summed over the steps after < step <= `until`.

    until: None for all later steps.
    """
    question = f"{HISTOGRAMS} AND step > ? AND (step <= ?::BIGINT) IS NOT FALSE"
    rows = frame(con, question, [run, metric, split, after, until])
    if not n_rows(rows):
        return np.zeros((0, 0), np.int64)
    shape = tuple(n_cells(part) for part in str(rows["edges_id"][0]).split("*"))
    return np.stack(list(rows["counts"])).sum(0).reshape(shape)
