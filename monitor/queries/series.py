"""Questions about runs and their scalars."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

import duckdb
import numpy as np

from monitor.queries.frames import MAX_POINTS, Frame, frame

Series = tuple[np.ndarray, np.ndarray]  # steps int64 [n] and values float64 [n], ascending steps
NOTHING: Series = (np.empty(0, np.int64), np.empty(0))


def run_spans(con: duckdb.DuckDBPyConnection) -> Frame:
    """run, first_step, last_step, n_steps, first_ts, last_ts of each run that has a committed step."""
    return frame(
        con,
        "SELECT run, min(step) AS first_step, max(step) AS last_step, count(DISTINCT step) AS n_steps, "
        "min(ts) AS first_ts, max(ts) AS last_ts FROM steps GROUP BY run ORDER BY run",
    )


def scalar_series(
    con: duckdb.DuckDBPyConnection, runs: Sequence[str], names: Sequence[str], max_points: int | None = MAX_POINTS
) -> Frame:
    """run, name, step, value of rank 0, by run, name and step.

    A series of more than max_points is cut into bins, of which the lowest, highest and last points are kept. None: all.
    """
    if max_points is None:
        return frame(
            con,
            "SELECT run, name, step, value FROM steps WHERE rank = 0 AND run IN (SELECT unnest(?)) "
            "AND name IN (SELECT unnest(?)) ORDER BY run, name, step",
            [list(runs), list(names)],
        )
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


def new_scalars(
    con: duckdb.DuckDBPyConnection, after: Mapping[str, int], names: Sequence[str], prefix: str = ""
) -> dict[str, dict[str, Series]]:
    """`whole_series` of the runs in `after`, with only the rows behind the step given there.

    names: the keys wanted; those that begin with `prefix` come too, unless it is empty.
    """
    return series_by_run(
        con,
        "steps JOIN (SELECT unnest(?) AS run, unnest(?) AS after) USING (run) "
        "WHERE rank = 0 AND step > after AND (list_contains(?, name) OR (? AND starts_with(name, ?)))",
        [list(after), list(after.values()), list(names), bool(prefix), prefix],
    )


def whole_series(
    con: duckdb.DuckDBPyConnection, runs: Sequence[str], names: Sequence[str]
) -> dict[str, dict[str, Series]]:
    """{run: {name: its steps int64 [n], ascending, and values float64 [n]}} of rank 0, of what was recorded."""
    return series_by_run(
        con,
        "steps WHERE rank = 0 AND run IN (SELECT unnest(?)) AND name IN (SELECT unnest(?))",
        [list(runs), list(names)],
    )


def series_by_run(
    con: duckdb.DuckDBPyConnection, source: str, parameters: Sequence[object]
) -> dict[str, dict[str, Series]]:
    """`whole_series` of the rows of a `source` with its WHERE. A text beside each value would take most of the time."""
    rows = frame(
        con,
        "SELECT run, name, list(step ORDER BY step) AS steps, list(coalesce(value, 'nan') ORDER BY step) AS values "
        f"FROM {source} GROUP BY run, name ORDER BY run, name",
        parameters,
    )
    found = dict[str, dict[str, Series]]()
    for run, name, steps, values in zip(*rows.values(), strict=True):
        found.setdefault(str(run), {})[str(name)] = np.asarray(steps, np.int64), np.asarray(values, np.float64)
    return found


def series_of(rows: Frame, run: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one series of `scalar_series`, whose rows are sorted by run and name."""
    first, last = bisect_left(rows["run"], run), bisect_right(rows["run"], run)  # a mask of texts costs ms a series
    first, last = bisect_left(rows["name"], name, first, last), bisect_right(rows["name"], name, first, last)
    return rows["step"][first:last], rows["value"][first:last]


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
