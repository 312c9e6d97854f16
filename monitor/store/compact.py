"""Compaction and pruning: a run's segments are merged into a new generation, which is swapped in under live readers.

The new generation is built beside the old one, made durable, and takes its place when the `data` link is replaced in
one rename. A query that had listed the old files finds them gone and is repeated; none ever sees both generations.
What would be lost with the old generation stops it: a damaged segment, a file that is not understood, a missing row.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from monitor.errors import StoreError
from monitor.store.evidence import steps_around
from monitor.store.locks import take_run
from monitor.store.reserve import told
from monitor.store.runs import get_run, read_json, require_store
from monitor.store.schema import TABLES, SegmentName, run_dir
from monitor.store.segments import (
    QUARANTINED,
    copy_segment,
    crc32_of,
    fsync_folder,
    list_segments,
    memory_connection,
    quote,
    replace_text,
)

_MERGED_BYTES = 256 << 20  # segments are merged up to this size, so that a step of a big run is still found quickly
_GENERATION = re.compile(r"data\.g(\d+)(\.tmp)?")
_PRUNED = "pruned.json"  # in a generation: {"a001-r000": rows} of raw tokens that pruning removed
Segments = list[tuple[SegmentName, Path]]
Key = tuple[str, int, int]  # table, attempt, rank


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
    """Merge a run's segments; with `thin_tokens` also drop the raw tokens of most steps.

    Those of the steps that `kept_steps` names stay, and those around every transition of an alert (`steps_around`).

    grace_s: how long the old files stay after the swap, for queries under way. Raises StoreError for a run that is
    unknown, running, damaged, being compacted or holds files that are not understood, for a faulty `thin_tokens`, and
    where the disk refuses: the run is then as it was.
    """
    root = require_store(store)
    state = get_run(root, run)
    if state.status in ("running", "stalled"):
        raise StoreError(f"Run {run!r} is {state.status}: compact it when it has ended.")
    try:
        with _alone(root, run), memory_connection(threads=2) as con:
            found = _understood(root, run)
            steps = None if thin_tokens is None else _thinned(con, found, thin_tokens)
            before = _sizes(found)
            old = _publish(con, root, run, found, steps)
            after = _sizes({table: list_segments(root, run, table) for table in TABLES})
            time.sleep(grace_s)
            _remove_generations(run_dir(root, run), old)
    except (OSError, duckdb.Error, pa.ArrowException) as error:
        raise StoreError(f"Cannot compact run {run!r}: {told(error)}. No row is lost. Free some space.") from error
    return Compaction(run, before[0], after[0], before[1], after[1], steps)


def kept_steps(spec: str, steps: list[int]) -> tuple[int, ...]:
    """The steps whose tokens stay: "1,50,100" names them, "5" keeps that many, evenly spaced, first and last included.

    "50," names one step, "0" keeps none. Raises StoreError for anything else.
    """
    parts = [part.strip() for part in spec.split(",")]
    if not all(part.isdecimal() for part in parts if part) or not parts[0]:
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


def generation_of(folder: Path) -> str | None:
    """The name of the folder that a run's `data` leads to: "data" itself in a copy that followed the link."""
    link = folder / "data"
    try:
        return Path(os.readlink(link)).name
    except OSError:
        return "data" if link.is_dir() else None


def pruned_rows(folder: Path) -> dict[Key, int]:
    """Rows that pruning has removed from a run, by (table, attempt, rank)."""
    found = {}
    for name, rows in (read_json(folder / "data" / _PRUNED) or {}).items():
        match = re.fullmatch(r"a(\d+)-r(\d+)", name)
        if match and isinstance(rows, int):
            found["tokens", int(match[1]), int(match[2])] = rows
    return found


@contextmanager
def _alone(root: Path, run: str) -> Iterator[None]:
    """Hold the run's lock alone: no recorder writes it, no other compaction runs."""
    try:
        lock = take_run(run_dir(root, run))
    except BlockingIOError:
        raise StoreError(f"Run {run!r} is in use by a recorder or another compaction.") from None
    try:
        if not lock.works:
            raise StoreError(f"Run {run!r} lies on a file system without locks: compact a copy of it elsewhere.")
        yield
    finally:
        lock.release()


def _understood(root: Path, run: str) -> dict[str, Segments]:
    """The segments of every table. Raises StoreError for anything there that would not be carried over whole."""
    data = run_dir(root, run) / "data"
    for name in sorted(os.listdir(data)):
        if name not in TABLES and name != _PRUNED:
            raise StoreError(f"{data / name} is not a table of this version: move it away before compacting.")
    found = {}
    for table in TABLES:
        folder = data / table
        names = sorted(os.listdir(folder)) if folder.exists() else []
        for name in names:
            if not name.endswith((".parquet.tmp", QUARANTINED)):
                _check_understood(folder / name, table)
        found[table] = list_segments(root, run, table)
    return found


def _check_understood(path: Path, table: str) -> None:
    name = SegmentName.parse(path.name)
    if name is None:
        raise StoreError(f"{path} is not a segment of this version: move it away before compacting.")
    if crc32_of(path) != name.crc32:
        raise StoreError(f"{path} is damaged: run `rlvr store check` and decide about it before compacting.")
    columns = pq.read_schema(path).names
    if set(columns) != set(TABLES[table]):
        differing = ", ".join(sorted(set(columns) ^ set(TABLES[table])))
        raise StoreError(f"{path} has other columns than this version ({differing}): move it away before compacting.")


def _thinned(con: duckdb.DuckDBPyConnection, found: dict[str, Segments], spec: str) -> tuple[int, ...]:
    """The steps whose tokens stay: those that `spec` keeps of the others, and those around alerts."""
    alerts, steps, tokens = (_steps(con, found[table]) for table in ("alerts", "steps", "tokens"))
    spared = steps_around(alerts, steps) & set(tokens)
    return tuple(sorted(spared.union(kept_steps(spec, [step for step in tokens if step not in spared]))))


def _steps(con: duckdb.DuckDBPyConnection, found: Segments) -> list[int]:
    if not found:
        return []
    return [step for (step,) in con.execute(f"SELECT DISTINCT step FROM {_source(found)} ORDER BY step").fetchall()]


def _sizes(found: dict[str, Segments]) -> tuple[int, int]:
    names = [path for segments in found.values() for _, path in segments]
    return len(names), sum(path.stat().st_size for path in names)


def _publish(
    con: duckdb.DuckDBPyConnection, root: Path, run: str, found: dict[str, Segments], steps: tuple[int, ...] | None
) -> Path:
    """Build, swap in and make durable the next generation; the path of the old one. Leaves nothing where it fails."""
    folder = run_dir(root, run)
    link, swap = folder / "data", folder / "data.tmp"
    current = generation_of(folder)
    numbers = [int(match[1]) for name in os.listdir(folder) if (match := _GENERATION.fullmatch(name))]
    number = max([-1, *numbers]) + 1
    new, building = folder / f"data.g{number}", folder / f"data.g{number}.tmp"
    try:
        _build(con, link, building, found, steps)
        os.rename(building, new)
        swap.unlink(missing_ok=True)
        swap.symlink_to(new.name)
        if current == "data":  # a copy that followed the link: make way for one
            current = f"data.g{number + 1}"
            os.rename(link, folder / current)
        os.replace(swap, link)
    except BaseException:
        for left in (building, new):
            shutil.rmtree(left, ignore_errors=True)
        with suppress(OSError):
            swap.unlink(missing_ok=True)
        raise
    fsync_folder(folder)
    return folder / str(current)


def _build(
    con: duckdb.DuckDBPyConnection,
    old: Path,
    building: Path,
    found: dict[str, Segments],
    steps: tuple[int, ...] | None,
) -> None:
    """A generation with all rows of `found`, but for the raw tokens of other steps than `steps`."""
    removed: Counter[Key] = Counter(pruned_rows(old.parent))
    for table in TABLES:
        (building / table).mkdir(parents=True)
        for damaged in (old / table).glob(f"*{QUARANTINED}"):
            shutil.copy2(damaged, building / table / damaged.name)
        kept = steps if table == "tokens" else None
        made = _merge(con, found[table], table, building / table, kept)
        fsync_folder(building / table)
        lost = _rows(table, found[table]) - _rows(table, made)
        if lost and kept is None:
            raise StoreError(f"Compacting {table} of {old.parent.name} would lose rows ({dict(lost)}): left alone.")
        removed += lost
    if removed:
        text = {f"a{attempt:03d}-r{rank:03d}": rows for (_, attempt, rank), rows in sorted(removed.items())}
        replace_text(building / _PRUNED, json.dumps(text))
    fsync_folder(building)


def _rows(table: str, found: Segments) -> Counter[Key]:
    """Rows by attempt and rank."""
    rows: Counter[Key] = Counter()
    for name, path in found:
        rows[table, name.attempt, name.rank] += pq.read_metadata(path).num_rows
    return rows


def _source(found: Segments) -> str:
    paths = ", ".join(quote(str(path)) for _, path in found)
    return f"read_parquet([{paths}], hive_partitioning = false, union_by_name = true)"


def _merge(
    con: duckdb.DuckDBPyConnection, found: Segments, table: str, folder: Path, steps: tuple[int, ...] | None
) -> Segments:
    kept = "" if steps is None else f" WHERE step IN ({', '.join(map(str, steps)) or 'NULL'})"
    columns = ", ".join(f'"{name}"::{kind} AS "{name}"' for name, kind in TABLES[table].items())
    made: Segments = []
    for group in _groups(found):
        first, last = group[0][0], max(name.last_step for name, _ in group)
        if steps is not None and not con.execute(f"SELECT 1 FROM {_source(group)}{kept} LIMIT 1").fetchall():
            continue
        key = (first.attempt, first.rank, first.first_step, last)
        path = copy_segment(con, f"SELECT {columns} FROM {_source(group)}{kept}", folder, key)
        name = SegmentName.parse(path.name)
        if name is None:
            raise StoreError(f"{path.name} would not be understood as a segment: left alone.")
        made.append((name, path))
    return made


def _groups(found: Segments) -> Iterator[Segments]:
    """Segments of one attempt and rank in the order of their steps, up to `_MERGED_BYTES` together."""
    group: Segments = []
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


def _remove_generations(folder: Path, old: Path) -> None:
    """The generation that was replaced, what interrupted compactions and killed recorders left, but no foreign file."""
    current = generation_of(folder)
    for path in folder.iterdir():
        if path == old or (_GENERATION.fullmatch(path.name) and path.name != current and _is_ours(path)):
            shutil.rmtree(path)
        elif path.suffix == ".reserve":
            path.unlink(missing_ok=True)


def _is_ours(generation: Path) -> bool:
    files = [path for path in generation.rglob("*") if not path.is_dir()]
    endings = (".tmp", QUARANTINED, _PRUNED)
    return all(SegmentName.parse(path.name) or path.name.endswith(endings) for path in files)
