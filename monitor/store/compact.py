"""Compaction and pruning: segments are merged in a new generation, which is swapped in under live readers and writers.

The new generation is built beside the old one. It has the merged files and, as hard links, all others, so a pass costs
what it merges and no more. It takes the old one's place when the `data` link is replaced in one rename. Writers hold
the run's lock while they publish, and the swap, a matter of milliseconds, holds it alone. So a running run can be
compacted, by its own recorder or by another process.

No query sees both generations, and one under way keeps its files. Segments lie in data.g8/TABLE/g8, which readers list
as data/TABLE/g8 or, by globs, as data/TABLE/**. The next generation has a link at TABLE/g8 that leads to the replaced
folder: a file that was listed before the swap still opens by its path, and `**` follows no links, so nothing is listed
twice. Links and replaced folders go `GRACE_S` later. Whatever kills a pass, `data` leads to a whole generation, and the
next pass removes what is left over. A damaged segment, a file that is not understood or a missing row stops a pass.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from monitor.errors import StoreError
from monitor.store.evidence import steps_around
from monitor.store.listing import top_columns
from monitor.store.locks import compaction_lock, is_held, take_compaction, take_data
from monitor.store.reserve import free_bytes, told
from monitor.store.runs import RunState, get_known_run, read_heartbeats, read_json, require_store
from monitor.store.schema import (
    GENERATION,
    INNER,
    TABLES,
    SegmentName,
    generation_of,
    inner_name,
    run_dir,
    table_dir,
)
from monitor.store.segments import (
    QUARANTINED,
    copy_segment,
    crc32_of,
    escape_glob,
    fsync_folder,
    list_segments,
    memory_connection,
    quote,
    replace_text,
)

GRACE_S = 60.0  # how long replaced files of a running run stay for queries under way
_MERGED_BYTES = 256 << 20  # segments are merged up to this size, so that a step of a big run is still found quickly
_ROOM = 3  # a running run is compacted where that many times the bytes to merge are free
_FULL_SHARE = 4  # a file of a quarter of that is not merged again
TOGETHER = 64  # segments of a running run are merged when there are as many of a tier, see `_due`
# Rows of a row group, which is made in memory: few where rows are long. Readers skip row groups by what they hold.
_GROUP_ROWS = {"samples": 4_096, "histograms": 4_096}
# How merged rows are sorted: a row group then holds few metrics, and a query for one of them skips the others' counts.
# Sorting takes memory, so such a file has few rows: 65,536 histograms take some 150 MB while they are merged.
_SORTED = {"histograms": "metric, split, step"}
_SORTED_ROWS = 65_536
PRUNED = "pruned.json"  # in a generation: {"a001-r000": rows} of raw tokens that pruning removed
Segments = list[tuple[SegmentName, Path]]
Shares = dict[str, float]
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

    @property
    def freed(self) -> int:
        """Bytes."""
        return self.bytes_before - self.bytes_after


def compact_run(
    store: str | Path, run: str, *, thin_tokens: str | None = None, grace_s: float | None = 5.0
) -> Compaction:
    """Merge a run's segments; with `thin_tokens` also drop the raw tokens of most steps.

    Those of the steps that `kept_steps` names stay, and those around every transition of an alert (`steps_around`).
    Of a running run closed ranges of steps are merged, as its recorder does by itself.

    grace_s: how long the old files of an ended run stay after the swap, for queries under way; None leaves them for
    `drop_replaced`. Those of a running run stay `GRACE_S`. Raises StoreError for a run that is unknown, damaged, being
    compacted or holds files that are not understood, for a running run with `thin_tokens` or with a writer on another
    machine, for a faulty `thin_tokens`, and where the disk refuses: the run is then as it was.
    """
    root = require_store(store)
    state = get_known_run(root, run)
    live = state.status in ("running", "stalled")
    if live:
        _require_compactable(state, thin_tokens)
    try:
        with _alone(root, run), memory_connection(threads=2) as con:
            found = understood(root, run)
            before = _sizes(found)
            steps = None if thin_tokens is None else _thinned(con, found, thin_tokens)
            swapped = _merge_run(con, root, run, found, live, steps)
            after = _sizes({table: list_segments(root, run, table) for table in TABLES})
            if swapped and not live:
                time.sleep(grace_s or 0.0)
            if live or grace_s is not None:
                remove_replaced(run_dir(root, run), older_than_s=GRACE_S if live else 0.0)
            if not live:
                for left in run_dir(root, run).glob("*.reserve"):
                    if not is_held(left.with_suffix(".lock")):  # of a recorder that was killed
                        left.unlink(missing_ok=True)
    except (OSError, duckdb.Error, pa.ArrowException) as error:
        raise StoreError(f"Cannot compact run {run!r}: {told(error)}. No row is lost. Free some space.") from error
    return Compaction(run, before[0], after[0], before[1], after[1], steps)


def prune_plan(store: str | Path, run: str, thin_tokens: str) -> Compaction:
    """What `compact_run` with `thin_tokens` would do; bytes_after is estimated from the rows that stay.

    Nothing is changed. Raises StoreError like `compact_run`.
    """
    root = require_store(store)
    get_known_run(root, run)
    try:
        with memory_connection(threads=2) as con:
            found = understood(root, run)
            steps = _thinned(con, found, thin_tokens)
            n_files, n_bytes = _sizes(found)
            held = sum(path.stat().st_size for _, path in found["tokens"])
            rows = kept = 0
            if found["tokens"]:
                [(rows, kept)] = con.execute(
                    f"SELECT count(*), count(*) FILTER (step IN (SELECT unnest(?))) FROM {_source(found['tokens'])}",
                    [list(steps)],
                ).fetchall()
    except (OSError, duckdb.Error) as error:
        raise StoreError(f"Cannot read run {run!r}: {told(error)}.") from error
    return Compaction(run, n_files, n_files, n_bytes, n_bytes - round(held * (1 - kept / max(1, rows))), steps)


def compact_closed(root: Path, run: str, con: duckdb.DuckDBPyConnection) -> bool:
    """One pass over a run that its own recorder writes: closed ranges are merged if there are enough; True if so.

    Nothing is done where another compaction is at work, ranks record on other machines or the disk is nearly full.
    Raises StoreError, OSError and duckdb.Error, and then leaves the run as it was; also if `con` is interrupted.
    """
    hosts = {beat.get("host") for beat in read_heartbeats(root, run)}
    if hosts - {socket.gethostname(), None} or is_held(compaction_lock(run_dir(root, run))):
        return False
    with _alone(root, run):
        remove_replaced(run_dir(root, run), older_than_s=GRACE_S)
        return _merge_run(con, root, run, understood(root, run), True, None)


def drop_replaced(root: Path, run: str, *, older_than_s: float) -> None:
    """`remove_replaced`, unless a compaction is at work. Raises OSError."""
    with suppress(BlockingIOError), take_compaction(run_dir(root, run)) as lock:
        if lock.works:
            remove_replaced(run_dir(root, run), older_than_s=older_than_s)


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


def pruned_rows(folder: Path) -> dict[Key, int]:
    """Rows that pruning has removed from a run, by (table, attempt, rank)."""
    found = {}
    for name, rows in (read_json(folder / "data" / PRUNED) or {}).items():
        match = re.fullmatch(r"a(\d+)-r(\d+)", name)
        if match and isinstance(rows, int):
            found["tokens", int(match[1]), int(match[2])] = rows
    return found


def remove_replaced(folder: Path, *, older_than_s: float) -> None:
    """Remove the generations of a run that were replaced longer ago than that, oldest first, but no foreign file.

    Queries that listed their files before are then over. Only a holder of the compaction's lock may call it.
    """
    current = generation_of(folder)
    if current is None:
        return
    known = sorted((number, path) for number, path in _generations(folder) if path.suffix != ".tmp")
    for (number, path), (_, successor) in pairwise(known):
        if number >= _number(current, default=number + 1) or not _is_ours(path):
            continue
        if abs(time.time() - successor.stat().st_mtime) < older_than_s:  # its mtime is that of the swap
            break
        for table in TABLES:  # the links first: no path may lead into a folder that is half gone
            with suppress(OSError):
                (folder / current / table / inner_name(path.name)).unlink(missing_ok=True)
        shutil.rmtree(path)


def _generations(folder: Path) -> list[tuple[int, Path]]:
    return [(int(match[1]), folder / name) for name in os.listdir(folder) if (match := GENERATION.fullmatch(name))]


def _number(generation: str, default: int) -> int:
    match = GENERATION.fullmatch(generation)
    return int(match[1]) if match else default


def _require_compactable(state: RunState, thin_tokens: str | None) -> None:
    """A running run keeps its tokens, and its writers must be where the swap's lock is seen at once."""
    if thin_tokens is not None:
        raise StoreError(f"Run {state.name!r} is {state.status}: prune it when it has ended.")
    elsewhere = {beat.get("host") for beat in state.heartbeats} - {socket.gethostname(), None}
    if elsewhere:
        raise StoreError(
            f"Run {state.name!r} is {state.status} on {', '.join(sorted(map(str, elsewhere)))}: "
            "compact it when it has ended."
        )


@contextmanager
def _alone(root: Path, run: str) -> Iterator[None]:
    """Be the only compaction of the run."""
    try:
        lock = take_compaction(run_dir(root, run))
    except BlockingIOError:
        raise StoreError(f"Run {run!r} is in use by another compaction.") from None
    with lock:
        if not lock.works:
            raise StoreError(f"Run {run!r} lies on a file system without locks: compact a copy of it elsewhere.")
        yield


def understood(root: Path, run: str) -> dict[str, Segments]:
    """The segments of every table. Raises StoreError for anything there that would not be carried over whole."""
    data = run_dir(root, run) / "data"
    for name in sorted(os.listdir(data)):
        if name not in TABLES and name != PRUNED:
            raise StoreError(f"{data / name} is not a table of this version: move it away before compacting.")
    for table in TABLES:
        live = table_dir(root, run, table)
        outer = live.parent if INNER.fullmatch(live.name) else live
        for folder in {live, outer} if outer.exists() else ():
            for name in sorted(os.listdir(folder)):
                known = SegmentName.parse(name) or name.endswith((".parquet.tmp", QUARANTINED))
                if not (known and folder == live) and not INNER.fullmatch(name):
                    message = "is not a segment of this version: move it away before compacting."
                    raise StoreError(f"{folder / name} {message}")
    return {table: list_segments(root, run, table) for table in TABLES}


def _check_understood(con: duckdb.DuckDBPyConnection, group: Segments, table: str) -> int:
    """The rows of a group that may be merged. Raises StoreError for a file that would not be carried over whole."""
    for name, path in group:
        if crc32_of(path) != name.crc32:
            raise StoreError(f"{path} is damaged: run `rlvr store check` and decide about it before compacting.")
    paths = [escape_glob(str(path)) for _, path in group]
    # in one query each and not file by file: the interpreter's lock is the trainer's
    found = con.execute("SELECT file_name, name, num_children, duckdb_type FROM parquet_schema(?)", [paths]).fetchall()
    for file, columns in top_columns(found):
        if columns.keys() != TABLES[table].keys():
            differing = ", ".join(sorted(columns.keys() ^ TABLES[table].keys()))
            message = f"has other columns than this version ({differing}): move it away before compacting."
            raise StoreError(f"{file} {message}")
    [(rows,)] = con.execute("SELECT sum(num_rows)::BIGINT FROM parquet_file_metadata(?)", [paths]).fetchall()
    return int(rows)


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


# ---- which segments are merged -------------------------------------------------------------------------------------


def _shares(con: duckdb.DuckDBPyConnection, table: str, found: Segments) -> Shares:
    """How much of a full file each segment makes, by path."""
    shares = {str(path): path.stat().st_size / _MERGED_BYTES for _, path in found}
    if table in _SORTED and found:
        paths = [escape_glob(path) for path in shares]
        query = "SELECT file_name, num_rows FROM parquet_file_metadata(?)"
        with suppress(duckdb.Error):  # a file is damaged: a pass that would merge it says so
            for path, rows in con.execute(query, [paths]).fetchall():
                shares[path] = max(shares[path], rows / _SORTED_ROWS)
    return shares


def _due(found: Segments, shares: Shares, *, live: bool) -> list[Segments]:
    """The groups of neighbouring segments that are to be merged, each of one attempt and rank, in order of steps.

    Of an ended run those are all that are not full already. Of a running run segments fall into tiers by the steps that
    they span: below 64, below 64^2, ... Where `TOGETHER` of a tier lie among none of a higher one, they are merged,
    and the outcome is of a higher tier. So every row is merged once for each tier, and of 50,000 steps with a segment
    each at most 63 + 63 + 12 files are left.
    """
    made: list[Segments] = []
    for _, same in groupby(found, key=lambda item: (item[0].attempt, item[0].rank)):
        for full, stretch in groupby(same, key=lambda item: _FULL_SHARE * shares[str(item[1])] >= 1):
            small = [] if full else list(stretch)
            stretches = _tiers(small) if live else [small]
            made += [group for one in stretches for group in _parted(one, shares) if len(group) > 1]
    return made


def _tiers(found: Segments) -> list[Segments]:
    """Stretches of a tier that are long enough to merge; of several tiers the lowest."""
    tiers = [_tier(name) for name, _ in found]
    for tier in sorted(set(tiers)):
        due = []
        for higher, indices in groupby(range(len(found)), key=lambda index: tiers[index] > tier):
            of_tier = [] if higher else [index for index in indices if tiers[index] == tier]
            if len(of_tier) >= TOGETHER:
                due.append(found[of_tier[0] : of_tier[-1] + 1])
        if due:
            return due
    return []


def _tier(name: SegmentName) -> int:
    """log of the steps that a segment spans, rounded down; the base is `TOGETHER`."""
    span, tier = name.last_step - name.first_step + 1, 0
    while span >= TOGETHER:
        span, tier = span // TOGETHER, tier + 1
    return tier


def _parted(found: Segments, shares: Shares) -> Iterator[Segments]:
    """A stretch in parts of about equal size, none above that of a full file but where a single segment is."""
    sizes = [shares[str(path)] for _, path in found]
    target = sum(sizes) / max(1, math.ceil(sum(sizes)))
    group: Segments = []
    taken, parts = 0.0, 1
    for item, size in zip(found, sizes, strict=True):
        if group and taken + size / 2 > parts * target:
            yield group
            group, parts = [], parts + 1
        group.append(item)
        taken += size
    if group:
        yield group


# ---- the next generation -------------------------------------------------------------------------------------------


def _merge_run(
    con: duckdb.DuckDBPyConnection,
    root: Path,
    run: str,
    found: dict[str, Segments],
    live: bool,
    steps: Sequence[int] | None,
) -> bool:
    """Build and swap in the next generation; False if there is nothing to do. Leaves nothing where it fails."""
    folder = run_dir(root, run)
    _remove_unfinished(folder)
    shares = {table: _shares(con, table, found[table]) for table in TABLES}
    due = {table: _due(found[table], shares[table], live=live) for table in TABLES}
    if steps is not None:
        due["tokens"] = [
            group
            for _, same in groupby(found["tokens"], key=lambda item: (item[0].attempt, item[0].rank))
            for group in _parted(list(same), shares["tokens"])
        ]
    sizes = [path.stat().st_size for groups in due.values() for group in groups for _, path in group]
    if not sizes or (live and free_bytes(folder) < _ROOM * sum(sizes) + (64 << 20)):
        return False
    pruned = pruned_rows(folder)
    gone = {table: {path.name for group in due[table] for _, path in group} for table in TABLES}
    swap_generation(root, run, gone, lambda building, inner: _build(con, building, inner, due, steps, pruned))
    return True


def swap_generation(root: Path, run: str, gone: dict[str, set[str]], fill: Callable[[Path, str], None]) -> None:
    """Swap in a generation that has the current one's files without `gone`, by table, and with those that `fill` adds.

    `fill` gets the folder of the generation and the name of the folder inside of each table, and makes both. Only a
    holder of the compaction's lock may call this. Raises StoreError if a recorder is in the way, and whatever `fill`
    raises; the run is then as it was.
    """
    folder = run_dir(root, run)
    current = _remove_unfinished(folder)
    number = max([-1, *(number for number, _ in _generations(folder))]) + 1
    number += current == "data"  # which gets a lower one
    new = folder / f"data.g{number}"
    building = new.with_name(f"{new.name}.tmp")
    inner = inner_name(new.name)
    try:
        fill(building, inner)
        _carry_over(root, run, building, inner, gone)
        with take_data(folder):  # from here on no segment appears
            _carry_over(root, run, building, inner, gone)
            _swap(folder, current, building, new)
    except BlockingIOError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise StoreError(f"Run {run!r} is in use by a recorder that does not pause.") from error
    except BaseException:
        if generation_of(folder) == current:
            for left in (building, new):
                shutil.rmtree(left, ignore_errors=True)
        raise


def _remove_unfinished(folder: Path) -> str:
    """Remove what passes left that were killed before their swap; returns the current generation. Raises StoreError."""
    current = generation_of(folder)
    if current is None:
        raise StoreError(f"Run {folder.name!r} has no data: run `rlvr store check`.")
    for number, path in _generations(folder):
        newer = current != "data" and number > _number(current, default=number)
        if (newer or path.suffix == ".tmp") and _is_ours(path):
            shutil.rmtree(path)
    return current


def _build(
    con: duckdb.DuckDBPyConnection,
    building: Path,
    inner: str,
    due: dict[str, list[Segments]],
    steps: Sequence[int] | None,
    removed: dict[Key, int],
) -> None:
    """A generation's folders, with the merged segments and the record of what pruning has removed."""
    pruned = Counter(removed)
    for table in TABLES:
        (building / table / inner).mkdir(parents=True)
        for group in due[table]:
            rows = _check_understood(con, group, table)
            kept = steps if table == "tokens" else None
            made = _merge(con, group, table, building / table / inner, kept)
            lost = rows - (pq.read_metadata(made).num_rows if made else 0)
            first = group[0][0]
            if lost and kept is None:
                raise StoreError(f"Merging {table} of {building.parent.name} would lose {lost} rows: left alone.")
            if lost:
                pruned[table, first.attempt, first.rank] += lost
        fsync_folder(building / table)
    if pruned:
        text = {f"a{attempt:03d}-r{rank:03d}": rows for (_, attempt, rank), rows in sorted(pruned.items())}
        replace_text(building / PRUNED, json.dumps(text), sync=True)
    fsync_folder(building)


def _source(found: Segments) -> str:
    paths = ", ".join(quote(str(path)) for _, path in found)
    return f"read_parquet([{paths}], hive_partitioning = false, union_by_name = true)"


def _merge(
    con: duckdb.DuckDBPyConnection, group: Segments, table: str, folder: Path, steps: Sequence[int] | None
) -> Path | None:
    """The rows of a group as one segment, with `steps` only those of these steps; None if there are none."""
    kept = "" if steps is None else f" WHERE step IN ({', '.join(map(str, steps)) or 'NULL'})"
    if steps is not None and not con.execute(f"SELECT 1 FROM {_source(group)}{kept} LIMIT 1").fetchall():
        return None
    columns = ", ".join(f'"{name}"::{kind} AS "{name}"' for name, kind in TABLES[table].items())
    first, last = group[0][0], max(name.last_step for name, _ in group)
    key = (first.attempt, first.rank, min(name.first_step for name, _ in group), last)
    order = f" ORDER BY {_SORTED[table]}" if table in _SORTED else ""
    query = f"SELECT {columns} FROM {_source(group)}{kept}{order}"
    path = copy_segment(con, query, folder, key, group_rows=_GROUP_ROWS.get(table))
    if SegmentName.parse(path.name) is None:
        raise StoreError(f"{path.name} would not be understood as a segment: left alone.")
    return path


def _carry_over(root: Path, run: str, building: Path, inner: str, gone: dict[str, set[str]]) -> None:
    """Hard links to all files that were not merged, where they are not there yet, and links to replaced folders."""
    folder = run_dir(root, run)
    current = generation_of(folder)
    for table in TABLES:
        old, outer, new = table_dir(root, run, table), folder / "data" / table, building / table
        names = os.listdir(old) if old.exists() else []
        missing = {name for name in names if not (name.endswith(".tmp") or INNER.fullmatch(name))} - gone[table]
        missing -= set(os.listdir(new / inner))
        for name in missing:
            os.link(old / name, new / inner / name)
        links = [name for name in os.listdir(outer) if INNER.fullmatch(name)] if outer.exists() else []
        for name in links if current != "data" else ():
            if (folder / f"data.{name}").exists() and not (new / name).is_symlink():
                os.symlink(f"../../data.{name}/{table}/{name}", new / name)
                missing.add(name)
        if missing:
            fsync_folder(new / inner)
            fsync_folder(new)


def _swap(folder: Path, current: str, building: Path, new: Path) -> None:
    """Put a finished generation in the place of the current one, durably before any segment is written into it."""
    swap = folder / "data.tmp"
    os.utime(building)  # the time of the swap, for `remove_replaced`
    os.rename(building, new)
    swap.unlink(missing_ok=True)
    swap.symlink_to(new.name)
    if current == "data":  # a copy that followed the link: make way for one
        os.rename(folder / "data", folder / f"data.g{_number(new.name, 1) - 1}")
    os.replace(swap, folder / "data")
    fsync_folder(folder)


def _is_ours(generation: Path) -> bool:
    files = [path.name for path in generation.rglob("*") if path.is_symlink() or not path.is_dir()]
    endings = (".tmp", QUARANTINED, PRUNED)
    return all(SegmentName.parse(name) or INNER.fullmatch(name) or name.endswith(endings) for name in files)
