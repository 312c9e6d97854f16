"""What a TRL trainer does when an alert fires: saves a checkpoint, lowers its learning rate, stops."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monitor.alerts.actions import Action, Checkpoint, Intervention, LowerLr, Stop
from monitor.alerts.engine import AlertEngine
from monitor.alerts.settings import DEFAULT_ACTIONS, AlertSettings, load_alerts
from monitor.integrations.trl.ranks import Ranks
from monitor.integrations.trl.weights import AttachError
from monitor.records import Alert

GUARD: tuple[Action, ...] = (Checkpoint(), LowerLr())  # guard=True: those of `rlvr train --guard` that TRL can take
POSSIBLE = (Checkpoint, Stop, LowerLr)
_log = logging.getLogger("rlvr.monitor")


def guard_settings(guard: bool | str | Path) -> AlertSettings:
    """Rules, routes and actions of attach's `guard`; without a guard no action. Raises AlertsError, AttachError."""
    if isinstance(guard, bool):
        return AlertSettings(actions=GUARD if guard else ())
    settings = load_alerts(guard)
    for number, action in enumerate(settings.actions, 1):
        if not isinstance(action, POSSIBLE):
            known = ", ".join(kind.model_fields["do"].default for kind in POSSIBLE)
            raise AttachError(
                f"{str(guard)!r}: actions {number}, {action.do}: a TRL trainer cannot take it. Possible are {known}. "
                "Leave the section out, or train with `rlvr train`."
            )
    actions = GUARD if settings.actions is DEFAULT_ACTIONS else settings.actions
    return AlertSettings(settings.rules, settings.routes, actions)


class Guard:
    """Takes the actions of a run, at the end of the step whose record made the alert fire.

    Rank 0 judges with an engine of its own; all ranks do what it decides. note: gets (kind, sentence, step) of each
    action, on rank 0.
    """

    def __init__(
        self,
        actions: Sequence[Action],
        engine: AlertEngine,
        trainer: Any,
        ranks: Ranks,
        note: Callable[[str, str, int], None],
    ) -> None:
        self._actions, self.engine, self._trainer, self._ranks, self._note = (
            tuple(actions),
            engine,
            trainer,
            ranks,
            note,
        )
        self._taken = [0] * len(self._actions)
        self._lowered: list[tuple[str, int, float]] = []  # (rule, first step, factor) that end with their alert

    def after(self, step: int, scalars: Mapping[str, float], control: Any) -> None:
        """Judges a finished step. All ranks must call it. control: transformers' TrainerControl."""
        alerts: list[Alert] = []
        if self._ranks.rank == 0:
            try:
                alerts = self.engine.observe(step, scalars)
            except Exception as error:  # the ranks wait for what this one says
                self._say("action_error", f"judging was not possible: {error} Training goes on.", step)
        for alert in self._ranks.share(alerts):
            self._take(alert, control)

    def _take(self, alert: Alert, control: Any) -> None:
        if alert.state == "resolved":
            self._undo(alert)
        if alert.state != "firing":
            return
        for number, action in enumerate(self._actions):
            if not action.wants_alert(alert) or self._taken[number] >= action.times:
                continue
            self._taken[number] += 1
            why = f"{action.do} for {alert.rule} ({alert.severity})"
            if isinstance(action, LowerLr):
                now = self._scale_lr(1 / action.factor)
                if action.until == "resolved":
                    self._lowered.append((alert.rule, alert.first_step, action.factor))
                told = f"learning rate {now * action.factor:.4g} -> {now:.4g}" + _until(action)
            elif isinstance(action, Checkpoint):
                control.should_save = True
                told = f"step {alert.step} is saved"
            else:
                control.should_save = control.should_training_stop = True
                told = alert.message.rstrip(".")
            self._say("action", f"{why}: {told}.", alert.step)

    def _undo(self, alert: Alert) -> None:
        for entry in [entry for entry in self._lowered if entry[:2] == (alert.rule, alert.first_step)]:
            self._lowered.remove(entry)
            now = self._scale_lr(entry[2])
            self._say(
                "action_undone", f"lower_lr ended with {alert.rule}: learning rate {now / entry[2]:.4g} -> {now:.4g}.",
                alert.step,
            )  # fmt: skip

    def _scale_lr(self, factor: float) -> float:
        """Multiplies the learning rate, now and of the whole schedule; returns the first group's."""
        for group in self._trainer.optimizer.param_groups:
            group["lr"] = group["lr"] * factor
            if "initial_lr" in group:
                group["initial_lr"] = group["initial_lr"] * factor
        scheduler = getattr(self._trainer.lr_scheduler, "scheduler", self._trainer.lr_scheduler)
        if hasattr(scheduler, "base_lrs"):  # what a schedule multiplies at each of its steps
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        if hasattr(scheduler, "_last_lr"):  # what the trainer logs as the next step's rate
            scheduler._last_lr = [group["lr"] for group in self._trainer.optimizer.param_groups]
        return float(self._trainer.optimizer.param_groups[0]["lr"])

    def _say(self, kind: str, message: str, step: int) -> None:
        if self._ranks.rank == 0:
            _log.warning("Step %d: %s", step, message)
            self._note(kind, message, step)


def _until(action: Intervention) -> str:
    return " until it ends" if action.until == "resolved" else ""
