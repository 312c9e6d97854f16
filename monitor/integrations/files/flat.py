"""Readers of files of rows: CSV, also of W&B; JSON lines, also of verl; Parquet; the trainer_state.json of TRL.

The first two are read on where they grow. The others are written anew each time, so they are read as a whole when they
have changed, and the rows behind the known ones are new.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monitor.errors import MonitorError
from monitor.integrations.files.reading import TIME, BegunAnew, GrowingFile, Row


class CsvReader:
    """A header and rows. In an export of W&B, whose columns are called "run - key", "run - key__MIN" and
    "run - key__MAX", the key is the name and the smallest and largest are left out.

    live: a last line without its end is still being written.
    """

    def __init__(self, path: Path, *, live: bool = False) -> None:
        self.names: dict[str, str] = {}
        self.notes: list[str] = []
        self.config: dict[str, Any] = {}
        self._file, self._live = GrowingFile(path), live
        self._columns: list[str] | None = None
        self._line = 0

    def read(self) -> list[Row]:
        data = self._file.new_bytes()
        if self._live:
            data = data[: data.rfind(b"\n") + 1]
            if data.count(b'"') % 2:  # inside a field of several lines
                return []
        text = data.decode("utf-8" if self._line else "utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""))
        try:
            records = [(self._line + reader.line_num, record) for record in reader if record]
        except csv.Error as error:
            line = self._line + reader.line_num
            raise MonitorError(f"{str(self._file.path)!r} line {line} is not CSV: {error}.") from None
        self._file.take(data)
        self._line += reader.line_num
        if records and self._columns is None:
            self._columns = self._head(records.pop(0)[1])
        columns = self._columns or []
        return [(f"line {line}", dict(zip(columns, record, strict=False))) for line, record in records]

    def _head(self, record: list[str]) -> list[str]:
        columns = [name.strip() for name in record]
        of_wandb = {name for name in columns if {f"{name}__MIN", f"{name}__MAX"} <= set(columns)}
        ends = {name + end for name in of_wandb for end in ("__MIN", "__MAX")}
        for name in columns:
            if name and name not in ends:
                self.names[name] = name.rpartition(" - ")[2] if name in of_wandb else name
        return columns


class JsonLinesReader:
    """An object a line; of verl's {"step": n, "data": {...}} the data; of prime-rl's {"step": n, "time": t, ...} the
    time is the row's. A last line that is still being written is left out with a note.

    live: it is left out without one, and a line that is no object costs that line: a process that died left half of it.
    """

    def __init__(self, path: Path, *, live: bool = False) -> None:
        self.names: dict[str, str] = {}
        self.notes: list[str] = []
        self.config: dict[str, Any] = {}
        self._file, self._live = GrowingFile(path), live
        self._line = 0

    def read(self) -> list[Row]:
        rows: list[Row] = []
        data = self._file.new_bytes()
        lines = data.splitlines(keepends=True)
        for index, line in enumerate(lines):
            whole = line.endswith(b"\n")
            if not whole and self._live:
                break
            row = self._row(line, last=not whole and index == len(lines) - 1 and bool(rows or self._line))
            if row is None:
                break
            self._file.take(line)
            self._line += 1
            if row:
                self.names |= {name: name for name in row}
                rows.append((f"line {self._line}", row))
        return rows

    def _row(self, line: bytes, *, last: bool) -> dict[str, Any] | None:
        """The row of a line, {} where it holds none; None if the line is not complete."""
        text = line.decode("utf-8" if self._line else "utf-8-sig", errors="replace" if self._live else "strict")
        if not text.strip():
            return {}
        where = f"{str(self._file.path)!r} line {self._line + 1}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            if last:
                self.notes.append(f"{self._file.path}: the last line is not complete and is left out.")
                return None
            return self._refuse(f"{where} is not JSON: {error.msg}. Expected one object a line.")
        if not isinstance(row, dict):
            return self._refuse(f"{where} is {text[:40].strip()!r}, expected an object like {{'step': 0, ...}}.")
        if row.keys() == {"step", "data"} and isinstance(row["data"], dict):
            return row["data"] | {"step": row["step"]}
        if list(row)[:2] == ["step", "time"] and isinstance(row["time"], float):
            return {TIME: row["time"]} | {name: value for name, value in row.items() if name != "time"}
        return row

    def _refuse(self, message: str) -> dict[str, Any]:
        if not self._live:
            raise MonitorError(message)
        self.notes.append(f"{message} It is left out.")
        return {}


class WholeFileReader:
    """A file that is written anew each time, by `load(path)` -> (names, rows).

    find: the path, which may change, of a newer checkpoint say.
    """

    def __init__(self, find: Callable[[], Path], load: Callable[[Path], tuple[dict[str, str], list[Row]]]) -> None:
        self.names: dict[str, str] = {}
        self.notes: list[str] = []
        self.config: dict[str, Any] = {}
        self._find, self._load = find, load
        self._seen: tuple[Path, int, int] | None = None
        self._known: list[int] = []  # hashes of the rows that were given

    def read(self) -> list[Row]:
        path = self._find()
        found = path.stat()
        seen = (path, found.st_size, found.st_mtime_ns)
        if seen == self._seen:
            return []
        names, rows = self._load(path)
        hashes = [hash(repr(row)) for _, row in rows]  # nan differs from itself, its text does not
        if hashes[: len(self._known)] != self._known:
            raise BegunAnew(path)
        new = rows[len(self._known) :]
        self._seen, self._known = seen, hashes
        self.names |= names
        return new


def parquet_rows(path: Path) -> tuple[dict[str, str], list[Row]]:
    """Rows of a Parquet file; columns of lists and structs are left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = [field.name for field in file.schema_arrow if not pa.types.is_nested(field.type)]
        table = file.read(columns=names)
    except (pa.ArrowInvalid, OSError) as error:
        raise MonitorError(f"{str(path)!r} cannot be read as Parquet: {error}.") from None
    return {name: name for name in names}, [(f"row {at}", row) for at, row in enumerate(table.to_pylist())]


def state_rows(path: Path) -> tuple[dict[str, str], list[Row]]:
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
    return names, [(f"log_history[{index}]", row) for index, row in enumerate(history)]
