"""The dashboard's server process: `python -m dashboard.serve HOST PORT [NAME...]`, started by dashboard.launch.

Streamlit serves static files only from the folder of its main script, and an installed package may be read-only. So the
main script is a two-line file in a temporary folder, beside the scripts that the charts load.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from importlib.resources import files
from pathlib import Path

from dashboard.components.chart import chart_code
from dashboard.settings import flags

MAIN = "from dashboard.app import main\n\nmain()\n"
PLOTLY = "plotly.min.js"


def make_app_folder(folder: Path) -> Path:
    """Writes the main script and its static files; returns the script's path."""
    static = folder / "static"
    static.mkdir()
    with (files("plotly") / "package_data" / PLOTLY).open("rb") as source, open(static / PLOTLY, "wb") as target:
        shutil.copyfileobj(source, target)
    (static / "chart.js").write_text(chart_code(), encoding="utf-8")
    script = folder / "rlvr_dashboard.py"
    script.write_text(MAIN)
    return script


def _die_with_parent(folder: Path) -> None:
    """Ends this process when the launcher ends, in whatever way: our standard input then closes."""

    def wait() -> None:
        while sys.stdin.buffer.read(1):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)

    threading.Thread(target=wait, daemon=True, name="parent-watch").start()


def _read_ahead() -> None:
    """Loads the pages' code and reads the store while the browser still loads the frame of the page."""

    def read() -> None:
        import dashboard.app  # noqa: F401
        from dashboard import data

        data.poll()

    threading.Thread(target=read, daemon=True, name="read-ahead").start()


def main(argv: list[str]) -> None:
    """Serves until it is interrupted or terminated, or its launcher has ended."""
    from streamlit.web import cli

    host, port, *names = argv
    with tempfile.TemporaryDirectory(prefix="rlvr-dashboard-") as folder:
        script = make_app_folder(Path(folder))
        _die_with_parent(Path(folder))
        _read_ahead()
        cli.main(["run", str(script), *flags(host, int(port), names)], standalone_mode=False)


if __name__ == "__main__":
    main(sys.argv[1:])
