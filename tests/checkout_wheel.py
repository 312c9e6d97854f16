"""The wheel of this checkout, for what tests the distribution and not the working tree."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build_wheel(folder: Path, python: str, *options: str) -> Path:
    """Build the wheel into a folder with the pip of `python`; returns its path.

    From a copy: setuptools leaves a folder `build` beside the sources, and packs what lies there from earlier builds.
    """
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "sample_runs", "tests"))
    pip = [python, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps", *options]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True)
    shutil.rmtree(source)
    (wheel,) = folder.glob("rlvr_monitor-*.whl")
    return wheel
