"""Followed: the scalars and histograms of one run as arrays, to which each look adds only the steps that are new.

A page that redraws at every step must not read the whole run every time. What was read is kept until the run's rows
change behind it: a new attempt began, or a segment vanished.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import duckdb
import numpy as np

from monitor.queries.distributions import HISTOGRAMS, summed
from monitor.queries.frames import MAX_POINTS, Frame, frame, n_rows
from monitor.queries.series import NOTHING, Series, series_by_run


@dataclass(slots=True)
class _Settled:
    """Rows up to `step` were read and stay as they are: every rank has committed it."""

    step: int = -1


@dataclass(slots=True)
class _Counts(_Settled):
    """Counts of one metric and split, summed over ranks: what `monitor.queries.distributions.count_matrix` returns."""

    rows: Frame = field(default_factory=dict)


class Followed:
    """One run. `look(con, basis)` reads what is new; then `series` and `counts` answer from memory.

    basis: changes when rows that were read may have changed, see `monitor.store.tail.RunEntry.basis`.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self._lock = threading.RLock()
        self._basis: object = None
        self._scalars = _Settled()
        self._series: dict[str, Series] = {}
        self._counts: dict[tuple[str, str], _Counts] = {}
        self._settled = -1

    def look(self, con: duckdb.DuckDBPyConnection, basis: object) -> None:
        """Read what is new of the scalars, and how far the ranks have come."""
        with self._lock:
            newest = frame(
                con,
                "SELECT max(step) AS step, max(attempt) AS attempt FROM committed WHERE run = ? GROUP BY rank",
                [self.run],
            )
            basis = (basis, *newest["attempt"])
            if basis != self._basis:
                self._basis, self._scalars, self._series, self._counts = basis, _Settled(), {}, {}
            self._settled = int(newest["step"].min()) if n_rows(newest) else -1
            known = self._scalars.step
            found = series_by_run(con, "steps WHERE run = ? AND rank = 0 AND step > ?", [self.run, known])
            for name, fresh in found.get(self.run, {}).items():
                former = self._series.get(name, NOTHING)
                kept = int(np.searchsorted(former[0], known, side="right"))
                steps, values = (np.concatenate([old[:kept], new]) for old, new in zip(former, fresh, strict=True))
                self._series[name] = steps, values
            self._scalars.step = self._settled

    @property
    def keys(self) -> list[str]:
        """Every recorded key, sorted."""
        return sorted(self._series)

    @property
    def newest_step(self) -> int:
        """The newest step of any series; -1 without any."""
        return max((int(steps[-1]) for steps, _ in self._series.values()), default=-1)

    def series(self, key: str) -> Series:
        """All of one series of rank 0; empty where nothing was recorded."""
        return self._series.get(key, NOTHING)

    def counts(self, con: duckdb.DuckDBPyConnection, metric: str, split: str) -> Frame:
        """step [S], counts int64 [S, cells], n, sum, min, max, edges_id [S] of every step, summed over ranks."""
        with self._lock:
            known = self._counts.setdefault((metric, split), _Counts())
            rows = frame(
                con,
                f"{HISTOGRAMS} AND step > ? ORDER BY step",
                [self.run, metric, split, known.step],
            )
            fresh = summed(rows)
            if known.rows:
                kept = int(np.searchsorted(known.rows["step"], known.step, side="right"))
                fresh = (
                    {name: np.concatenate([known.rows[name][:kept], fresh[name]]) for name in fresh}
                    if n_rows(fresh)
                    else {name: column[:kept] for name, column in known.rows.items()}
                )
            known.rows, known.step = fresh, self._settled
            return fresh


class Past:
    """A run as it stood after a step: it answers like its `Followed`, and with nothing later than `until`."""

    def __init__(self, whole: Followed, until: int) -> None:
        self.whole, self.until = whole, until

    @property
    def keys(self) -> list[str]:
        """Every key that was recorded by then, sorted."""
        return [key for key in self.whole.keys if len(self.series(key)[0])]

    @property
    def newest_step(self) -> int:
        """The newest step of any series by then; -1 without any."""
        return max((int(self.series(key)[0][-1]) for key in self.keys), default=-1)

    def series(self, key: str) -> Series:
        """The series up to `until`."""
        steps, values = self.whole.series(key)
        end = int(np.searchsorted(steps, self.until, side="right"))
        return steps[:end], values[:end]

    def counts(self, con: duckdb.DuckDBPyConnection, metric: str, split: str) -> Frame:
        """Counts of every step up to `until`; as `Followed.counts`."""
        rows = self.whole.counts(con, metric, split)
        return {name: column[rows["step"] <= self.until] for name, column in rows.items()}


def thinned(series: Series, most: int = MAX_POINTS) -> Series:
    """At most about `most` points of a series: of each bin of steps the lowest, the highest and the last.

    A bin holds a power of two of points, so that bins stay the same while a run grows, and only the last one changes.
    Non-finite values count as neither low nor high.
    """
    steps, values = series
    size = 1
    while 3 * len(steps) > most * size:
        size *= 2
    if len(steps) <= most:
        return series
    bins = len(steps) // size
    whole = values[: bins * size].reshape(bins, size)
    offset = np.arange(bins) * size
    low = np.argmin(np.where(np.isfinite(whole), whole, np.inf), axis=1) + offset
    high = np.argmax(np.where(np.isfinite(whole), whole, -np.inf), axis=1) + offset
    kept = np.unique(np.concatenate([low, high, offset + size - 1, np.arange(bins * size, len(steps))]))
    return steps[kept], values[kept]
