"""Readers on damaged stores: the long form of tests/monitor/test_store_damage.py, with seeded flips, cuts and bad JSON.

    nice python benchmarks/bench_damage.py [--flips 800] [--seed 0] [--out benchmarks/results/damage.csv]
                                                                    then: python -m docs.make_reliability

Each try damages one file of one run in one place and opens the store anew. The answer must hold all rows of the other
run and of the other tables. The rows of the damaged file must be left out, the file must be named, and no file may be
changed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, write_rows

from monitor.metrics import n_cells
from monitor.recorder import Recorder
from monitor.records import Alert, Histogram, RunInfo, SampleTable, StepRecord, TokenTable
from monitor.store.reader import open_store
from monitor.store.schema import TABLES
from monitor.store.segments import list_segments
from monitor.store.tail import Tail

Rows = dict[tuple[str, str], list[str]]  # (table, run): its rows as text
OUTCOMES = ("right", "not named", "wrong", "raised", "file changed")


def damage_rows(flips: int = 800, seed: int = 0) -> list[dict[str, Any]]:
    """One row for each probe: tries and how many had each outcome. Only `right` may be above 0."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        _record(store)
        truth = _rows(store)
        probes: dict[str, Iterator[tuple[Path, bytes]]] = {
            f"a bit of a segment of {table}": _flipped(store, table, max(1, flips // len(TABLES)), rng)
            for table in TABLES
        }
        probes["a segment cut off"] = _cut(store, max(1, flips // 8), rng)
        probes["a run.json or heartbeat cut off or with a flipped bit"] = _bad_json(store, max(1, flips // 8), rng)
        rows = []
        for probe, damaged in probes.items():
            outcomes = Counter(_outcome(store, truth, path, content) for path, content in damaged)
            rows.append({"probe": probe, "tries": outcomes.total()} | {name: outcomes[name] for name in OUTCOMES})
        return rows


def _record(store: Path, n_tokens: int = 400) -> None:
    rng = np.random.default_rng(1)

    class EachStep:
        def observe(self, step: int, scalars: Any) -> list[Alert]:
            return [Alert("entropy_collapse", "warning", "firing", step, 1, 0.1, 1.0, 0.5, "low", "stop")]

    for run in ("good", "hurt"):
        with Recorder(store, RunInfo(run, config={"a": list(range(50))}), engine=EachStep(), flush_s=0.0) as recorder:
            for step in (1, 2, 3):
                counts = rng.integers(0, 9, n_cells("nats96"))
                histogram = Histogram("entropy", "all", "nats96", counts, n=int(counts.sum()), min=0.0, max=2.0)
                whole, values = np.arange(n_tokens, dtype=np.int32), rng.random(n_tokens).astype(np.float32)
                tokens = TokenTable(whole // 50, whole % 50, whole, values, values, values, values, whole, values)
                eight, reward = np.arange(8, dtype=np.int32), rng.random(8).astype(np.float32)
                texts = ["1 + 1 = 2"] * 8
                samples = SampleTable(
                    eight, eight // 4, texts, texts, reward, reward > 0.5, reward, eight, reward > 2, texts, texts,
                    [["1", " + ", "1"]] * 8,
                )  # fmt: skip
                recorder.record(StepRecord(step, {"reward": 0.5, "entropy": 1.0}, (histogram,)), tokens, samples)
                recorder.flush()


def _rows(store: Path) -> Rows:
    with open_store(store) as opened:
        return _answers(opened)


def _answers(opened: Any) -> Rows:
    found: Rows = {(table, run): [] for table in TABLES for run in ("good", "hurt")}
    for table in TABLES:
        for row in opened.sql(f"SELECT * FROM {table}_all ORDER BY ALL").rows:
            found[table, row[0]].append(str(row))
    found["runs", "good"] = [str(row) for row in opened.sql("SELECT * FROM runs WHERE run = 'good'").rows]
    found["runs", "hurt"] = [str(row) for row in opened.sql("SELECT run FROM runs WHERE run = 'hurt'").rows]
    return found


def _outcome(store: Path, truth: Rows, path: Path, content: bytes) -> str:
    """Damage a file, ask everything, put it back."""
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        with open_store(store) as opened:
            found = _answers(opened)
            named = path in [one.path for one in opened.unreadable()]
        tail = Tail(store)
        tail.poll()
        [(followed,)] = tail.cursor().execute("SELECT count(*) FROM steps_all").fetchall()
        tail.close()
        if path.read_bytes() != content:
            return "file changed"
        kept = {key: rows for key, rows in found.items() if key != (path.parent.name, "hurt")}
        lost = found.get((path.parent.name, "hurt"), [])
        whole_rows = truth.get((path.parent.name, "hurt"), [])
        right = kept == {key: truth[key] for key in kept} and set(lost) <= set(whole_rows)
        right = right and (not whole_rows or len(lost) < len(whole_rows))
        right = right and followed == sum(len(found["steps", run]) for run in ("good", "hurt"))
        return "wrong" if not right else "right" if named or path.suffix == ".json" else "not named"
    except Exception:
        return "raised"
    finally:
        path.write_bytes(whole)


def _segments(store: Path, table: str) -> list[Path]:
    return [path.resolve() for _, path in list_segments(store, "hurt", table)]


def _flip(content: bytes, at: int, bit: int) -> bytes:
    flipped = bytearray(content)
    flipped[at] ^= 1 << bit
    return bytes(flipped)


def _flipped(store: Path, table: str, tries: int, rng: np.random.Generator) -> Iterator[tuple[Path, bytes]]:
    """A third each in the pages, in the footer and anywhere, so that the small footer gets its share."""
    paths = _segments(store, table)
    for index in range(tries):
        path = paths[int(rng.integers(len(paths)))]
        content = path.read_bytes()
        footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        span = ((4, footer), (footer, len(content)), (0, len(content)))[index % 3]
        yield path, _flip(content, int(rng.integers(*span)), int(rng.integers(8)))


def _cut(store: Path, tries: int, rng: np.random.Generator) -> Iterator[tuple[Path, bytes]]:
    paths = [path for table in TABLES for path in _segments(store, table)]
    for _ in range(tries):
        path = paths[int(rng.integers(len(paths)))]
        content = path.read_bytes()
        yield path, content[: int(rng.integers(len(content)))]


def _bad_json(store: Path, tries: int, rng: np.random.Generator) -> Iterator[tuple[Path, bytes]]:
    paths = sorted((store / "runs/hurt").glob("*.json"))
    harm: tuple[Callable[[bytes, int], bytes], ...] = (
        lambda content, at: content[:at],
        lambda content, at: _flip(content, at, int(rng.integers(8))),
    )
    for index in range(tries):
        content = paths[index % len(paths)].read_bytes()
        yield paths[index % len(paths)], harm[index // 2 % 2](content, int(rng.integers(len(content))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "damage.csv")
    options = parser.parse_args()
    rows = damage_rows(options.flips, options.seed)
    write_rows(options.out, rows, packages=("duckdb", "numpy", "pyarrow"))
    if any(row["right"] < row["tries"] for row in rows):
        raise SystemExit("There were faults.")


if __name__ == "__main__":
    main()
