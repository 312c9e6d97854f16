"""The public names of rlvr-monitor: record a training run, judge its entropy, ask its store.

Recording
    Recorder            writes the steps of a run into a store; never raises into the training loop
    RunInfo             what a run is: name, model, task, weighting, seed, configuration
    StepRecord          the scalars and histograms of one step
    Histogram           counts on fixed cells, which add over steps and ranks
    TokenTable          the tokens of one step with their entropy, deviation and weight
    SampleTable         the rollouts of one step with their texts, rewards and advantages
    METRICS             the table of all metrics: unit, label, help, histogram cells

Judging
    AlertEngine         the alert rules on a live run: give it to the Recorder
    evaluate_alerts     the alerts that the rules raise on a recorded series
    verdict             one sentence on a series so far, with the evidence of each clause

Watching another trainer
    attach              records a trainer of TRL, judges it, weights its loss
    init                records and judges a training loop of your own: init(run=...), then .step(...) once a step

Asking
    open_store          opens a store for SQL queries, also while runs write into it

Measuring, where torch is installed
    token_signals       entropy, Renyi-2 and deviation of each response token, from the logits
    deviation_cap       the largest deviation possible with a number of alive rollouts
    signal_statistics   the sums and histograms of one step's signals
    step_record         the StepRecord and TokenTable of one step's signals

Each name is imported when it is first used, so `import rlvr_monitor` costs milliseconds and loads neither torch nor
numpy. docs/api.md shows each with its signature. The packages `monitor`, `trainer` and `dashboard` behind these names
may change; the names here stay.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlvr_monitor.shadowing import require_own

if TYPE_CHECKING:  # the same names for type checkers and editors
    from monitor.alerts.engine import AlertEngine
    from monitor.alerts.replay import evaluate_alerts, verdict
    from monitor.integrations.loop import init
    from monitor.integrations.trl import attach
    from monitor.metrics import METRICS
    from monitor.recorder import Recorder
    from monitor.records import Histogram, RunInfo, SampleTable, StepRecord, TokenTable
    from monitor.signals import deviation_cap, token_signals
    from monitor.signals.stats import signal_statistics, step_record
    from monitor.store.reader import open_store

__all__ = [
    "METRICS",
    "AlertEngine",
    "Histogram",
    "Recorder",
    "RunInfo",
    "SampleTable",
    "StepRecord",
    "TokenTable",
    "attach",
    "deviation_cap",
    "evaluate_alerts",
    "init",
    "open_store",
    "signal_statistics",
    "step_record",
    "token_signals",
    "verdict",
]
_MODULES = {
    "METRICS": "monitor.metrics",
    "AlertEngine": "monitor.alerts.engine",
    "Histogram": "monitor.records",
    "Recorder": "monitor.recorder",
    "RunInfo": "monitor.records",
    "SampleTable": "monitor.records",
    "StepRecord": "monitor.records",
    "TokenTable": "monitor.records",
    "attach": "monitor.integrations.trl",
    "deviation_cap": "monitor.signals",
    "evaluate_alerts": "monitor.alerts.replay",
    "init": "monitor.integrations.loop",
    "open_store": "monitor.store.reader",
    "signal_statistics": "monitor.signals.stats",
    "step_record": "monitor.signals.stats",
    "token_signals": "monitor.signals",
    "verdict": "monitor.alerts.replay",
}

require_own("monitor")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used. Raises MissingPackageError if it needs torch and torch is missing."""
    if name not in _MODULES:
        raise AttributeError(f"module 'rlvr_monitor' has no attribute {name!r}. Its names: {', '.join(__all__)}.")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
