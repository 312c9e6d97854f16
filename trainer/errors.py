"""Errors of training that a user can act on."""

from __future__ import annotations

from monitor.errors import MonitorError


class NonFiniteError(RuntimeError):
    """Logits, loss or gradient became NaN or infinite; training cannot go on from these weights."""


class ModelError(MonitorError):
    """A model that cannot be found or fetched."""


class RewardError(MonitorError):
    """A reward function cannot be loaded, has raised, or has returned something other than a list of rewards."""
