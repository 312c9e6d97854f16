"""A run's name is a folder's name and stands in commands, so it holds nothing else than letters, digits and . _ -"""

from __future__ import annotations

from pathlib import Path

import pytest

from monitor.errors import StoreError
from monitor.recorder import Recorder
from monitor.records import StepRecord
from monitor.store.runs import run_names

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
