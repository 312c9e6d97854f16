"""Alerts for damage in a run: rules, the engine that runs them live, and their replay."""

from monitor.alerts.engine import AlertEngine
from monitor.alerts.judgement import Clause, Verdict
from monitor.alerts.replay import evaluate_alerts, fired, replay, verdict
from monitor.alerts.rules import DEFAULT_RULES, RULES, Finding, Rule
from monitor.alerts.window import Window

__all__ = [
    "DEFAULT_RULES",
    "RULES",
    "AlertEngine",
    "Clause",
    "Finding",
    "Rule",
    "Verdict",
    "Window",
    "evaluate_alerts",
    "fired",
    "replay",
    "verdict",
]
