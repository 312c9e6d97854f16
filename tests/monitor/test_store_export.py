"""A run leaves a store as one file and comes back the same; stores are merged; retention frees what it says."""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from store_data import N_TOKENS, Scripted, record_run, samples, step_record, tokens
from test_store_compact import contents, everything

from monitor.cli import main
from monitor.errors import StoreError
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store.check import check_store
from monitor.store.export import export_run, export_tables, merge
from monitor.store.reader import open_store
from monitor.store.runs import get_run, run_names
from monitor.store.schema import TABLES
from monitor.store.segments import list_segments


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Run a of two attempts with an alert at step 6; run b beside it."""
    path = tmp_path / "first"
    script = Scripted({6: [("entropy_collapse", "firing", "critical")]})
    with Recorder(path, RunInfo("a", task="chain"), engine=script, flush_s=0.0) as recorder:
        for step in range(1, 16):
            recorder.record(step_record(step), tokens(step), samples(step))
            assert recorder.flush(60)
    with Recorder(path, RunInfo("a", task="chain"), resume=True) as recorder:
        recorder.record(step_record(15), tokens(115))
    record_run(path, "b", range(1, 4))
    return path


def rows_of(store: Path, run: str) -> dict[str, list[tuple]]:
    return {table: [row for row in rows if row[0] == run] for table, rows in contents(store).items()}


def test_an_export_answers_like_the_store_and_comes_back_the_same(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.duckdb"
    assert export_run(store, "a", out) == []
    with duckdb.connect(str(out), read_only=True) as con, open_store(store) as opened:
        for query in (
            "FROM entropy_fan('a')",
            "FROM tokens_of('a', 5, 3)",
            "FROM tokens_at('a', 15) ORDER BY ALL",  # of the second attempt
            "FROM episodes('a')",
            "SELECT count(*), sum(entropy) FROM tokens WHERE run = 'a'",
            "SELECT * FROM steps WHERE run = 'a' ORDER BY ALL",
            "SELECT run, status, task, acknowledged FROM runs WHERE run = 'a'",
        ):
            assert con.execute(query).fetchall() == opened.sql(query).rows, query
        comment = con.execute("SELECT comment FROM duckdb_functions() WHERE function_name = 'tokens_of'").fetchall()
        assert "with their texts" in comment[0][0]
    other = tmp_path / "other"
    assert merge(other, out) == (["a"], [])
    assert rows_of(other, "a") == rows_of(store, "a")
    for field in ("status", "acknowledged", "attempt", "info", "created"):
        assert getattr(get_run(other, "a"), field) == getattr(get_run(store, "a"), field)
    assert check_store(other) == []
    with Recorder(other, RunInfo("a"), resume=True) as recorder:  # and it can go on
        recorder.record(step_record(16), tokens(16))
    assert get_run(other, "a").acknowledged == 16


def test_stores_are_merged_whole_and_nothing_is_overwritten(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    record_run(other, "b", range(1, 3))
    theirs, ours = rows_of(store, "a"), rows_of(other, "b")
    done, [refused] = merge(other, store)
    assert done == ["a"] and refused.startswith("b: a run of that name is there already.")
    assert rows_of(other, "a") == theirs and rows_of(other, "b") == ours
    assert check_store(other) == [] and run_names(other) == ["a", "b"]
    assert main(["store", "merge", str(store), str(other)]) == 1  # both are there now
    with Recorder(store, RunInfo("c")) as recorder:
        recorder.record(step_record(1))
        assert merge(tmp_path / "third", store)[1] == ["c: it is running. Merge it when it has ended."]


def test_a_damaged_run_is_not_merged(store: Path, tmp_path: Path) -> None:
    _, path = list_segments(store, "a", "tokens")[3]
    path.write_bytes(path.read_bytes()[:-1])
    done, [refused] = merge(tmp_path / "other", store)
    assert done == ["b"] and "is damaged: run `rlvr store check` on the source" in refused
    assert sorted(os.listdir(tmp_path / "other/runs")) == ["_seed", "b"]
    assert export_run(store, "a", tmp_path / "a.duckdb") == [path]  # said, and the rest is there


def test_what_is_no_store_and_what_exists_is_refused(store: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no database")
    with pytest.raises(StoreError, match="is neither a store nor an export of a run"):
        merge(tmp_path / "other", tmp_path / "note.txt")
    with pytest.raises(StoreError, match="No store at"):
        merge(tmp_path / "other", tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"note\.txt' exists. Give a new name"):
        export_run(store, "a", tmp_path / "note.txt")
    assert (tmp_path / "note.txt").read_text() == "no database"
    with pytest.raises(StoreError, match="No run 'c'"):
        export_run(store, "c", tmp_path / "c.duckdb")
    assert not list(tmp_path.glob("c.duckdb*"))


def test_on_a_full_disk_no_half_export_is_left(store: Path, small_disk: Path) -> None:
    from disks import fill

    fill(small_disk, leave=64 << 10)
    for make in (lambda: export_run(store, "a", small_disk / "a.duckdb"), lambda: merge(small_disk / "s", store)):
        with pytest.raises(StoreError, match=r"^Cannot (export|merge) .*No space left on device"):
            make()
    assert not list(small_disk.glob("a.duckdb*")) and not list(small_disk.glob("s/runs/.*"))


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_tables_as_files_have_the_rows_of_the_views(store: Path, tmp_path: Path, kind: str) -> None:
    assert main(["export", "a", str(tmp_path / "out"), "--store", str(store), f"--{kind}"]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == sorted(["run.json", *(f"{table}.{kind}" for table in TABLES)])
    assert json.loads((tmp_path / "out/run.json").read_text())["task"] == "chain"
    path = tmp_path / f"out/tokens.{kind}"
    if kind == "parquet":
        found = pq.read_table(path)["entropy"].to_pylist()
    else:
        with path.open(newline="") as file:
            found = [float(row["entropy"]) for row in csv.DictReader(file)]
    # steps 1 to 14 of the first attempt, then step 15 of the second one
    wanted = [value for step in [*range(1, 15), 115] for value in tokens(step).entropy.tolist()]
    assert len(found) == 15 * N_TOKENS and found == pytest.approx(wanted, rel=1e-6)


def test_retention_by_age_and_size_says_first_what_it_frees(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(store)
    prune = ["store", "prune", str(store), "--thin-tokens", "0", "--json"]
    assert main([*prune, "--dry-run"]) == 0
    plans = {plan["run"]: plan for plan in json.loads(capsys.readouterr().out)}
    assert everything(store) == before
    # evidence: three steps before the alert of step 6, its own, two after it
    assert plans["a"]["kept_steps"] == [3, 4, 5, 6, 7, 8] and plans["b"]["kept_steps"] == []
    assert main([*prune, "--older-than-days", "1"]) == 0  # both runs are new
    assert json.loads(capsys.readouterr().out) == [] and everything(store) == before
    for path in (store / "runs/a").glob("heartbeat-*.json"):
        beat = json.loads(path.read_text())
        path.write_text(json.dumps(beat | {"last_step_ts": time.time() - 2 * 86_400}))
    held = sum(get_run(store, run).bytes for run in ("a", "b"))
    assert main([*prune, "--older-than-days", "1", "--run", "a", "--dry-run"]) == 0
    [plan] = json.loads(capsys.readouterr().out)
    assert main([*prune, "--max-gb", str((held - 1) / 1e9)]) == 0  # a is the older one, and it is enough
    [done] = json.loads(capsys.readouterr().out)
    assert done["run"] == plan["run"] == "a" and done["kept_steps"] == [3, 4, 5, 6, 7, 8]
    assert done["bytes_before"] - get_run(store, "a").bytes >= 0.5 * (plan["bytes_before"] - plan["bytes_after"]) > 0
    assert not list((store / "runs/a").glob("data.g0"))  # the space is free: no other name holds the old files
    assert {step for (step,) in duckdb_steps(store, "a")} == {3, 4, 5, 6, 7, 8}
    assert duckdb_steps(store, "b") == [(1,), (2,), (3,)]
    assert check_store(store) == []


def duckdb_steps(store: Path, run: str) -> list[tuple]:
    with open_store(store) as opened:
        return opened.sql("SELECT DISTINCT step FROM tokens WHERE run = ? ORDER BY step", [run]).rows


def test_export_tables_is_refused_where_the_folder_exists(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "out", symlinks=True)
    with pytest.raises(StoreError, match="exists"):
        export_tables(store, "a", tmp_path / "out", "csv")
