"""The `rlvr` command, also as `python -m rlvr_monitor`. Importing the package has checked that `monitor` is ours."""

from __future__ import annotations

import runpy


def main() -> int:
    from monitor.cli import main as rlvr

    return rlvr()


if __name__ == "__main__":
    runpy.run_module("monitor.cli", run_name="__main__", alter_sys=True)  # which takes the working folder off the path
