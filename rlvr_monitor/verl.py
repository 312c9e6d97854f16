"""What the entry point `verl.plugins` names: verl imports it by itself, and `trainer.logger` may then hold "rlvr"."""

from __future__ import annotations

from rlvr_monitor.shadowing import require_own

require_own("monitor")

from monitor.integrations.verl import install  # noqa: E402

install()
