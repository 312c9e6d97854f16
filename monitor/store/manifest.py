"""The manifest: which segments of one rank of a run count in an object store. One PUT writes it, as the commit mark.

    URL/runs/RUN/manifest-r000.json     this file, one for each rank
    URL/runs/RUN/TABLE/SEGMENT          the segments, under the names that they have in a store
    URL/runs/RUN/run.json, heartbeat-*.json, alerts.json

A merge never mixes ranks, so each rank's segments have one writer, whichever machines the ranks are on. An object that
no manifest names does not count: it is on its way, or it was replaced and is deleted later.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from monitor.errors import StoreError
from monitor.store.schema import TABLES, SegmentName

FORMAT = 1  # raise it when older versions cannot read what this one writes
_NAME = re.compile(r"manifest-r(\d{3,})\.json")
Key = tuple[str, str]  # table, name of a segment


@dataclass(frozen=True, slots=True)
class Manifest:
    """segments: {(table, name): bytes}. writers: {attempt: the process that recorded it}. pruned: see `compact.PRUNED`.

    dropped: {(table, name): when} of objects that no longer count and are to be deleted.
    """

    run: str
    rank: int
    writers: dict[int, str] = field(default_factory=dict)
    segments: dict[Key, int] = field(default_factory=dict)
    pruned: dict[str, int] = field(default_factory=dict)
    dropped: dict[Key, float] = field(default_factory=dict)

    @property
    def attempt(self) -> int:
        """The newest attempt."""
        return max(self.writers, default=0)

    def encode(self) -> bytes:
        """The bytes of the object."""
        content = {
            "format": FORMAT,
            "run": self.run,
            "rank": self.rank,
            "writers": {str(attempt): writer for attempt, writer in sorted(self.writers.items())},
            "segments": _by_table(self.segments),
            "pruned": self.pruned,
            "dropped": _by_table(self.dropped),
        }
        return json.dumps(content).encode()

    @classmethod
    def decode(cls, data: bytes, where: str, run: str, rank: int) -> Manifest:
        """The manifest of a run's rank from an object's bytes. Raises StoreError for anything else."""
        try:
            content = json.loads(data)
            if content["format"] > FORMAT:
                raise StoreError(f"{where} is of a later version: update rlvr-monitor.")
            found = cls(
                content["run"],
                content["rank"],
                {int(attempt): str(writer) for attempt, writer in content["writers"].items()},
                {key: int(size) for key, size in _keys(content["segments"])},
                {str(name): int(rows) for name, rows in content["pruned"].items()},
                {key: float(ts) for key, ts in _keys(content["dropped"])},
            )
            for table, name in found.segments:
                parsed = SegmentName.parse(name)
                if table not in TABLES or parsed is None or parsed.rank != rank:
                    raise ValueError(f"{table}/{name} is no segment of rank {rank}")
            if (found.run, found.rank) != (run, rank):
                raise ValueError(f"it is that of run {found.run!r}, rank {found.rank}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"{where} is no manifest: {type(error).__name__}: {str(error)[:200]}.") from error
        return found


def manifest_name(rank: int) -> str:
    """The name of a rank's manifest in a run's folder."""
    return f"manifest-r{rank:03d}.json"


def manifest_rank(name: str) -> int | None:
    """The rank whose manifest has this name; None for any other file."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def succeed(
    before: dict[Key, int], local: dict[Key, int], pruned: dict[str, int]
) -> tuple[dict[Key, int], dict[Key, int]]:
    """(segments that count from now on, those of `before` that do not any more), from what lies in the local folder.

    A segment goes only if another replaced it: one of the same table, attempt and rank that spans its steps, or, of
    tokens, pruning. One that is gone for no such reason, deleted or set aside as damaged, still counts in the mirror.
    Nor is a segment added whose steps such a one spans: an older copy of the folder holds it, and its rows are there.
    """
    new = _spans(local.keys() - before.keys())
    gone = before.keys() - local.keys()
    replaced = {key for key in gone if _covered(key, new) or _is_pruned(key, pruned)}
    kept = _spans(gone - replaced)
    known = {key: before[key] for key in before.keys() - replaced}
    added = {key: size for key, size in local.items() if key not in before and not _covered(key, kept)}
    return known | added, {key: before[key] for key in replaced}


def _spans(keys: set[Key]) -> dict[tuple[str, int, int], list[tuple[int, int]]]:
    found: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    for table, name in keys:
        if parsed := SegmentName.parse(name):
            found.setdefault((table, parsed.attempt, parsed.rank), []).append((parsed.first_step, parsed.last_step))
    return found


def _covered(key: Key, spans: dict[tuple[str, int, int], list[tuple[int, int]]]) -> bool:
    name = SegmentName.parse(key[1])
    if name is None:
        return False
    near = spans.get((key[0], name.attempt, name.rank), ())
    return any(first <= name.first_step and name.last_step <= last for first, last in near)


def _is_pruned(key: Key, pruned: dict[str, int]) -> bool:
    name = SegmentName.parse(key[1])
    return key[0] == "tokens" and name is not None and f"a{name.attempt:03d}-r{name.rank:03d}" in pruned


def _by_table(values: dict[Key, Any]) -> dict[str, dict[str, Any]]:
    return {table: {name: values[of, name] for of, name in sorted(values) if of == table} for table in TABLES}


def _keys(content: dict[str, dict[str, Any]]) -> list[tuple[Key, Any]]:
    return [((table, name), value) for table, names in content.items() for name, value in names.items()]
