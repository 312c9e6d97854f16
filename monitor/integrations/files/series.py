"""read_series: a file, a folder or a run of the store, as the columns that the alert rules judge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from monitor.errors import MonitorError, StoreError
from monitor.integrations.aliases import STEP_COLUMNS, match
from monitor.integrations.files.reading import TIME, Reader, Row
from monitor.integrations.files.source import KINDS, READERS, STATE, open_reader


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
    if path.exists() or path.suffix.lower() in READERS:
        reader = open_reader(source)
        if reader is not None:
            return _of_file(source, reader, chosen)
    try:
        return _from_run(source, store, chosen)
    except StoreError as error:
        what = f"a folder without {STATE}, .wandb or event files" if path.is_dir() else f"not a {KINDS}"
        raise MonitorError(f"{source!r} is {what}, and as a run: {error}") from None


def _of_file(source: str, reader: Reader, chosen: Mapping[str, str]) -> Series:
    try:
        rows = reader.read()
    except UnicodeDecodeError as error:
        raise MonitorError(f"{source!r} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    found = _series(source, reader.names, rows, chosen)
    return replace(found, notes=(*reader.notes, *found.notes))


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
    return replace(_series(f"run {run}", names, rows, chosen), warmup_steps=warmup)


def _series(source: str, names: Mapping[str, str], rows: Iterable[Row], chosen: Mapping[str, str]) -> Series:
    mapping = match(source, names, chosen)
    keys = [key for key in mapping if key != "step"]
    merged: dict[int, dict[str, float]] = {}
    previous, unsorted, repeated, without = -math.inf, 0, 0, 0
    for where, row in rows:
        step = step_of(source, where, mapping["step"], row.get(mapping["step"]))
        if step is None:
            without += 1
            continue
        values = {key: number(source, where, mapping[key], row.get(mapping[key])) for key in keys}
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
    clocks = (*STEP_COLUMNS, TIME)
    used = {*mapping.values(), *(column for column, name in names.items() if name.lower() in clocks)}
    return Series(
        columns={"step": steps} | {key: [merged[step].get(key) for step in steps] for key in keys},
        notes=tuple(f"{source}: {count} {what}" for count, what in counts if count),
        mapping=mapping,
        unmapped=tuple(column for column in names if column not in used),
    )


def step_of(source: str, where: str, column: str, value: Any) -> int | None:
    """The step of a row; None where it is empty. Raises MonitorError for what is no integer."""
    found = number(source, where, column, value)
    if found is not None and not found.is_integer():
        raise MonitorError(f"{source!r} {where}: {column} is {value!r}, expected an integer.")
    return None if found is None else int(found)


def number(source: str, where: str, column: str, value: Any) -> float | None:
    """The value of a row's column; None where it is empty. Raises MonitorError for what is no number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise MonitorError(f"{source!r} {where}: {column} is {value!r}, expected a number (or nothing).") from None
