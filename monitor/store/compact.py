"""Compaction and pruning: a run's segments are merged into a new generation, which is swapped in under live readers.

The new generation is built beside the old one, made durable, and takes its place when the `data` link is replaced in
one rename. A query that had listed the old files finds them gone and is repeated; none ever sees both generations.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from monitor.errors import StoreError
from monitor.store.runs import get_run, require_store
from monitor.store.schema import TABLES, SegmentName, run_dir
from monitor.store.segments import (
    QUARANTINED,
    copy_segment,
    crc32_of,
    fsync_folder,
    list_segments,
    memory_connection,
    quote,
)

_MERGED_BYTES = 256 << 20  # segments are merged up to this size, so that a step of a big run is still found quickly


@dataclass(frozen=True, slots=True)
class Compaction:
    """What one compaction did. Files and bytes of all tables; `kept_steps` is None where tokens were left alone."""

    run: str
    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int
    kept_steps: tuple[int, ...] | None = None


def compact_run(store: str | Path, run: str, *, thin_tokens: str | None = None, grace_s: float = 0.5) -> Compaction:
    """Merge a run's segments; with `thin_tokens` also drop the raw tokens of all but some steps (see `kept_steps`).

    grace_s: how long the old files stay after the swap, for queries under way. Raises StoreError for a run that is
    unknown, running, damaged or being compacted, or for a faulty `thin_tokens`.
    """
    root = require_store(store)
    state = get_run(root, run)
    if state.status in ("running", "stalled"):
        raise StoreError(f"Run {run!r} is {state.status}: compact it when it has ended.")
    with _alone(root, run), memory_connection(threads=2) as con:
        _refuse_damage(root, run)
        steps = None if thin_tokens is None else kept_steps(thin_tokens, _token_steps(con, root, run))
        before = _sizes(root, run)
        old = _publish(con, root, run, steps)
        after = _sizes(root, run)
        time.sleep(grace_s)
        shutil.rmtree(old)
    return Compaction(run, before[0], after[0], before[1], after[1], steps)


def kept_steps(spec: str, steps: list[int]) -> tuple[int, ...]:
    """The steps whose tokens stay: "1,50,100" names them, "5" keeps that many, evenly spaced, first and last included.

    "50," names one step, "0" keeps none. Raises StoreError for anything else.
    """
    parts = [part.strip() for part in spec.split(",")]
    if not all(part.isdigit() for part in parts if part) or not parts[0]:
        raise StoreError(f"--thin-tokens is {spec!r}, expected steps like 1,50,100 or one count like 5.")
    if len(parts) > 1:
        named = {int(part) for part in parts if part}
        return tuple(step for step in steps if step in named)
    count = int(parts[0])
    if count >= len(steps):
        return tuple(steps)
    if count <= 1:
        return tuple(steps[-count:]) if count else ()
    return tuple(steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count))


@contextmanager
def _alone(root: Path, run: str) -> Iterator[None]:
    """Hold the run's lock alone: no recorder writes it, no other compaction runs."""
    with open(run_dir(root, run) / "run.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(f"Run {run!r} is in use by a recorder or another compaction ({error}).") from None
        yield


def _refuse_damage(root: Path, run: str) -> None:
    for table in TABLES:
        for name, path in list_segments(root, run, table):
            if crc32_of(path) != name.crc32:
                raise StoreError(f"{path} is damaged: run `rlvr store check` and decide about it before compacting.")


def _token_steps(con: duckdb.DuckDBPyConnection, root: Path, run: str) -> list[int]:
    paths = [str(path) for _, path in list_segments(root, run, "tokens")]
    if not paths:
        return []
    query = "SELECT DISTINCT step FROM read_parquet(?, hive_partitioning = false) ORDER BY step"
    return [step for (step,) in con.execute(query, [paths]).fetchall()]


def _sizes(root: Path, run: str) -> tuple[int, int]:
    paths = [path for table in TABLES for _, path in list_segments(root, run, table)]
    return len(paths), sum(path.stat().st_size for path in paths)


def _publish(con: duckdb.DuckDBPyConnection, root: Path, run: str, steps: tuple[int, ...] | None) -> Path:
    """Build, swap in and make durable the next generation; the path of the old one."""
    folder = run_dir(root, run)
    link = folder / "data"
    old = link.resolve()
    new = folder / f"data.g{int(old.name.removeprefix('data.g')) + 1}"
    building = folder / f"{new.name}.tmp"
    for left in (new, building):  # of a compaction that was killed: the link never pointed there
        if left.exists():
            shutil.rmtree(left)
    for table in TABLES:
        (building / table).mkdir(parents=True)
        for damaged in (old / table).glob(f"*{QUARANTINED}"):
            shutil.copy2(damaged, building / table / damaged.name)
        _merge(con, list_segments(root, run, table), building / table, steps if table == "tokens" else None)
        fsync_folder(building / table)
    fsync_folder(building)
    os.rename(building, new)
    swap = folder / "data.tmp"
    swap.unlink(missing_ok=True)
    swap.symlink_to(new.name)
    os.replace(swap, link)
    fsync_folder(folder)
    return old


def _merge(
    con: duckdb.DuckDBPyConnection,
    found: list[tuple[SegmentName, Path]],
    folder: Path,
    steps: tuple[int, ...] | None,
) -> None:
    kept = "" if steps is None else f" WHERE step IN ({', '.join(map(str, steps)) or 'NULL'})"
    for group in _groups(found):
        first, last = group[0][0], group[-1][0]
        source = f"read_parquet([{', '.join(quote(str(path)) for _, path in group)}], hive_partitioning = false)"
        if steps is not None and not con.execute(f"SELECT 1 FROM {source}{kept} LIMIT 1").fetchall():
            continue
        key = (first.attempt, first.rank, first.first_step, max(last.last_step, first.last_step))
        copy_segment(con, f"SELECT * FROM {source}{kept}", folder, key)


def _groups(found: list[tuple[SegmentName, Path]]) -> Iterator[list[tuple[SegmentName, Path]]]:
    """Segments of one attempt and rank in the order of their steps, up to `_MERGED_BYTES` together."""
    group: list[tuple[SegmentName, Path]] = []
    size = 0
    for name, path in found:
        same = group and (group[0][0].attempt, group[0][0].rank) == (name.attempt, name.rank)
        if group and (not same or size >= _MERGED_BYTES):
            yield group
            group, size = [], 0
        group.append((name, path))
        size += path.stat().st_size
    if group:
        yield group
