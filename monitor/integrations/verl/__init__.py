"""verl's plugin: a logger `rlvr` for `trainer.logger`. verl loads this module by its entry point, in every process."""

from __future__ import annotations

import functools
import sys
from typing import Any

NAME = "rlvr"
TRAINERS = {  # classes whose methods are listened to, once such a logger exists
    "verl.trainer.ppo.ray_trainer": "RayPPOTrainer",
    "verl.trainer.ppo.v1.trainer_base": "PPOTrainer",
}


def install() -> None:
    """Teaches verl's Tracking the name. Nothing else is imported before a run asks for it."""
    from verl.utils.tracking import Tracking

    if NAME in Tracking.supported_backend:
        return
    Tracking.supported_backend = [*Tracking.supported_backend, NAME]
    start, finish = Tracking.__init__, Tracking.finish

    @functools.wraps(start)
    def started(
        self: Any, project_name: str, experiment_name: str, default_backend: Any = "console", config: Any = None
    ) -> None:
        start(self, project_name, experiment_name, default_backend, config)
        if NAME in ([default_backend] if isinstance(default_backend, str) else default_backend):
            from monitor.integrations.verl.backend import Backend
            from monitor.integrations.verl.listening import listen

            self.logger[NAME] = Backend(project_name, experiment_name, config)
            for module, name in TRAINERS.items():
                if module in sys.modules:  # the trainer that has just made this Tracking
                    listen(getattr(sys.modules[module], name), self.logger[NAME])

    @functools.wraps(finish)
    def finished(self: Any, exit_code: int = 0) -> None:
        ours = getattr(self, "logger", {}).get(NAME)
        finish(self, exit_code)
        if ours is not None:
            ours.finish(exit_code)

    Tracking.__init__, Tracking.finish = started, finished
