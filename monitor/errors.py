"""Errors a user can act on: the command line prints their text without a traceback and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MonitorError(Exception):
    """Wrong use, or a store that cannot be used. The text says what is wrong, the value and what to do."""


class StoreError(MonitorError):
    """A store or run cannot be opened, read or written."""


class UnknownRunError(StoreError):
    """The store holds no run of that name."""


class MissingPackageError(MonitorError, ImportError):
    """A needed package is not installed. The text holds the one line to type."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with the closest known name, or '' if nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
