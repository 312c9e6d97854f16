"""What tests of commands share: a working folder whose modules have the names of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

OWN = "raise RuntimeError('this is the user\\'s own module')\n"
REWARD = "def always(prompts, completions, completion_ids, **columns):\n    return [1.0] * len(completions)\n"


@pytest.fixture(scope="session")
def crowded_folder(tmp_path_factory) -> Path:
    """A folder with trainer.py, monitor.py, dashboard/ and demo/, which nothing may import, and a reward to import."""
    path = tmp_path_factory.mktemp("crowded")
    for name in ("trainer", "monitor"):
        (path / f"{name}.py").write_text(OWN)
    for name in ("dashboard", "demo"):
        (path / name).mkdir()
        (path / name / "__init__.py").write_text(OWN)
    (path / "my_rewards.py").write_text(REWARD)
    return path
