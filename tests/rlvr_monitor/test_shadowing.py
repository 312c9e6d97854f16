"""A module of the user's that is called like one of ours: named in the error, with what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rlvr_monitor
from rlvr_monitor.shadowing import HOME, ShadowedError, require_own


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python started in the user's folder, which it searches first; ours comes after it."""
    environment = os.environ | {"PYTHONPATH": str(HOME)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("path", ["monitor.py", "monitor/__init__.py"])
@pytest.mark.parametrize("script", ["import rlvr_monitor", "import monitor; import rlvr_monitor"])
def test_a_foreign_monitor_is_named_with_its_path(tmp_path: Path, path: str, script: str) -> None:
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text("")
    done = python(tmp_path, "-c", script)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "ShadowedError" in last
    assert f"finds {tmp_path / path}, expected the package 'monitor' of rlvr-monitor in {HOME / 'monitor'}" in last
    assert "Rename your module" in last and "python -P" in last
    assert python(tmp_path, "-P", "-c", "import rlvr_monitor").returncode == 0


def test_the_command_does_not_start_on_a_foreign_monitor(tmp_path: Path) -> None:
    (tmp_path / "monitor.py").write_text("")
    done = python(tmp_path, "-m", "rlvr_monitor", "ls")
    assert done.returncode == 1 and f"finds {tmp_path / 'monitor.py'}, expected" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("name", "command"), [("trainer", "fetch"), ("dashboard", "report")])
def test_a_users_trainer_matters_only_to_the_commands_that_need_ours(tmp_path: Path, name: str, command: str) -> None:
    (tmp_path / f"{name}.py").write_text("mine = 1\n")
    script = f"import rlvr_monitor, {name}; print(rlvr_monitor.RunInfo(name='a').name, {name}.mine)"
    assert python(tmp_path, "-c", script).stdout == "a 1\n"
    assert python(tmp_path, "-m", "rlvr_monitor", "check", "--help").returncode == 0
    code = f"import monitor.cli as cli; cli.NEEDS = {{}}; raise SystemExit(cli.main([{command!r}]))"
    done = python(tmp_path, "-c", code)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"rlvr: `import {name}` finds {tmp_path / name}.py, expected the package {name!r}")


def test_as_a_module_the_command_does_not_look_into_the_working_folder(tmp_path: Path) -> None:
    for name in ("trainer", "dashboard", "duckdb"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the module of the user ran')\n")
    done = python(tmp_path, "-m", "rlvr_monitor", "ls", "no-store")
    assert done.returncode == 2 and "No store at" in done.stderr, done.stderr


def test_ours_are_ours_and_a_mere_folder_is_not() -> None:
    for name in ("monitor", "trainer", "dashboard"):
        require_own(name)
    with pytest.raises(ShadowedError, match="`import no_such_package` finds nothing"):
        require_own("no_such_package")
    assert Path(rlvr_monitor.__file__).parent.parent == HOME
