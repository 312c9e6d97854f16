"""The `rlvr` command, also as `python -m rlvr_monitor`. Importing it checks first that `monitor` is this one's."""

from __future__ import annotations

import sys

from monitor.cli import main

if __name__ == "__main__":
    sys.exit(main())
