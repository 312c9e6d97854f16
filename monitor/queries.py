"""One function per question: a DuckDB connection and arguments in, a Frame (dict of numpy columns) out.

The connection shows the tables of monitor.store.schema as views: a Tail's `cursor()` or an opened catalog. Questions
about tokens and samples take the segment files to read (`Tail.files`), so that no question ever opens all of them.
Distributions come back with at most `max_columns` columns of steps: neighbouring steps are then pooled by adding their
counts, which is exact, because all histograms of a metric share their cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np

from monitor.metrics import cell_bounds, n_cells

Frame = dict[str, np.ndarray]
QUANTILES = (0.05, 0.25, 0.50, 0.75, 0.95, 0.99)
MAX_POINTS = 2000


def frame(con: duckdb.DuckDBPyConnection, sql: str, parameters: Sequence[Any] = ()) -> Frame:
    """The result of a query as plain numpy columns; NULL is nan in numbers and '' in text."""
    columns = con.execute(sql, list(parameters)).fetchnumpy()
    return {name: _plain(column) for name, column in columns.items()}


def _plain(column: np.ndarray) -> np.ndarray:
    if not isinstance(column, np.ma.MaskedArray):
        return column
    if column.dtype.kind in "fiub":
        return np.ma.filled(column.astype(np.float64), np.nan) if column.mask.any() else column.data
    return column.filled("")


def n_rows(rows: Frame) -> int:
    return len(next(iter(rows.values()))) if rows else 0


def select(rows: Frame, mask: np.ndarray) -> Frame:
    """The rows of a frame where `mask` holds."""
    return {name: column[mask] for name, column in rows.items()}


# --- runs and scalars ---------------------------------------------------------------------------------------------


def run_spans(con: duckdb.DuckDBPyConnection) -> Frame:
    """run, first_step, last_step, n_steps, first_ts, last_ts of each run that has a committed step."""
    return frame(
        con,
        "SELECT run, min(step) AS first_step, max(step) AS last_step, count(DISTINCT step) AS n_steps, "
        "min(ts) AS first_ts, max(ts) AS last_ts FROM steps GROUP BY run ORDER BY run",
    )


def scalar_names(con: duckdb.DuckDBPyConnection, runs: Sequence[str]) -> list[str]:
    """Every recorded key of the runs, sorted."""
    rows = frame(con, "SELECT DISTINCT name FROM steps WHERE run IN (SELECT unnest(?)) ORDER BY name", [list(runs)])
    return [str(name) for name in rows["name"]]


def scalar_series(
    con: duckdb.DuckDBPyConnection, runs: Sequence[str], names: Sequence[str], max_points: int = MAX_POINTS
) -> Frame:
    """run, name, step, value by step, of rank 0. Longer series keep the lowest, highest and last of each bin."""
    return frame(
        con,
        """
        WITH points AS (
            SELECT run, name, step, value, count(*) OVER series AS n,
                   ((row_number() OVER (series ORDER BY step)) - 1) * $bins // count(*) OVER series AS bin
            FROM steps WHERE rank = 0 AND run IN (SELECT unnest($runs)) AND name IN (SELECT unnest($names))
            WINDOW series AS (PARTITION BY run, name)
        ), kept AS (
            SELECT run, name, step, value FROM points WHERE n <= $max_points
            UNION ALL
            SELECT DISTINCT run, name, point.step, point.value FROM (
                SELECT run, name, unnest([
                    min_by({'step': step, 'value': value}, value), max_by({'step': step, 'value': value}, value),
                    max_by({'step': step, 'value': value}, step)]) AS point
                FROM points WHERE n > $max_points GROUP BY run, name, bin)
        )
        SELECT run, name, step, value FROM kept WHERE step IS NOT NULL ORDER BY run, name, step
        """.replace("$bins", str(max(1, max_points // 3)))
        .replace("$max_points", str(max_points))
        .replace("$runs", "?")
        .replace("$names", "?"),
        [list(runs), list(names)],
    )


def series_of(rows: Frame, run: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one series of `scalar_series`."""
    mask = (rows["run"] == run) & (rows["name"] == name)
    return rows["step"][mask], rows["value"][mask]


def latest_scalars(con: duckdb.DuckDBPyConnection, runs: Sequence[str]) -> Frame:
    """run, name, step, value: the newest value of every recorded key."""
    return frame(
        con,
        "SELECT run, name, max(step) AS step, max_by(value, step) AS value FROM steps "
        "WHERE rank = 0 AND run IN (SELECT unnest(?)) GROUP BY run, name ORDER BY run, name",
        [list(runs)],
    )


def value_at(rows: Frame, run: str, name: str) -> float:
    """The value of one key in `latest_scalars`; nan if it was never recorded."""
    found = rows["value"][(rows["run"] == run) & (rows["name"] == name)]
    return float(found[-1]) if len(found) else float("nan")


# --- distributions ------------------------------------------------------------------------------------------------


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
    """step, last_step [S], counts int64 [S, cells], n, sum, min, max [S], ranks added; at most `max_columns` rows.

    `newest`: only the last so many steps.
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


def quantile_rows(
    counts: np.ndarray, edges_id: str, qs: Sequence[float], low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """`monitor.records.quantiles_from_counts` of many rows at once: counts [S, cells] -> float64 [S, len(qs)]."""
    lows, highs = cell_bounds(edges_id)
    total, cumulative, row = counts.sum(1), counts.cumsum(1), np.arange(len(counts))
    out = np.full((len(counts), len(qs)), np.nan)
    for column, q in enumerate(qs):
        rank = q * total
        cell = np.minimum((cumulative < rank[:, None]).sum(1), counts.shape[1] - 1)
        cell = np.where(counts[row, cell] == 0, np.argmax(counts > 0, axis=1), cell)
        inside = (rank - (cumulative[row, cell] - counts[row, cell])) / np.maximum(counts[row, cell], 1)
        bottom, top = np.clip(lows[cell], low, high), np.clip(highs[cell], low, high)
        out[:, column] = np.where(total > 0, bottom + np.clip(inside, 0.0, 1.0) * (top - bottom), np.nan)
    return out


def quantile_series(
    con: duckdb.DuckDBPyConnection, run: str, metric: str, split: str = "all", max_columns: int = MAX_POINTS
) -> Frame:
    """step, mean, n and p5, p25, p50, p75, p95, p99 of a metric's distribution at each step, from counts."""
    matrix = count_matrix(con, run, metric, split, max_columns)
    if not len(matrix["step"]):
        return {name: np.zeros(0) for name in ("step", "mean", "n", *(f"p{round(q * 100)}" for q in QUANTILES))}
    edges_id = str(matrix["edges_id"][0])
    values = quantile_rows(matrix["counts"], edges_id, QUANTILES, matrix["min"], matrix["max"])
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


# --- alerts, events, tokens ---------------------------------------------------------------------------------------


def alert_log(con: duckdb.DuckDBPyConnection, runs: Sequence[str]) -> Frame:
    """Every transition of every alert, oldest first."""
    return frame(
        con,
        "SELECT run, step, ts, rule, severity, state, first_step, value, baseline, threshold, message, action "
        "FROM alerts WHERE run IN (SELECT unnest(?)) ORDER BY run, step, ts",
        [list(runs)],
    )


def alert_spans(log: Frame) -> Frame:
    """One row for each alert that fired: run, rule, severity, first_step, end_step (nan while it fires), value, ...

    severity, value and message are those of the worst firing transition; pending transitions never show.
    """
    spans: dict[tuple[Any, ...], dict[str, Any]] = {}
    ranks = {"info": 0, "warning": 1, "critical": 2}
    for i in range(n_rows(log)):
        row = {name: column[i] for name, column in log.items()}
        key = (row["run"], row["rule"], row["first_step"])
        if row["state"] == "firing":
            known = spans.get(key)
            if known is None or ranks.get(row["severity"], 0) > ranks.get(known["severity"], 0):
                spans[key] = row | {"end_step": np.nan}
            else:
                known["end_step"] = np.nan
        elif row["state"] == "resolved" and key in spans:
            spans[key]["end_step"] = float(row["step"])
    names = ("run", "rule", "severity", "first_step", "end_step", "value", "baseline", "threshold", "message", "action")
    kinds = {"first_step": int, "end_step": float, "value": float, "baseline": float, "threshold": float}
    ordered = sorted(spans.values(), key=lambda span: (span["run"], span["first_step"]))
    return {name: np.array([span[name] for span in ordered], kinds.get(name, object)) for name in names}


def events(con: duckdb.DuckDBPyConnection, runs: Sequence[str]) -> Frame:
    """run, step (nan outside any), ts, kind, message; newest first."""
    return frame(
        con,
        "SELECT run, CAST(step AS DOUBLE) AS step, ts, kind, message FROM events "
        "WHERE run IN (SELECT unnest(?)) ORDER BY ts DESC, step DESC",
        [list(runs)],
    )


def _read_step(con: duckdb.DuckDBPyConnection, files: Sequence[str], columns: str, where: str, values: list) -> Frame:
    if not files:
        return {}
    sql = f"SELECT {columns} FROM read_parquet(?, hive_partitioning = false) WHERE {where} ORDER BY rank, sample"
    return frame(con, sql + (", position" if "position" in columns else ""), [list(files), *values])


def samples_of_step(con: duckdb.DuckDBPyConnection, files: Sequence[str], step: int) -> Frame:
    """The rollouts of a step, with prompt, completion and token texts; {} without files."""
    columns = (
        "rank, sample, group_id, prompt_id, split, reward, correct, advantage, n_tokens, truncated, "
        "prompt, completion, token_texts"
    )
    return _read_step(con, files, columns, "step = ?", [step])


def tokens_of_step(
    con: duckdb.DuckDBPyConnection, files: Sequence[str], step: int, samples: Sequence[int], rank: int = 0
) -> Frame:
    """The response tokens of some rollouts of a step, by sample and position; {} without files."""
    columns = "rank, sample, position, token_id, logprob, entropy, renyi2, deviation, alive, weight"
    where = "step = ? AND sample IN (SELECT unnest(?)) AND rank = ?"
    return _read_step(con, files, columns, where, [step, list(samples), rank])
