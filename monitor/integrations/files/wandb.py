"""Reader of the run-<id>.wandb files that W&B writes, offline and online, before anything is sent.

wandb has no reader of them in Python any more (its own is part of wandb-core); their frame is that of LevelDB's logs:

    file    ":W&B", 0xBEE1, version 0; then blocks of 32 KiB, this head counting as part of the first
    chunk   CRC-32 of type and data, uint32; length of the data, uint16; type: 1 whole, 2 first, 3 middle, 4 last; data
    block   chunks; fewer than 7 bytes at its end are filled up with zeros

A record is the data of a whole chunk or of a first to a last one: a protobuf message `Record` of wandb's.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monitor.errors import MonitorError
from monitor.extras import require_extras
from monitor.integrations.files.reading import TIME, GrowingFile, Row

_HEAD = b":W&B\xe1\xbe\x00"
_BLOCK = 32768
_CHUNK = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_CLOCKS = ("_runtime", TIME)


class WandbReader:
    """The history of a run: its numbers, a row for each step of wandb's own count, `_step`.

    Reading ends at a damaged or unfinished record: wandb writes a run that is alive in pieces. live: without a note,
    and the next read goes on there. Raises MonitorError for another kind of file, MissingPackageError without wandb.
    """

    def __init__(self, path: Path, *, live: bool = False) -> None:
        require_extras("Reading W&B's files", "wandb")
        self.names: dict[str, str] = {}
        self.notes: list[str] = []
        self.config: dict[str, Any] = {}
        self._file, self._live = GrowingFile(path), live
        self._at = 0  # bytes that were read

    def read(self) -> list[Row]:
        from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at import

        data = self._file.new_bytes()
        if not self._at:
            data = self._behind_head(data)
        rows: list[Row] = []
        used = 0
        for end, message in _records(data, self._at):
            used = end
            record = Record.FromString(message)
            kind = record.WhichOneof("record_type")
            if kind in ("run", "config"):
                update = (record.run.config if kind == "run" else record.config).update
                settings = {item.key: json.loads(item.value_json) for item in update if item.key}
                self.config |= {key: value for key, value in settings.items() if key != "_wandb"}
            if kind != "history":
                continue
            row: dict[str, float] = {"_step": record.history.step.num}
            for item in record.history.item:
                value = json.loads(item.value_json)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    row[item.key or ".".join(item.nested_key)] = value
            self.names |= {name: name for name in row if name not in _CLOCKS}
            rows.append((f"step {record.history.step.num}", row))
        if used < len(data) and not self._live:
            left = f"{len(data) - used} bytes at its end are no whole record and are left out."
            self.notes.append(f"{self._file.path}: {left}")
        self._file.take(data[:used])
        self._at += used
        return rows

    def _behind_head(self, data: bytes) -> bytes:
        if self._live and _HEAD.startswith(data):  # not even the head is complete
            return b""
        if not data.startswith(_HEAD):
            name = str(self._file.path)
            raise MonitorError(f"{name!r} is not a file of W&B: it begins with {data[:7]!r}, expected {_HEAD!r}.")
        self._file.take(_HEAD)
        self._at = len(_HEAD)
        return data[len(_HEAD) :]


def _records(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """(where in `data` it ends, its bytes) of each whole record, up to the first that is damaged.

    start: bytes of the file before `data`, as blocks count from the beginning of the file.
    """
    at, parts = 0, b""
    while True:
        rest = _BLOCK - (start + at) % _BLOCK
        if rest < _CHUNK.size:
            at += rest
        if at + _CHUNK.size > len(data):
            return
        crc, length, kind = _CHUNK.unpack_from(data, at)
        at += _CHUNK.size
        piece = data[at : at + length]
        if len(piece) < length or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != crc:
            return
        at += length
        parts = piece if kind in (_WHOLE, _FIRST) else parts + piece
        if kind in (_WHOLE, _LAST):
            yield at, parts
