"""Per-token signals, device histograms and step statistics: the only torch code of `monitor`."""

# ruff: noqa: E402
from monitor.extras import require

require("monitor.signals", ["torch"], "torch")  # first, because the imports below would fail with less to say

from monitor.signals.definition import deviation_cap
from monitor.signals.dispatch import token_signals
from monitor.signals.types import TokenSignals

__all__ = ["TokenSignals", "deviation_cap", "token_signals"]
