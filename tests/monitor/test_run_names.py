"""A run's name is a folder's name and stands in commands, so it holds nothing else than letters, digits and . _ -"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from store_data import record_run

from monitor.errors import StoreError, UnknownRunError
from monitor.recorder import Recorder
from monitor.records import StepRecord
from monitor.store.check import check_store
from monitor.store.runs import get_run, run_names

REFUSED = ["a\n", "a\nb", "", ".hidden", "_seed", "a/b", "..", "a b", "ä", "a" * 121, "<b>", "![x](y)"]


@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_a_name_that_cannot_be_used_is_told_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match=r"Run name .* cannot be used: expected 1 to 120 of letters, digits"):
        Recorder(tmp_path / "store", name)
    assert run_names(tmp_path / "store") == []


@pytest.mark.parametrize("name", ["a", "0-b_c.D", "a" * 120])
def test_a_name_that_can_be_used_is_the_folders(tmp_path: Path, name: str) -> None:
    with Recorder(tmp_path, name) as recorder:
        recorder.record(StepRecord(1, {"entropy": 1.0}))
    assert run_names(tmp_path) == [name]


def test_a_folder_whose_name_is_no_text_stops_no_command(tmp_path: Path) -> None:
    """Only another program makes one. DuckDB and a terminal of UTF-8 take no such name; `store check` tells of it."""
    record_run(tmp_path, "a", range(1, 3))
    folder = os.path.join(os.fsencode(tmp_path / "runs"), b"\xff\xfe")
    shutil.copytree(os.fsencode(tmp_path / "runs/a"), folder, symlinks=True)
    (tmp_path / "runs/a/data/steps/g0").joinpath(os.fsdecode(b"\xfd.parquet")).touch()
    assert run_names(tmp_path) == ["a"]
    for name in (os.fsdecode(b"\xff\xfe"), "a\0", ""):
        with pytest.raises(UnknownRunError, match="Known runs: a"):
            get_run(tmp_path, name)
    [name, file] = sorted(check_store(tmp_path), key=lambda finding: finding.run)
    assert (name.kind, name.damage, file.kind) == ("foreign", False, "foreign") and "not UTF-8" in name.message
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as most terminals are
    for command in ("ls", "store check", "watch --once", "alerts list --store", "store compact"):
        line = [sys.executable, "-m", "monitor.cli", *command.split(), str(tmp_path)]
        done = subprocess.run(line, capture_output=True, text=True, env=strict)
        refused = command == "store compact"  # it stops at the file that it does not know
        assert (done.returncode, "Traceback" in done.stderr) == (int(refused), False), done.stderr
        assert ("\\udcfd.parquet" in done.stdout) == (refused or command == "store check")
