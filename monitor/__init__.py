"""rlvr-monitor: records, stores and judges RLVR training. Names below are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Recorder": "monitor.recorder",
    "open_store": "monitor.store.reader",
    "list_runs": "monitor.store.runs",
    "RunInfo": "monitor.records",
    "StepRecord": "monitor.records",
    "Histogram": "monitor.records",
    "TokenTable": "monitor.records",
    "SampleTable": "monitor.records",
    "Alert": "monitor.records",
    "METRICS": "monitor.metrics",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `rlvr --help` needs no numpy."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'monitor' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
