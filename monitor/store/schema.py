"""Columns of every table, file names of segments, schema version."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

SCHEMA_VERSION = 3  # raise it when older versions cannot read what this one writes
FORMER_TYPES = {"step": "INTEGER", "first_step": "INTEGER"}  # types of schema 1, which readers accept too
_KEY = {"run": "VARCHAR", "attempt": "SMALLINT", "step": "BIGINT", "rank": "SMALLINT"}

TABLES: dict[str, dict[str, str]] = {
    "tokens": _KEY
    | {
        "sample": "INTEGER",
        "position": "INTEGER",
        "token_id": "INTEGER",
        "logprob": "FLOAT",
        "entropy": "FLOAT",
        "renyi2": "FLOAT",
        "deviation": "FLOAT",
        "alive": "INTEGER",
        "weight": "FLOAT",
    },
    "samples": _KEY
    | {
        "sample": "INTEGER",
        "group_id": "INTEGER",
        "prompt_id": "VARCHAR",
        "split": "VARCHAR",
        "reward": "FLOAT",
        "correct": "BOOLEAN",
        "advantage": "FLOAT",
        "n_tokens": "INTEGER",
        "truncated": "BOOLEAN",
        "prompt": "VARCHAR",
        "completion": "VARCHAR",
        "token_texts": "VARCHAR[]",
    },
    "histograms": _KEY
    | {
        "metric": "VARCHAR",
        "split": "VARCHAR",
        "edges_id": "VARCHAR",
        "n": "BIGINT",
        "n_nonfinite": "BIGINT",
        "sum": "DOUBLE",
        "sumsq": "DOUBLE",
        "min": "DOUBLE",
        "max": "DOUBLE",
        "counts": "BIGINT[]",
    },
    "alerts": _KEY
    | {
        "ts": "DOUBLE",
        "rule": "VARCHAR",
        "severity": "VARCHAR",
        "state": "VARCHAR",
        "first_step": "BIGINT",
        "value": "DOUBLE",
        "baseline": "DOUBLE",
        "threshold": "DOUBLE",
        "message": "VARCHAR",
        "action": "VARCHAR",
    },
    "events": _KEY | {"ts": "DOUBLE", "kind": "VARCHAR", "message": "VARCHAR"},
    "steps": _KEY | {"ts": "DOUBLE", "name": "VARCHAR", "value": "DOUBLE"},
}
WRITE_ORDER = ("tokens", "samples", "histograms", "alerts", "events", "steps")  # steps last: the commit mark

GENERATION = re.compile(r"data\.g(\d+)(\.tmp)?")  # folders of a run; with .tmp: not finished
INNER = re.compile(r"g(\d+)")
_NAME = re.compile(r"a(\d{3,})-r(\d{3,})-s(\d{8,})-(\d{8,})-([0-9a-f]{8})\.parquet", re.ASCII)


@dataclass(frozen=True, slots=True)
class SegmentName:
    """aAAA-rRRR-sFFFFFFFF-LLLLLLLL-CCCCCCCC.parquet: attempt, rank, first and last step, CRC-32 of the bytes.

    Attempt, rank and steps have at least as many digits as shown, and more if needed.
    """

    attempt: int
    rank: int
    first_step: int
    last_step: int
    crc32: int

    def __str__(self) -> str:
        return (
            f"a{self.attempt:03d}-r{self.rank:03d}-s{self.first_step:08d}-{self.last_step:08d}-{self.crc32:08x}.parquet"
        )

    @classmethod
    def parse(cls, name: str) -> SegmentName | None:
        """The parts of a segment's name, or None for any other file."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        attempt, rank, first, last = (int(part) for part in match.groups()[:4])
        return cls(attempt, rank, first, last, int(match.group(5), 16))


def run_dir(store: Path, run: str) -> Path:
    return store / "runs" / run


def generation_of(folder: Path) -> str | None:
    """The name of the folder that a run's `data` leads to: "data" itself in a copy that followed the link."""
    link = folder / "data"
    try:
        return os.path.basename(os.readlink(link))
    except OSError:
        return "data" if os.path.isdir(link) else None


def inner_name(generation: str) -> str:
    """The folder inside of each table of a generation "data.g8": "g8"."""
    return generation.removeprefix("data.")


def table_dir(store: Path, run: str, table: str) -> Path:
    """The folder of a run's segments of one table, in its newest generation.

    It is data.g8/TABLE/g8, or data.g8/TABLE in runs of older versions. In a copy that followed links, which has all of
    them as plain folders, it is that of the highest number.
    """
    folder = run_dir(store, run)
    generation = generation_of(folder) or "data"
    outer = folder / generation / table
    if generation != "data":
        inner = outer / inner_name(generation)
        return inner if os.path.isdir(inner) else outer
    try:
        numbers = [int(match[1]) for name in os.listdir(outer) if (match := INNER.fullmatch(name))]
    except OSError:
        numbers = []
    return outer / f"g{max(numbers)}" if numbers else outer
