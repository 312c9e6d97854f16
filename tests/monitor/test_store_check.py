"""`rlvr store check` finds whatever was lost or damaged, and never ends in a traceback."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_data import N_TOKENS, record_run, samples, step_record, tokens

from monitor.commands.store import main
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store.check import check_store
from monitor.store.compact import compact_run
from monitor.store.runs import get_run, list_runs
from monitor.store.schema import TABLES
from monitor.store.segments import list_segments

RUN = "runs/a"
BEAT = f"{RUN}/heartbeat-r000-a001.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with run a, which has rows in every table, and run b beside it."""
    store = tmp_path_factory.mktemp("whole")
    record_run(store, "a", range(1, 6))
    with Recorder(store, RunInfo("a"), resume=True, flush_s=0.0) as recorder:
        recorder.record(step_record(6), tokens(6), samples(6))
    record_run(store, "b", range(1, 4))
    assert check_store(store) == []
    return store


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "store", symlinks=True)
    return tmp_path / "store"


def damage(store: Path) -> list[tuple[str, str]]:
    """(kind, run) of all that `check` calls damage; its exit code says the same."""
    found = [(finding.kind, finding.run) for finding in check_store(store) if finding.damage]
    assert main(["check", str(store)]) == main(["check", str(store), "--json"]) == bool(found)
    return found


@pytest.mark.parametrize("table", ["tokens", "samples", "histograms", "events", "steps"])
@pytest.mark.parametrize("how_many", ["one", "all"])
def test_deleted_segments_of_any_table_are_found(store: Path, table: str, how_many: str) -> None:
    segments = list_segments(store, "a", table)
    for _, path in segments[: 1 if how_many == "one" else None]:
        path.unlink()
    found = damage(store)
    assert set(found) == {("lost_step" if table == "steps" else "lost_rows", "a")}
    assert len(found) == (1 if how_many == "one" else 2)  # one for each attempt


def test_whole_tables_and_generations_that_are_gone_are_found(store: Path) -> None:
    shutil.rmtree(store / RUN / "data.g0/tokens")
    assert damage(store) == [("lost_rows", "a")] * 2
    shutil.rmtree(store / RUN / "data.g0")
    assert {("no_data", "a"), ("lost_step", "a"), ("lost_rows", "a")} == set(damage(store))
    (store / RUN / "data").unlink()
    assert ("no_data", "a") in damage(store)


def test_compaction_and_pruning_are_no_loss_and_what_follows_is(store: Path) -> None:
    compact_run(store, "a", grace_s=0.0)
    assert check_store(store) == []
    compact_run(store, "a", thin_tokens="2", grace_s=0.0)
    assert check_store(store) == []
    compact_run(store, "a", grace_s=0.0)
    compact_run(store, "a", thin_tokens="6,", grace_s=0.0)
    assert check_store(store) == []
    compact_run(store, "a", thin_tokens="0", grace_s=0.0)
    assert check_store(store) == []
    [(_, path), _] = list_segments(store, "a", "samples")
    path.unlink()
    assert damage(store) == [("lost_rows", "a")]


def test_what_a_pruned_run_loses_afterwards_is_found(store: Path) -> None:
    compact_run(store, "a", thin_tokens="1,3,6", grace_s=0.0)
    assert json.loads((store / RUN / "data/pruned.json").read_text()) == {"a001-r000": 3 * N_TOKENS}
    list_segments(store, "a", "tokens")[0][1].unlink()
    [finding] = [finding for finding in check_store(store) if finding.damage]
    assert f"{2 * N_TOKENS} of {5 * N_TOKENS} tokens rows (attempt 1, rank 0) are gone" in finding.message


@pytest.mark.parametrize(
    ("name", "text", "kinds"),
    [
        ("run.json", None, {"run_json"}),
        ("run.json", "", {"run_json"}),
        ("run.json", "HALF", {"run_json"}),
        ("run.json", "[1]", {"run_json"}),
        ("run.json", '{"name": 5, "created": "x", "attempts": 3, "config": "y", "seed": []}', {"run_json"}),
        ("run.json", "[" * 100_000, {"run_json"}),
        ("run.json", "\xff\xfe", {"run_json"}),
        ("heartbeat-r000-a001.json", None, set()),  # of a replaced attempt, as in stores of older versions
        ("heartbeat-r000-a002.json", None, {"heartbeat"}),
        ("heartbeat-r000-a002.json", "", {"heartbeat"}),
        ("heartbeat-r000-a002.json", "HALF", {"heartbeat"}),
        ("heartbeat-r000-a002.json", '{"ts": "now", "status": 3, "pid": null, "tables": {"steps": 1}}', {"heartbeat"}),
        ("heartbeat-r000-a002.json", '{"ts": 1e400, "attempt": "2", "host": [], "busy": 7}', {"heartbeat"}),
    ],
)
def test_metadata_that_is_missing_half_or_of_another_type(
    store: Path, name: str, text: str | None, kinds: set[str]
) -> None:
    path = store / RUN / name
    content = path.read_text().strip()
    if text is None:
        path.unlink()
    else:
        path.write_text(content[: len(content) // 2] if text == "HALF" else text, encoding="latin-1")
    assert {kind for kind, run in damage(store) if run == "a"} == kinds
    assert tuple(state.name for state in sorted(list_runs(store), key=lambda state: state.name)) == ("a", "b")
    assert get_run(store, "b").status == "finished" and get_run(store, "b").acknowledged == 3
    state = get_run(store, "a")
    assert isinstance(state.info.get("config", {}), dict) and isinstance(state.created, float)


def test_a_run_without_run_json_and_heartbeats_is_found(store: Path) -> None:
    for path in (store / RUN).glob("*.json"):
        path.unlink()
    assert {("run_json", "a"), ("heartbeat", "a")} == set(damage(store))


def test_a_folder_where_no_run_started_is_no_damage(store: Path) -> None:
    (store / "runs/empty").mkdir()
    assert [(finding.kind, finding.damage) for finding in check_store(store)] == [("leftover", False)]


def test_leftovers_foreign_files_and_killed_writers_are_no_damage(store: Path) -> None:
    folder = store / RUN / "data/tokens/g0"
    (folder / "1-0-7-7.parquet.tmp").write_text("half")
    (folder / "copy of.parquet").write_bytes(list_segments(store, "a", "tokens")[0][1].read_bytes())
    (store / RUN / "rank-000.reserve").write_text("x")
    (store / RUN / "data/future").mkdir()
    (store / RUN / "data.g7").mkdir()
    found = sorted((finding.kind, finding.damage) for finding in check_store(store))
    assert found == [("foreign", False)] * 2 + [("leftover", False)] * 3
    assert main(["check", str(store)]) == 0


def test_flipped_bits_are_found_and_explain_what_is_missing(store: Path) -> None:
    rng = random.Random(3)
    for table in TABLES:
        for _, path in list_segments(store, "a", table)[:1]:
            content = path.read_bytes()
            for _ in range(8):
                changed = bytearray(content)
                changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                path.write_bytes(changed)
                assert {("checksum", "a")} == set(damage(store))
            path.write_bytes(content)
    assert check_store(store) == []


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 5000, "WRONG"])
@pytest.mark.parametrize("table", ["histograms", "steps"])
def test_segments_that_only_look_right_are_found(store: Path, content: bytes | str, table: str) -> None:
    """Their names hold the CRC of bytes that no reader understands, or of another table's rows."""
    name, path = list_segments(store, "a", table)[0]
    other = list_segments(store, "a", "events")[0][1].read_bytes()
    data = other if isinstance(content, str) else content
    path.unlink()
    forged = path.with_name(path.name.replace(f"{name.crc32:08x}", f"{zlib.crc32(data):08x}"))
    forged.write_bytes(data)
    assert damage(store)


def test_a_folder_in_the_place_of_a_segment_and_a_link_that_leads_nowhere(store: Path) -> None:
    _, path = list_segments(store, "a", "samples")[0]
    path.unlink()
    path.mkdir()
    assert damage(store) == [("unreadable", "a")]
    path.rmdir()
    path.symlink_to("nowhere")
    assert ("lost_rows", "a") in damage(store)
    (store / RUN / "data").unlink()
    (store / RUN / "data").symlink_to("data")  # to itself
    assert ("unreadable", "a") in damage(store)


@pytest.fixture
def as_nobody(whole: Path) -> Iterator[Path]:
    """The store, seen by a user who may not read everything: root may."""
    folder = Path(tempfile.mkdtemp())
    os.chmod(folder, 0o755)
    shutil.copytree(whole, folder / "store", symlinks=True)
    os.chmod(folder / "store", 0o755)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield folder / "store"
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        shutil.rmtree(folder)


def closed(path: Path, change: Callable[[], object]) -> None:
    """Call with the modes of a path taken away, which only its owner may do."""
    user = os.geteuid()
    os.seteuid(os.getuid())
    mode = path.stat().st_mode
    os.chmod(path, 0)
    os.seteuid(user)
    try:
        change()
    finally:
        os.seteuid(os.getuid())
        os.chmod(path, mode)
        os.seteuid(user)


@pytest.mark.parametrize("part", ["", "data.g0", "data.g0/tokens", "data.g0/steps", "run.json", "SEGMENT", "BEAT"])
def test_what_may_not_be_read_is_found(as_nobody: Path, part: str) -> None:
    path = as_nobody / RUN / part
    if part == "SEGMENT":
        path = list_segments(as_nobody, "a", "histograms")[0][1]
    elif part == "BEAT":
        path = as_nobody / RUN / "heartbeat-r000-a002.json"
    kind = {"run.json": "run_json", "BEAT": "heartbeat"}.get(part, "unreadable")

    def check() -> None:
        assert (kind, "a") in damage(as_nobody)
        assert "b" in [state.name for state in list_runs(as_nobody)]

    closed(path, check)
    assert damage(as_nobody) == []


def test_a_store_that_may_not_be_read_is_one_line(as_nobody: Path) -> None:
    from monitor.errors import StoreError

    def check() -> None:
        for ask in (check_store, list_runs):
            with pytest.raises(StoreError, match="Check who may read its folders"):
                ask(as_nobody)

    closed(as_nobody / "runs", check)
    closed(as_nobody, check)


def test_a_live_run_is_checked_too(store: Path) -> None:
    with Recorder(store, RunInfo("c"), flush_s=0.0) as recorder:
        recorder.record(step_record(1), tokens(1))
        assert recorder.flush(10)
        recorder._pipe._heart.now(wait_s=5)
        assert check_store(store) == []
        list_segments(store, "c", "tokens")[0][1].unlink()
        assert damage(store) == [("lost_rows", "c")]
