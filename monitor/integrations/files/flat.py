"""Readers of files of rows: CSV, also of W&B; JSON lines, also of verl; Parquet; the trainer_state.json of TRL."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from monitor.errors import MonitorError
from monitor.integrations.files.table import Row, Table


def read_csv(path: Path) -> Table:
    """A header and rows. In an export of W&B, whose columns are called "run - key", "run - key__MIN" and
    "run - key__MAX", the key is the name and the smallest and largest are left out."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            rows: list[Row] = [(f"line {reader.line_num}", row) for row in reader]
        except csv.Error as error:
            raise MonitorError(f"{str(path)!r} line {reader.line_num} is not CSV: {error}.") from None
    of_wandb = {name for name in columns if {f"{name}__MIN", f"{name}__MAX"} <= set(columns)}
    ends = {name + end for name in of_wandb for end in ("__MIN", "__MAX")}
    names = {name: name.rpartition(" - ")[2] if name in of_wandb else name for name in columns}
    return Table({name: short for name, short in names.items() if name and name not in ends}, rows)


def read_jsonl(path: Path) -> Table:
    """An object a line; of verl's {"step": n, "data": {...}} the data. A last line that is still being written is left
    out with a note."""
    text = path.read_text(encoding="utf-8-sig")
    names: dict[str, str] = {}
    rows: list[Row] = []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not text.endswith("\n") and rows:
                return Table(names, rows, (f"{path}: the last line is not complete and is left out.",))
            raise MonitorError(
                f"{str(path)!r} line {number} is not JSON: {error.msg}. Expected one object a line."
            ) from None
        if not isinstance(row, dict):
            raise MonitorError(
                f"{str(path)!r} line {number} is {line[:40]!r}, expected an object like {{'step': 0, ...}}."
            )
        if row.keys() == {"step", "data"} and isinstance(row["data"], dict):
            row = row["data"] | {"step": row["step"]}
        names |= {name: name for name in row}
        rows.append((f"line {number}", row))
    return Table(names, rows)


def read_parquet(path: Path) -> Table:
    """Rows of a Parquet file; columns of lists and structs are left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = [field.name for field in file.schema_arrow if not pa.types.is_nested(field.type)]
        table = file.read(columns=names)
    except (pa.ArrowInvalid, OSError) as error:
        raise MonitorError(f"{str(path)!r} cannot be read as Parquet: {error}.") from None
    return Table({name: name for name in names}, [(f"row {at}", row) for at, row in enumerate(table.to_pylist())])


def read_trainer_state(path: Path) -> Table:
    """`log_history` of the trainer_state.json that TRL and transformers keep beside a checkpoint."""
    try:
        state: Any = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise MonitorError(f"{str(path)!r} line {error.lineno} is not JSON: {error.msg}.") from None
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise MonitorError(
            f"{str(path)!r} has no list log_history of objects, as a trainer_state.json has. "
            "Rows of your own go into a .jsonl file, an object a line."
        )
    names = {name: name for row in history for name in row}
    return Table(names, [(f"log_history[{index}]", row) for index, row in enumerate(history)])
