"""Reward functions in processes of their own, with a time limit: one answer that hangs or crashes stops no training."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as TookTooLong
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from trainer.rewards.checking import RewardFunction, checked_rewards
from trainer.rewards.loading import TASK, load_reward
from trainer.tasks import make_task

_log = logging.getLogger("rlvr.trainer")
_functions: dict[str, RewardFunction] = {}  # of this worker


class RewardWorkers:
    """Processes that compute rewards. They end with this object, and with the process that made them, however it ends.

    A function is called with the completions of one prompt at a time, and that call may take `seconds`. If it takes
    longer, or ends its process, the worker is replaced, and the function is called again with each of these completions
    alone. A completion for which that fails has no reward, None, and is counted.
    """

    def __init__(self, task: str, targets: Sequence[str], workers: int, seconds: float) -> None:
        """task: its name. targets: the functions, as "task" or "package.module:function"."""
        self.seconds = seconds
        self.lost = 0  # rewards that failed, of all calls
        self._pool = ProcessPool(
            workers, initializer=_load, initargs=(task, tuple(targets)), context=get_context("spawn")
        )
        weakref.finalize(self, _end, self._pool)

    def rewards(
        self,
        target: str,
        /,  # a task may have a column called target
        *,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        **columns: list[Any],
    ) -> list[float | None]:
        """What `checked_rewards` gives for the function. Raises RewardError if the function raises."""
        table: dict[str, list[Any]] = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            **columns,
        }
        changes = [row for row in range(1, len(prompts)) if prompts[row] != prompts[row - 1]]
        spans = list(pairwise([0, *changes, len(prompts)])) if prompts else []
        found: list[float | None] = [None] * len(prompts)
        alone = self._filled(found, [(span, self._call(target, table, *span)) for span in spans])
        rows = [(row, row + 1) for start, stop in alone for row in range(start, stop) if stop - start > 1]
        failed = self._filled(found, [(span, self._call(target, table, *span)) for span in rows])
        failed += [span for span in alone if span[1] - span[0] == 1]
        if failed and not self.lost:
            _log.warning(
                "Reward function %s took more than %g s, or ended its process, for a completion that begins with %r. "
                "Such a completion has no reward; reward_timeout_share counts them.",
                target,
                self.seconds,
                completions[failed[0][0]][:200],
            )
        self.lost += len(failed)
        return found

    def _call(self, target: str, table: Mapping[str, list[Any]], start: int, stop: int) -> ProcessFuture:
        arguments = {name: values[start:stop] for name, values in table.items()}
        return self._pool.schedule(partial(_rewards, target), kwargs=arguments, timeout=self.seconds)

    def _filled(
        self, found: list[float | None], calls: list[tuple[tuple[int, int], ProcessFuture]]
    ) -> list[tuple[int, int]]:
        """Puts the results of calls in place. The spans of those that took too long or ended their process."""
        late = []
        for (start, stop), future in calls:
            try:
                found[start:stop] = future.result()
            except (TookTooLong, ProcessExpired):
                late.append((start, stop))
        return late


def _end(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _load(task: str, targets: tuple[str, ...]) -> None:
    for target in targets:
        _functions[target] = make_task(task).reward if target == TASK else load_reward(target)


def _rewards(target: str, /, **arguments: Any) -> list[float | None]:
    return checked_rewards(_functions[target], **arguments)
