"""The real wandb with our ears in it: what its runs log is recorded here too."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from monitor.integrations import like_wandb
from monitor.integrations.like_wandb.run import Run

_log = logging.getLogger("rlvr.monitor")
_told: set[str] = set()


def listen(real: Any) -> None:
    """Wraps `init` of the real module, and log, alert, define_metric and finish of its runs. Our faults stay here."""
    from wandb.sdk.wandb_run import Run as RealRun

    ours: dict[str, Run] = {}  # by the id of the real run

    def opened(theirs: Any) -> Run | None:
        if theirs is None or getattr(theirs, "disabled", False):
            return None
        if theirs.id not in ours:
            like_wandb.run = None  # one of ours for each of theirs, also where several live at once
            ours[theirs.id] = like_wandb.init(
                id=theirs.id,
                project=theirs.project,
                entity=theirs.entity,
                name=theirs.name or theirs.id,
                group=theirs.group,
                job_type=theirs.job_type,
                config=dict(theirs.config),
                mode="online",
                resume="allow",
            )
        return ours[theirs.id]

    init = real.init

    @functools.wraps(init)
    def both(*args: Any, **kwargs: Any) -> Any:
        theirs = init(*args, **kwargs)
        _guarded(lambda: opened(theirs))
        return theirs

    real.init = both

    def wrap(name: str, act: Callable[..., Any]) -> None:
        original = getattr(RealRun, name)

        @functools.wraps(original)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            _guarded(lambda: act(self, *args, **kwargs))
            return original(self, *args, **kwargs)

        setattr(RealRun, name, wrapped)

    def log(theirs: Any, data: Any, step: Any = None, commit: Any = None, sync: Any = None) -> None:
        mine = opened(theirs)
        if mine is not None:
            if mine._recorder is None:  # the configuration may have grown since
                mine.config.update(dict(theirs.config))
            mine.log(data, step=step, commit=commit)

    def finish(theirs: Any, exit_code: Any = None, quiet: Any = None) -> None:
        mine = ours.pop(theirs.id, None)
        if mine is not None:
            mine.finish(exit_code)

    def alert(theirs: Any, *args: Any, **kwargs: Any) -> None:
        if (mine := opened(theirs)) is not None:
            mine.alert(*args, **kwargs)

    def define(theirs: Any, *args: Any, **kwargs: Any) -> None:
        if (mine := opened(theirs)) is not None:
            mine.define_metric(*args, **kwargs)

    for name, act in (("log", log), ("finish", finish), ("alert", alert), ("define_metric", define)):
        wrap(name, act)


def _guarded(work: Callable[[], Any]) -> None:
    try:
        work()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if text not in _told:
            _told.add(text)
            print(f"rlvr tap: {text} wandb goes on.", file=sys.stderr)
