"""Command lines. A command is a function or has a dataclass of options; names, types and texts become its --help."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, TypeVar

import tyro

from monitor.errors import MonitorError

T = TypeVar("T")
StoreFolder = Annotated[str, tyro.conf.arg(metavar="[STORE]")]
RunName = Annotated[str, tyro.conf.arg(metavar="RUN")]
_ONE_WAY = (tyro.conf.FlagCreatePairsOff,)  # --json without a --no-json beside it


def call(function: Callable[..., int], argv: list[str], name: str) -> int:
    """Calls `function` with the arguments in `argv` and returns its exit code.

    Parameters before `/` are positional, the others options; a bool is a flag. The docstring's first paragraph and its
    `Args:` are the help text. --help ends the process with exit code 0, wrong options end it with 2. A MonitorError, or
    what the system refuses, is printed as one line, and the exit code is 2.
    """
    try:
        return tyro.cli(function, args=argv, prog=f"rlvr {name}", config=_ONE_WAY)
    except MonitorError as error:
        print(f"rlvr {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `rlvr ls | head`
        raise
    except OSError as error:
        print(f"rlvr {name}: {error}. Check that path and who may read and write it.", file=sys.stderr)
        return 2


def parse(options: type[T], argv: list[str], name: str, description: str | None = None) -> T:
    """The options in `argv` as an instance of the dataclass `options`. A field's comment is its help text."""
    return tyro.cli(options, args=argv, prog=f"rlvr {name}", description=description, config=_ONE_WAY)


def parse_known(options: type[T], argv: list[str], name: str, description: str | None = None) -> tuple[T, list[str]]:
    """Like `parse`, and the arguments that are not options of this command, in their order."""
    return tyro.cli(
        options, args=argv, prog=f"rlvr {name}", description=description, config=_ONE_WAY, return_unknown_args=True
    )


def column_map(text: str) -> dict[str, str]:
    """{key: column} of --map "key=column,key=column"; a column may hold "=", a key may not. Raises MonitorError."""
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, equals, column = (piece.strip() for piece in part.partition("="))
        if not (key and equals and column):
            raise MonitorError(f"--map has {part!r}, expected key=column, as in --map entropy=my/column,step=iteration")
        if key in found:
            raise MonitorError(f"--map names {key} twice: {found[key]} and {column}.")
        found[key] = column
    return found
