"""Log functions for slime and miles, named by their arguments:

--custom-rollout-log-function-path rlvr_monitor.slime.log_rollout_data
--custom-eval-rollout-log-function-path rlvr_monitor.slime.log_eval_rollout_data
"""

from __future__ import annotations

from rlvr_monitor.shadowing import require_own

require_own("monitor")

from monitor.integrations.slime import log_eval_rollout_data, log_rollout_data  # noqa: E402

__all__ = ["log_eval_rollout_data", "log_rollout_data"]
