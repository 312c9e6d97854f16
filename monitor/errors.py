"""Errors a user can act on: the command line prints their text without a traceback and exits with 2."""

from __future__ import annotations


class MonitorError(Exception):
    """Wrong use or a store that cannot be used: the text says what is wrong, the value and what to do."""


class StoreError(MonitorError):
    """A store or run that cannot be opened, read or written."""


class UnknownRunError(StoreError):
    """A run name that the store does not hold."""


class MissingPackageError(MonitorError, ImportError):
    """A package that the thing asked for needs is not installed: the text holds the one line to type."""
