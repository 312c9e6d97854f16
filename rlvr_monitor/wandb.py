"""`import rlvr_monitor.wandb as wandb`: code that logs to wandb records into a store of rlvr-monitor instead.

The names are those of wandb 0.31: init, log, config, define_metric, summary, Histogram, Table, alert, watch, finish and
`run`. See docs/integrations.md for what is recorded of each, and `rlvr tap` for code that is not changed at all.
"""

from __future__ import annotations

import sys

from rlvr_monitor.shadowing import require_own

require_own("monitor")

from monitor.integrations import like_wandb  # noqa: E402

sys.modules[__name__] = like_wandb  # the module itself, so that `wandb.run` is always the newest
