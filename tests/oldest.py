"""The core's tests on the oldest versions that pyproject.toml allows, without torch: `make test-oldest`.

Makes an environment in a temporary folder, installs the wheel of this checkout with every lower bound as a pin and
nothing of the extras, and runs the tests of monitor and rlvr_monitor there, outside the checkout.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

from checkout_wheel import ROOT, build_wheel

TESTS = ("tests/monitor", "tests/rlvr_monitor")
TOOLS = ("pytest", "pytest-timeout")


def lower_bounds() -> list[str]:
    """The core's requirements with each lower bound as a pin."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [requirement.replace(">=", "==") for requirement in project["dependencies"]]


def main() -> int:
    pins = lower_bounds()
    tools = re.findall(rf"^(?:{'|'.join(TOOLS)})==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    print(f"Python {sys.version.split()[0]}, {', '.join(pins)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "bin", "python"))
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, str(build_wheel(Path(folder), python)), *pins, *tools], check=True)
        if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0:
            print("The core brought torch, which it must not demand.", file=sys.stderr)
            return 1
        tests = [str(ROOT / path) for path in TESTS]
        options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        return subprocess.run([python, "-m", "pytest", *options, *tests], cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
