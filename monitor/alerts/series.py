"""Reads a series to judge: a CSV, JSON-lines or Parquet file, or a recorded run."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitor.errors import MonitorError, StoreError, nearest

SERIES = ("entropy", "reward", "response_length")  # the columns that are read
SUFFIXES = (".csv", ".jsonl", ".parquet")
_REQUIRED = ("step", "entropy")
_Row = tuple[str, Mapping[str, Any]]  # (where it stands, e.g. "line 7", the row)


@dataclass(frozen=True, slots=True)
class Series:
    """Columns ready for `replay`: steps strictly increasing; None marks a missing value. notes: what was repaired."""

    columns: dict[str, list[Any]]
    warmup_steps: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.columns["step"])


def read_series(source: str, store: str = "runs") -> Series:
    """The series in the file `source`, or of the run called `source` in `store`.

    Columns step and entropy are required; reward and response_length are used where present, others ignored. An
    empty field (CSV) or null is a missing value, "nan" and "inf" are broken ones. Raises MonitorError.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        if path.is_file():
            raise MonitorError(
                f"{source!r} ends in {path.suffix!r}, expected one of {', '.join(SUFFIXES)}. Rename or convert it."
            )
        try:
            return _from_run(source, store)
        except StoreError as error:
            raise MonitorError(f"{source!r} is not a {', '.join(SUFFIXES)} file, and as a run: {error}") from None
    if not path.is_file():
        folder = path.parent
        siblings = [p.name for p in folder.iterdir() if p.suffix in SUFFIXES] if folder.is_dir() else []
        raise MonitorError(f"No file {source!r}.{nearest(path.name, siblings)}")
    reader = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[path.suffix.lower()]
    try:
        names, rows = reader(path)
        return _collect(source, names, rows)
    except UnicodeDecodeError as error:
        raise MonitorError(f"{source!r} is not UTF-8 text: {error.reason} at byte {error.start}.") from None


def _csv_rows(path: Path) -> tuple[list[str], Iterable[_Row]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        names = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = names
        return names, [(f"line {reader.line_num}", row) for row in reader]


def _jsonl_rows(path: Path) -> tuple[list[str], Iterable[_Row]]:
    names: dict[str, None] = {}
    rows: list[_Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MonitorError(
                f"{str(path)!r} line {number} is not JSON: {error.msg}. Expected one object a line."
            ) from None
        if not isinstance(row, dict):
            raise MonitorError(
                f"{str(path)!r} line {number} is {line[:40]!r}, expected an object like {{'step': 0, ...}}."
            )
        names |= dict.fromkeys(row)
        rows.append((f"line {number}", row))
    return list(names), rows


def _parquet_rows(path: Path) -> tuple[list[str], Iterable[_Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = list(file.schema_arrow.names)
        wanted = [name for name in names if _key(name) in ("step", *SERIES)]
        table = file.read(columns=wanted)
    except (pa.ArrowInvalid, OSError) as error:
        raise MonitorError(f"{str(path)!r} cannot be read as Parquet: {error}.") from None
    return names, [(f"row {number}", row) for number, row in enumerate(table.to_pylist())]


def _from_run(run: str, store: str) -> Series:
    from monitor.store.reader import open_store

    with open_store(store) as opened:
        warmup = int(opened.run(run).info.get("warmup_steps", 0))
        marks = ", ".join("?" for _ in SERIES)
        query = f"SELECT step, name, value FROM steps WHERE run = ? AND name IN ({marks}) AND rank = 0"
        by_step: dict[int, dict[str, Any]] = {}
        for step, name, value in opened.sql(query, [run, *SERIES]).rows:
            by_step.setdefault(step, {"step": step})[name] = value
    names = ["step", *{name: None for row in by_step.values() for name in row if name != "step"}]
    series = _collect(f"run {run}", names, [(f"step {step}", by_step[step]) for step in sorted(by_step)])
    return Series(series.columns, warmup, series.notes)


def _key(name: str) -> str:
    return name.strip().lower()


def _collect(source: str, names: list[str], rows: Iterable[_Row]) -> Series:
    known = {_key(name): name for name in names}
    missing = [key for key in _REQUIRED if key not in known]
    if missing:
        there = ", ".join(names) or "none"
        raise MonitorError(
            f"{source!r} has no column {' and no column '.join(missing)}. Its columns: {there}. "
            f"Rename the columns of the step number and of the mean entropy in nats to step and entropy."
        )
    keys = [key for key in SERIES if key in known]
    last: dict[int, dict[str, Any]] = {}
    previous, unsorted, duplicates = -math.inf, 0, 0
    for where, row in rows:
        step = _step(source, where, row.get(known["step"]))
        unsorted += step < previous
        duplicates += step in last
        previous = step
        last[step] = {key: _number(source, where, key, row.get(known[key])) for key in keys}
    steps = sorted(last)
    notes = []
    if unsorted:
        notes.append(f"{source}: {unsorted} rows stood before an earlier step; sorted by step.")
    if duplicates:
        notes.append(f"{source}: {duplicates} rows repeat a step; the last row of each step is used.")
    return Series({"step": steps} | {key: [last[step][key] for step in steps] for key in keys}, 0, tuple(notes))


def _step(source: str, where: str, value: Any) -> int:
    number = _number(source, where, "step", value)
    if number is None or not number.is_integer():
        raise MonitorError(f"{source!r} {where}: step is {value!r}, expected an integer.")
    return int(number)


def _number(source: str, where: str, key: str, value: Any) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise MonitorError(f"{source!r} {where}: {key} is {value!r}, expected a number (or nothing).") from None
