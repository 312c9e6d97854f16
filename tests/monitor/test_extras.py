"""What is not installed is named with the one line to type."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from monitor import extras as extras_module
from monitor.cli import COMMANDS, NEEDS, main
from monitor.errors import MissingPackageError
from monitor.extras import EXTRAS, require, require_extras
from monitor.integrations.wandb import WandbSink

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_the_extras_are_those_of_the_distribution() -> None:
    declared = PROJECT["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        assert sorted(modules) == sorted(item.split(">=")[0].replace("-", "_") for item in declared[extra])
    assert declared["all"] == [f"rlvr-monitor[{','.join(sorted(EXTRAS))}]"]
    assert declared["dev"][0] == "rlvr-monitor[all]"
    assert not any(item.startswith(("torch", "transformers", "streamlit")) for item in PROJECT["dependencies"])


def test_every_command_of_another_package_names_its_extras() -> None:
    homes = {"trainer": "train", "dashboard": "dashboard"}
    for name, (target, _) in COMMANDS.items():
        if name == "doctor":  # it says what is missing, so it works without
            assert name not in NEEDS
            continue
        home = homes.get(target.split(".")[0])
        assert (home in NEEDS[name].split(",")) if home else name not in NEEDS


@pytest.mark.parametrize(
    ("command", "module", "extras"),
    [
        ("dashboard", "streamlit", "dashboard"),
        ("report", "plotly", "dashboard"),
        ("demo", "torch", "train,dashboard"),
        ("train", "torch", "train"),
        ("compare", "transformers", "train"),
        ("eval", "math_verify", "train"),
        ("fetch", "safetensors", "train"),
    ],
)
def test_a_command_says_what_to_type(
    command: str, module: str, extras: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras_module, "_installed", lambda name: name != module)
    assert main([command]) == 2
    out, err = capsys.readouterr()
    line = f'rlvr {command} needs {module}, which is not installed. Type: pip install "rlvr-monitor[{extras}]"\n'
    assert (out, err) == ("", line)


def test_python_without_it_says_the_same() -> None:
    code = "import sys; sys.modules['streamlit'] = None; from monitor.cli import main; sys.exit(main(['dashboard']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    line = 'rlvr dashboard needs streamlit, which is not installed. Type: pip install "rlvr-monitor[dashboard]"\n'
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_a_folder_of_that_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nowhere_installed").mkdir()  # as wandb makes a folder `wandb` beside the user's script
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match=r"^X needs nowhere_installed, which is not installed\. Type: pip"):
        require("X", ["nowhere_installed"], "nowhere-installed")
    (tmp_path / "nowhere_installed" / "__init__.py").touch()
    require("X", ["nowhere_installed"], "nowhere-installed")


def test_wandb_is_asked_for_when_the_mirror_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r'^The mirror to wandb needs wandb, .*"rlvr-monitor\[wandb\]"$'):
        WandbSink("offline")


def test_the_signals_ask_for_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import monitor.signals"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = "MissingPackageError: monitor.signals needs torch, which is not installed. Type: pip install torch"
    assert done.stderr.splitlines()[-1].endswith(expected)


def test_nothing_is_imported_to_find_out() -> None:
    code = "import sys; from monitor.extras import require_extras as r\ntry:\n    r('X', 'train,dashboard,wandb')\n"
    code += "except ImportError:\n    pass\nsys.exit(bool({'torch', 'streamlit', 'wandb'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(KeyError):
        require_extras("X", "no-such-extra")
