"""Command lines: each command is a function, whose signature and docstring are its options and its --help."""

from __future__ import annotations

import sys
from collections.abc import Callable

import tyro

from monitor.errors import MonitorError


def call(function: Callable[..., int], argv: list[str], name: str) -> int:
    """Calls `function` with the arguments in `argv` and returns its exit code.

    Parameters before `/` are positional, the others options; a bool is a flag. The docstring's first paragraph and its
    `Args:` are the help text. --help ends the process with 0, wrong options with
    2. A MonitorError becomes one line and 2.
    """
    try:
        return tyro.cli(function, args=argv, prog=f"rlvr {name}", config=(tyro.conf.FlagCreatePairsOff,))
    except MonitorError as error:
        print(f"rlvr {name}: {error}", file=sys.stderr)
        return 2
