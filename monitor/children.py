"""How a process of ours starts another: the child imports our packages, never files of the working folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]  # the folder that holds monitor, trainer and dashboard
PYTHON = (sys.executable, "-P")  # -P: the working folder, where a trainer.py may lie, is not searched for modules
RLVR = (*PYTHON, "-m", "rlvr_monitor")


def child_environment() -> dict[str, str]:
    """The environment of a child started with PYTHON: ours, plus the path of a checkout that is not installed.

    An installed package is found without help. Its folder must not go onto PYTHONPATH, because that is searched before
    the standard library.
    """
    environment = dict(os.environ)
    if HOME.name not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOME), environment.get("PYTHONPATH")]))
    return environment
