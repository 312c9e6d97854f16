"""read_series: a file, a folder or a run of the store, as the columns that the alert rules judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from monitor.errors import MonitorError, StoreError, nearest
from monitor.integrations.aliases import STEP_COLUMNS, match, shortened
from monitor.integrations.files.flat import read_csv, read_jsonl, read_parquet, read_trainer_state
from monitor.integrations.files.table import Row, Table
from monitor.integrations.files.tensorboard import MARK, read_events
from monitor.integrations.files.wandb import read_wandb

READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".json": read_trainer_state,
    ".wandb": read_wandb,
}
KINDS = f"{', '.join(READERS)} or a TensorBoard event file"
STATE = "trainer_state.json"


@dataclass(frozen=True, slots=True)
class Series:
    """Columns ready for `replay`: "step", strictly increasing, and keys of METRICS; None marks a missing value.

    notes: what was repaired or left out. mapping: {key: the source's column}, the step's too. unmapped: its other
    columns.
    """

    columns: dict[str, list[Any]]
    warmup_steps: int = 0
    notes: tuple[str, ...] = ()
    mapping: dict[str, str] = field(default_factory=dict)
    unmapped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.columns["step"])


def read_series(source: str, store: str = "runs", mapping: Mapping[str, str] | None = None) -> Series:
    """The series in the file or folder `source`, or of the run called `source` in `store`.

    Takes CSV, JSON lines, Parquet, trainer_state.json (or a folder of checkpoints), verl's file log, TensorBoard event
    files (or a folder of one run's), W&B's run files (or a run's folder) and W&B's exports as CSV. Every column that a
    key of METRICS or an alias names is used; mapping: {key or "step": column} that go before. Rows of one step are put
    together. An empty field (CSV) or null is a missing value, "nan" and "inf" are broken ones. Raises MonitorError.
    """
    path = Path(source).expanduser()
    chosen = dict(mapping or {})
    if path.is_dir():
        found = _in_folder(source, path)
        if found is not None:
            return _series(source, found, chosen)
    elif path.is_file() or path.suffix.lower() in READERS:
        return _series(source, _read_file(source, path), chosen)
    try:
        return _from_run(source, store, chosen)
    except StoreError as error:
        what = f"a folder without {STATE}, .wandb or event files" if path.is_dir() else f"not a {KINDS}"
        raise MonitorError(f"{source!r} is {what}, and as a run: {error}") from None


def _read_file(source: str, path: Path) -> Table:
    if not path.is_file():
        folder = path.parent
        siblings = [p.name for p in folder.iterdir() if p.suffix in READERS] if folder.is_dir() else []
        raise MonitorError(f"No file {source!r}.{nearest(path.name, siblings)}")
    if MARK in path.name:
        return read_events([path])
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise MonitorError(f"{source!r} ends in {path.suffix!r}, expected one of {KINDS}. Rename or convert it.")
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise MonitorError(f"{source!r} is not UTF-8 text: {error.reason} at byte {error.start}.") from None


def _in_folder(source: str, folder: Path) -> Table | None:
    """The one run that the folder holds; None: no file of a known kind. Raises MonitorError for several runs."""
    states = [folder / STATE] if (folder / STATE).is_file() else list(folder.glob(f"checkpoint-*/{STATE}"))
    if states:  # each checkpoint holds the history up to it
        path = max(states, key=lambda path: (path.stat().st_mtime, path.name))
        return _noted(read_trainer_state(path), path, folder)
    runs = {path.resolve() for at in ("", "*/") for path in folder.glob(f"{at}run-*.wandb")}  # latest-run is a link
    if runs:
        path = _only(source, sorted(runs))
        return _noted(read_wandb(path), path, folder)
    events = [path for path in folder.rglob(f"*{MARK}*") if path.is_file()]
    if events:
        home = _only(source, sorted({path.parent for path in events}))
        return _noted(read_events([path for path in events if path.parent == home]), home, folder)
    return None


def _only(source: str, found: Sequence[Path]) -> Path:
    if len(found) > 1:
        raise MonitorError(f"{source!r} holds {len(found)} runs. Name one: {shortened([str(path) for path in found])}")
    return found[0]


def _noted(table: Table, path: Path, folder: Path) -> Table:
    return table if path == folder else replace(table, notes=(f"reads {path}", *table.notes))


def _from_run(run: str, store: str, chosen: Mapping[str, str]) -> Series:
    from monitor.store.reader import open_store

    with open_store(store) as opened:
        warmup = int(opened.run(run).info.get("warmup_steps", 0))
        by_step: dict[int, dict[str, Any]] = {}
        query = "SELECT step, name, value FROM steps WHERE run = ? AND rank = 0 ORDER BY step"
        for step, name, value in opened.sql(query, [run]).rows:
            by_step.setdefault(step, {"step": step})[name] = value
    names = {"step": "step"} | {name: name for row in by_step.values() for name in row}
    rows: list[Row] = [(f"step {step}", row) for step, row in by_step.items()]
    return replace(_series(f"run {run}", Table(names, rows), chosen), warmup_steps=warmup)


def _series(source: str, table: Table, chosen: Mapping[str, str]) -> Series:
    mapping = match(source, table.names, chosen)
    keys = [key for key in mapping if key != "step"]
    merged: dict[int, dict[str, float]] = {}
    previous, unsorted, repeated, without = -math.inf, 0, 0, 0
    for where, row in table.rows:
        step = _step(source, where, mapping["step"], row.get(mapping["step"]))
        if step is None:
            without += 1
            continue
        values = {key: _number(source, where, mapping[key], row.get(mapping[key])) for key in keys}
        present = {key: value for key, value in values.items() if value is not None}
        unsorted += step < previous
        repeated += bool(present.keys() & merged.get(step, {}).keys())
        previous = step
        merged.setdefault(step, {}).update(present)
    steps = sorted(merged)
    counts = (
        (without, f"rows have no {mapping['step']} and are left out."),
        (unsorted, "rows stood before an earlier step; sorted by step."),
        (repeated, "rows repeat a step; the last value of each step is used."),
    )
    used = {*mapping.values(), *(column for column, name in table.names.items() if name.lower() in STEP_COLUMNS)}
    return Series(
        columns={"step": steps} | {key: [merged[step].get(key) for step in steps] for key in keys},
        notes=(*table.notes, *(f"{source}: {count} {what}" for count, what in counts if count)),
        mapping=mapping,
        unmapped=tuple(column for column in table.names if column not in used),
    )


def _step(source: str, where: str, column: str, value: Any) -> int | None:
    number = _number(source, where, column, value)
    if number is not None and not number.is_integer():
        raise MonitorError(f"{source!r} {where}: {column} is {value!r}, expected an integer.")
    return None if number is None else int(number)


def _number(source: str, where: str, column: str, value: Any) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise MonitorError(f"{source!r} {where}: {column} is {value!r}, expected a number (or nothing).") from None
