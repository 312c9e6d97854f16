"""Whatever lies damaged or foreign in a store, readers leave it out and untouched, and answer the rest as before."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import numpy as np
import pytest
import rich.table  # noqa: F401  before a test gives up the right to read Python's own files
from store_data import record_run, samples, step_record, tokens

from monitor.cli import main
from monitor.recorder import Recorder
from monitor.records import Alert, RunInfo
from monitor.store.catalog import CATALOG, ensure_catalog
from monitor.store.reader import Store, open_store
from monitor.store.schema import TABLES, SegmentName
from monitor.store.segments import list_segments
from monitor.store.tail import SMALL_TABLES, Tail

Rows = dict[str, list[tuple]]


class AlertEachStep:
    def observe(self, step: int, scalars: object) -> list[Alert]:
        return [Alert("entropy_collapse", "critical", "firing", step, 1, 0.1, 1.0, 0.5, "low", "stop")]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    for run in ("good", "hurt"):
        for first in (1, 3):  # two segments at least of each table
            with Recorder(path, RunInfo(run, task="chain"), engine=AlertEachStep(), resume=first > 1) as recorder:
                for step in (first, first + 1):
                    recorder.record(step_record(step), tokens(step), samples(step))
    return path


@pytest.fixture(scope="module")
def truth(template: Path) -> dict[str, Rows]:
    return {run: answers(template, run) for run in ("good", "hurt")}


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store", symlinks=True))


def answers(store: Path | Store, run: str) -> Rows:
    """Every row that a reader shows of a run."""
    if isinstance(store, Path):
        with open_store(store) as opened:
            return answers(opened, run)
    return {t: store.sql(f"SELECT * FROM {t}_all WHERE run = ? ORDER BY ALL", [run]).rows for t in TABLES}


def followed(store: Path) -> dict[str, Rows]:
    """The same of both runs from the dashboard's tail: the small tables."""
    tail = Tail(store)
    tail.poll()
    ask = "SELECT * FROM {}_all WHERE run = ? ORDER BY ALL"
    found = {
        run: {t: tail.cursor().execute(ask.format(t), [run]).fetchall() for t in SMALL_TABLES}
        for run in ("good", "hurt")
    }
    tail.close()
    return found


def small(rows: dict[str, Rows]) -> dict[str, Rows]:
    return {run: {table: rows[run][table] for table in SMALL_TABLES} for run in rows}


def others(rows: Rows, table: str) -> Rows:
    return {name: rows[name] for name in rows if name != table}


def is_part(left: list[tuple], whole: list[tuple]) -> bool:
    return len(left) < len(whole) and {str(row) for row in left} < {str(row) for row in whole}


def contents(store: Path) -> dict[str, bytes | None]:
    """Every path below runs/, with its bytes."""
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted((store / "runs").rglob("*"))
        if not path.is_fifo()
    }


def commands_work(store: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """`ls`, `show` and `sql` answer; what they say on stderr."""
    for argv in (
        ["ls", str(store)],
        ["show", "hurt", "--store", str(store)],
        ["sql", "SELECT count(*) FROM steps, samples, histograms, runs", str(store)],
    ):
        assert main(argv) == 0, argv
    return capsys.readouterr().err


def first_segment(store: Path, table: str) -> Path:
    return list_segments(store, "hurt", table)[0][1].resolve()


def named(folder: Path, content: bytes, step: int = 77) -> Path:
    """A file with the name of a segment that holds just these bytes."""
    path = folder / str(SegmentName(1, 0, step, step, zlib.crc32(content)))
    path.write_bytes(content)
    return path


def torn(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def overwritten(path: Path) -> None:
    path.write_bytes(b"PAR1" + bytes(range(256)) * 4 + b"PAR1")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (torn, truncated, empty, overwritten, a_folder, a_dangling_link, a_pipe)


@pytest.mark.parametrize("table", TABLES)
def test_a_damaged_segment_costs_its_own_rows_alone(
    store: Path, truth: dict[str, Rows], table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = first_segment(store, table)
    whole = path.read_bytes()
    lost = duckdb.sql(f"SELECT count(*) FROM read_parquet('{path}')").fetchall()[0][0]
    for damage in DAMAGES:
        damage(path)
        before = contents(store)
        with open_store(store) as opened:
            found = {run: answers(opened, run) for run in truth}
            assert [(one.run, one.path) for one in opened.unreadable()] == [("hurt", path)], damage
        assert found["good"] == truth["good"] and others(found["hurt"], table) == others(truth["hurt"], table), damage
        assert is_part(found["hurt"][table], truth["hurt"][table])
        assert len(found["hurt"][table]) == len(truth["hurt"][table]) - lost
        assert followed(store) == small(found), damage
        assert contents(store) == before
        if damage is not DAMAGES[-1]:
            path.rmdir() if path.is_dir() else path.unlink()
            path.write_bytes(whole)
    assert path.name in commands_work(store, capsys)


@pytest.mark.parametrize("table", TABLES)
def test_flipped_bits_never_change_an_answer_silently(store: Path, truth: dict[str, Rows], table: str) -> None:
    """Over header, pages and footer: the answer is that without the segment, whatever DuckDB would make of it."""
    path = first_segment(store, table)
    whole = path.read_bytes()
    rng = np.random.default_rng(zlib.crc32(table.encode()))
    end = len(whole)
    footer = end - 8 - int.from_bytes(whole[-8:-4], "little")
    parts = ((0, 4), (4, footer), (4, footer), (footer, end - 8), (footer, end - 8), (end - 8, end))
    for part in parts:
        at = int(rng.integers(*part))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with open_store(store) as opened:
            found = {run: answers(opened, run) for run in truth}
            assert [one.path for one in opened.unreadable()] == [path], at
        assert found["good"] == truth["good"] and others(found["hurt"], table) == others(truth["hurt"], table), at
        assert is_part(found["hurt"][table], truth["hurt"][table]), at
        assert path.read_bytes() == flipped
    path.write_bytes(whole)
    assert answers(store, "hurt") == truth["hurt"]


@pytest.mark.parametrize("table", TABLES)
def test_a_users_own_files_are_neither_read_nor_touched(
    store: Path, truth: dict[str, Rows], table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = first_segment(store, table)
    shutil.copytree(path.parent, path.parent.with_name(f"{table} backup"))
    shutil.copy(path, path.with_name(f"copy of {path.name}"))
    shutil.copy(path, path.with_name(f"{path.stem} (1).parquet"))
    (path.parent / "notes.parquet").write_bytes(b"mine")
    (path.parent / "table.parquet").symlink_to("nowhere")
    duckdb.sql("SELECT 1 AS mine").write_parquet(str(path.parent / "own.parquet"))
    before = contents(store)
    with open_store(store) as opened:
        assert {run: answers(opened, run) for run in truth} == truth
        assert opened.unreadable() == []
    assert followed(store) == small(truth)
    with duckdb.connect(str(store / CATALOG), read_only=True) as shell:
        shown = shell.execute(f"SELECT count(*) FROM {table}_all WHERE run = 'hurt'").fetchall()
        assert shown == [(len(truth["hurt"][table]),)]
    assert commands_work(store, capsys) == ""
    assert contents(store) == before


@pytest.mark.parametrize("table", TABLES)
def test_another_schema_is_left_out_and_one_column_more_is_read(
    store: Path, truth: dict[str, Rows], table: str
) -> None:
    path = first_segment(store, table)
    other = first_segment(store, "samples" if table != "samples" else "tokens")
    foreign = named(path.parent, other.read_bytes())
    no_parquet = named(path.parent, b"not Parquet", 78)
    more = path.parent / "more.tmp"
    duckdb.sql(f"SELECT *, 1 AS newer FROM read_parquet('{path}')").write_parquet(str(more))
    newer = named(path.parent, more.read_bytes(), 79)
    twice = duckdb.sql(f"SELECT count(*) FROM read_parquet('{newer}')").fetchall()[0][0]
    before = contents(store)
    with open_store(store) as opened:
        found = {run: answers(opened, run) for run in truth}
        assert {one.path: one.reason.split(":")[0] for one in opened.unreadable()} == {
            foreign: f"Its columns are not those of {table}",
            no_parquet: "It is no Parquet file that can be read",
        }
    assert found["good"] == truth["good"] and others(found["hurt"], table) == others(truth["hurt"], table)
    assert len(found["hurt"][table]) == len(truth["hurt"][table]) + twice
    assert {str(row) for row in found["hurt"][table]} == {str(row) for row in truth["hurt"][table]}
    assert contents(store) == before


DEEP = "[" * 100_000
WRONG = {
    **{"created": "yesterday", "attempts": 7, "seed": [1], "config": "none", "environment": 3, "model": {}, "name": 5},
    **{"status": 3, "rank": "x", "attempt": [], "pid": "one", "ts": {}, "acknowledged": "no", "last_step_ts": True},
}
BAD_TEXTS = {
    "half": b'{"name": "hurt", "created": 17',
    "empty": b"",
    "a list": b"[1, 2]",
    "no text": b"\xff\xfe\x00\x01",
    "nested": DEEP.encode(),
    "wrong types": json.dumps(WRONG).encode(),
    "odd numbers": b'{"created": NaN, "seed": 1e999, "attempt": 99999999999999999999, "ts": Infinity, "pid": -1}',
    "half a character": b'{"model": "\\ud800", "host": "\\ud800"}',
    "gone": None,
    "a pipe": None,
    "a folder": None,  # the last
}


@pytest.mark.parametrize("name", ["run.json", "heartbeat"])
def test_a_damaged_run_json_or_heartbeat_costs_its_own_fields_alone(
    store: Path, truth: dict[str, Rows], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = ("SELECT * FROM runs WHERE run = 'good'", "SELECT * FROM heartbeats WHERE run = 'good'")
    with open_store(store) as opened:
        good = [opened.sql(question).rows for question in questions]
    path = max((store / "runs/hurt").glob(f"{name}*"))
    for kind, text in BAD_TEXTS.items():
        path.unlink()
        if text is not None:
            path.write_bytes(text)
        elif kind == "a folder":
            path.mkdir()
        elif kind == "a pipe":
            os.mkfifo(path)
        before = contents(store)
        with open_store(store) as opened:
            assert [opened.sql(question).rows for question in questions] == good
            assert opened.sql("SELECT run FROM runs ORDER BY run").rows == [("good",), ("hurt",)], kind
            assert answers(opened, "hurt") == truth["hurt"]
            told = path in [one.path for one in opened.unreadable()]
            assert told == (kind != "half a character" and (kind, name) != ("gone", "heartbeat")), kind
        tail = Tail(store)
        tail.poll()
        assert set(tail.runs) == {"good", "hurt"} and tail.runs["good"].status == "finished", kind
        tail.close()
        if kind in ("half", "wrong types", "half a character", "a pipe", "a folder"):
            assert (path.name in commands_work(store, capsys)) == told
        if kind not in ("a pipe", "a folder"):
            with duckdb.connect(str(ensure_catalog(store)), read_only=True) as shell:
                assert shell.execute("SELECT status FROM runs WHERE run = 'good'").fetchall() == [("finished",)]
                assert len(shell.execute("SELECT * FROM runs WHERE run = 'hurt'").fetchall()) == 1, kind
        assert contents(store) == before
        if not path.exists():
            path.touch()
        elif path.is_dir():
            path.rmdir()


@pytest.mark.parametrize("damage", [torn, empty, overwritten])
def test_damaged_seeds_disturb_no_reader_and_are_made_again(
    store: Path, truth: dict[str, Rows], damage: Callable[[Path], None]
) -> None:
    good = truth["good"]
    for seed in (store / "runs/_seed/data").rglob("*.parquet"):
        damage(seed)
    (store / "runs/_seed/run.json").write_text("{")
    with open_store(store) as opened:
        assert answers(opened, "good") == good
        assert opened.unreadable() == []
    with duckdb.connect(str(store / CATALOG), read_only=True) as shell:
        for table, rows in good.items():
            assert shell.execute(f"SELECT * FROM {table}_all WHERE run = 'good' ORDER BY ALL").fetchall() == rows
    shutil.rmtree(store / "runs/_seed")
    assert answers(store, "good") == good


def test_a_file_that_is_damaged_while_a_reader_is_open_is_left_out(store: Path) -> None:
    with open_store(store) as opened:
        hurt = answers(opened, "hurt")
        path = first_segment(store, "tokens")
        keep = path.read_bytes()
        os.truncate(path, 50)  # in place: the folder looks the same
        left = answers(opened, "hurt")
        assert len(left["tokens"]) < len(hurt["tokens"])
        assert [one.path for one in opened.unreadable()] == [path]
        path.write_bytes(keep)  # restored from a backup
        assert answers(opened, "hurt") == hurt and opened.unreadable() == []


@pytest.fixture
def as_nobody(template: Path) -> Iterator[Path]:
    """A store, and for root the eyes of another user: root may read everything, and pytest's folders are closed."""
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(template, folder / "store", symlinks=True)
    for path in (folder, folder / "store"):
        os.chmod(path, 0o755)
    yield folder / "store"
    shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["segment", "table", "data", "run", "run.json", "heartbeat"])
def test_what_may_not_be_read_is_left_out(
    as_nobody: Path, truth: dict[str, Rows], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = as_nobody / "runs/hurt"
    segment = first_segment(as_nobody, "tokens")
    path = {
        "segment": segment,
        "table": segment.parent,
        "data": segment.parents[2],
        "run": run,
        "run.json": run / "run.json",
        "heartbeat": max(run.glob("heartbeat*")),
    }[what]
    closed = {"segment": ["tokens"], "table": ["tokens"], "data": TABLES, "run": TABLES}.get(what, [])
    mode, user = path.stat().st_mode, os.geteuid()
    os.chmod(path, 0)
    if user == 0:
        os.seteuid(65534)
    try:
        with open_store(as_nobody) as opened:
            assert answers(opened, "good") == truth["good"]
            hurt = answers(opened, "hurt")
            assert opened.sql("SELECT status FROM runs WHERE run = 'good'").rows == [("finished",)]
            unreadable = {one.path for one in opened.unreadable()}
        assert followed(as_nobody)["good"] == small(truth)["good"]
        for argv in (["ls"], ["sql", "FROM runs"], ["show", "good", "--store"]):
            assert main([*argv, str(as_nobody)]) == 0
        assert main(["show", "hurt", "--store", str(as_nobody)]) == (2 if what == "run" else 0)
    finally:
        os.seteuid(user)
        os.chmod(path, mode)
    assert {table for table in TABLES if hurt[table] != truth["hurt"][table]} == set(closed)
    assert all(is_part(hurt[table], truth["hurt"][table]) for table in closed)
    assert path in unreadable or (what in ("data", "run") and any(path in one.parents for one in unreadable))


def test_a_copy_that_follows_links_and_a_copied_run_are_read(
    store: Path, truth: dict[str, Rows], tmp_path: Path
) -> None:
    good = truth["good"]
    copy = Path(shutil.copytree(store, tmp_path / "copy", symlinks=False))
    assert not (copy / "runs/good/data").is_symlink()
    assert answers(copy, "good") == good
    assert followed(copy) == small(truth)
    shutil.copytree(copy / "runs/good", copy / "runs/good-2", symlinks=True)
    with open_store(copy) as opened:  # the folder's name is the run's: no row of `good` counts twice
        assert answers(opened, "good") == good
        again = answers(opened, "good-2")
        assert [row[1:] for row in again["steps"]] == [row[1:] for row in good["steps"]]
    with duckdb.connect(str(copy / CATALOG), read_only=True) as shell:
        assert shell.execute("SELECT count(*) FROM steps_all WHERE run = 'good'").fetchall() == [(len(good["steps"]),)]


def test_new_files_are_seen_and_unchanged_ones_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monitor.store import listing

    read: list[str] = []
    real = listing.crc32_of
    monkeypatch.setattr(listing, "crc32_of", lambda path: read.append(path.name) or real(path))
    record_run(tmp_path, "a", range(1, 4))
    with open_store(tmp_path) as opened:
        for _ in range(3):
            assert opened.sql("SELECT count(DISTINCT step) FROM steps").rows == [(3,)]
        assert sorted(read) == sorted(path.name for _, path in list_segments(tmp_path, "a", "steps"))
        read.clear()
        record_run(tmp_path, "b", range(1, 3))
        assert opened.sql("SELECT run, max(step) FROM steps GROUP BY run ORDER BY run").rows == [("a", 3), ("b", 2)]
        assert sorted(read) == sorted(path.name for _, path in list_segments(tmp_path, "b", "steps"))
        shutil.rmtree(tmp_path / "runs/a")
        assert opened.sql("SELECT run, max(step) FROM steps GROUP BY run ORDER BY run").rows == [("b", 2)]
