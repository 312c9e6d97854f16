from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import mounted


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    with mounted(tmp_path / "disk", 4) as disk:
        yield disk
