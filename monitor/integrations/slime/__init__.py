"""Log functions for slime and miles, which call them in the process that makes the rollouts, once a rollout step.

    --custom-rollout-log-function-path rlvr_monitor.slime.log_rollout_data
    --custom-eval-rollout-log-function-path rlvr_monitor.slime.log_eval_rollout_data

Both return False, so the trainer's own logging goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

_log = logging.getLogger("rlvr.monitor")


class _Process:
    """The run that this process records. It is opened by the first call; one that cannot be opened is tried once."""

    hook: Any = None  # monitor.integrations.slime.hook.Hook
    has_failed = False


def log_rollout_data(
    rollout_id: int,
    args: Any,
    samples: Sequence[Any],
    rollout_extra_metrics: Mapping[str, Any] | None,
    rollout_time: float,
) -> bool:
    """Record the rollouts of a step. Never raises; returns False, which leaves the trainer's own logging in place.

    rollout_id: its number, from 0. args: the trainer's arguments. samples: its Samples. rollout_time: seconds.
    """
    return _guarded(args, "rollouts", rollout_id, samples, rollout_extra_metrics, rollout_time)


def log_eval_rollout_data(
    rollout_id: int, args: Any, data: Mapping[str, Any], extra_metrics: Mapping[str, Any] | None = None
) -> bool:
    """Record an evaluation. Never raises; returns False, which leaves the trainer's own logging in place.

    data: {data set: {"rewards": [...], "truncated": [...], "samples": [...]}}.
    """
    return _guarded(args, "evaluation", rollout_id, data, extra_metrics)


def _guarded(args: Any, what: str, rollout_id: int, *given: Any) -> bool:
    if _Process.has_failed:
        return False
    try:
        if _Process.hook is None:
            from monitor.integrations.slime.hook import Hook

            _Process.hook = Hook(args)
        getattr(_Process.hook, what)(rollout_id, *given)
    except Exception as error:
        if _Process.hook is None:
            _Process.has_failed = True
            _log.warning("rlvr records nothing of this training: %s: %s", type(error).__name__, error)
        else:
            _Process.hook.fault(error, rollout_id)
    return False
