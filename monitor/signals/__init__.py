"""Per-token signals, device histograms and step statistics: the only torch code of `monitor`."""

from monitor.signals.definition import deviation_cap
from monitor.signals.dispatch import token_signals
from monitor.signals.types import TokenSignals

__all__ = ["TokenSignals", "deviation_cap", "token_signals"]
