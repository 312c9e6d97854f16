"""Carries out what an alert asks for: a checkpoint, the end of the run, an older policy, or other settings.

Steps are judged here a second time, in the training thread, so that an action acts at the end of the very step whose
row made the alert fire, whatever the recorder's writer is busy with. That costs about a millisecond a step. A run with
actions is therefore as reproducible as one without.

`parts.config` stays the configuration that the run was launched with; `parts.updater.config` is what is in force.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from monitor.alerts import actions as wanted
from monitor.alerts.engine import AlertEngine
from monitor.recorder import Recorder
from monitor.records import Alert, StepRecord
from trainer.compare.arms import arm_config, parse_arm
from trainer.config import ConfigError, TrainConfig
from trainer.runtime.action_state import ActionState, Change
from trainer.runtime.build import Parts
from trainer.runtime.checkpoint import Checkpoints

_log = logging.getLogger("rlvr.trainer")


class StoppedByAlert(Exception):
    """An alert's action ends the run. The message says which alert."""


class Actions:
    """Takes the actions of a run. All ranks call `after`; rank 0 judges, and all do what it decides.

    engine: an engine of its own, at the same step as the recorder's. tell: gets a sentence for each action taken.
    """

    def __init__(
        self,
        actions: Sequence[wanted.Action],
        state: ActionState,
        engine: AlertEngine,
        parts: Parts,
        recorder: Recorder,
        checkpoints: Checkpoints,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.actions, self.state, self.engine = tuple(actions), state, engine
        self.parts, self.recorder, self.checkpoints, self.tell = parts, recorder, checkpoints, tell
        self._put_in_force()

    def after(self, record: StepRecord) -> None:
        """Judges a finished step and takes what its alerts ask for. Raises StoppedByAlert, and nothing else."""
        ranks, alerts = self.parts.ranks, []
        if ranks.rank == 0:
            try:
                alerts = self.engine.observe(record.step, {key: float(v) for key, v in record.scalars.items()})
            except Exception as error:  # monitoring must not take training down
                self._failed("judging", error, record.step)
        if ranks.any(bool(alerts)):
            self.take(ranks.share(alerts))

    def take(self, alerts: Sequence[Alert]) -> None:
        """Takes the actions that want these transitions, in the order in which they are listed."""
        state, stop = self.state, None
        for alert in alerts:
            episode = (alert.rule, alert.first_step)
            if alert.state == "resolved":
                state.amiss = [other for other in state.amiss if other != episode]
                self._undo(alert)
            elif alert.severity != "info" and episode not in state.amiss:
                state.amiss.append(episode)
            if alert.state != "firing":
                continue
            for number, action in enumerate(self.actions):
                taken = state.taken.get(str(number), 0)
                if not action.wants_alert(alert) or taken >= action.times:
                    continue
                if isinstance(action, wanted.Stop):  # last, so that a checkpoint comes before it
                    stop, state.taken[str(number)] = alert, taken + 1
                elif self._take(action, alert):
                    state.taken[str(number)] = taken + 1
        if stop is not None:
            self.checkpoints.now(stop.step)
            message = f"stop for {stop.rule} ({stop.severity}): {stop.message}"
            self._note("action", message, stop.step)
            raise StoppedByAlert(f"Step {stop.step}: {message}")

    def _take(self, action: wanted.Action, alert: Alert) -> bool:
        """Takes one action. False, with an event, if it could not be taken: it may be at the next alert."""
        try:
            if isinstance(action, wanted.Checkpoint):
                if not self.checkpoints.now(alert.step):
                    return False
                did = f"step {alert.step} is saved"
            elif isinstance(action, wanted.GoBack):
                did = self._go_back()
            else:
                did = self._intervene(action, alert)
        except Exception as error:  # an action must not take training down
            self._failed(f"{action.do} for {alert.rule}", error, alert.step)
            return False
        self._say("action", f"{action.do} for {alert.rule} ({alert.severity}): {did}.", alert.step)
        return True

    def _go_back(self) -> str:
        good = self.state.good
        if good is None:
            raise ConfigError("no checkpoint from before it could be saved.")
        self.checkpoints.restore_policy(good)
        self._put_in_force()  # the checkpoint's learning rate may be another
        return f"the policy is that of step {good} again"

    def _intervene(self, action: wanted.Action, alert: Alert) -> str:
        config = self.parts.updater.config
        baseline = self.parts.ranks.share(self.engine.baseline)
        settings = changed_settings(action, config, baseline)
        temporary = isinstance(action, wanted.Intervention) and action.until == "resolved"
        self.state.changes.append(Change(alert.rule, alert.first_step, action.do, settings, temporary))
        self._put_in_force()
        return _told(settings, config) + (" until it ends" if temporary else "")

    def _undo(self, alert: Alert) -> None:
        undone = [
            change
            for change in self.state.changes
            if (change.rule, change.first_step) == (alert.rule, alert.first_step) and change.temporary
        ]
        if undone:
            config = self.parts.updater.config
            self.state.changes = [change for change in self.state.changes if change not in undone]
            self._put_in_force()
            now = _values(self.parts.updater.config, [key for change in undone for key in change.settings])
            names = ", ".join(change.do for change in undone)
            self._say("action_undone", f"{names} ended with {alert.rule}: {_told(now, config)}.", alert.step)

    def _put_in_force(self) -> None:
        """The launched configuration with all changes, oldest first: where two name one setting, the newer holds."""
        config = self.parts.config
        for change in self.state.changes:
            config = with_settings(config, change.settings)
        self.parts.updater.change(config)

    def _note(self, kind: str, message: str, step: int) -> None:
        if self.parts.ranks.rank == 0:  # all ranks do the same
            self.recorder.event(kind, message, step)

    def _say(self, kind: str, message: str, step: int) -> None:
        self._note(kind, message, step)
        self.tell(f"Step {step}: {message}")

    def _failed(self, what: str, error: Exception, step: int) -> None:
        message = f"{what} was not possible: {error} Training goes on."
        _log.error(message)
        self._note("action_error", message, step)


def check_actions(actions: Sequence[wanted.Action], config: TrainConfig) -> None:
    """Raises ConfigError for an action that could not work in a run of this configuration."""
    for number, action in enumerate(actions, 1):
        if isinstance(action, wanted.Intervention):
            try:
                with_settings(config, changed_settings(action, config, 1.0))
            except ConfigError as error:
                raise ConfigError(f"actions {number}, {action.do}: {error}") from None
        elif isinstance(action, wanted.Checkpoint | wanted.GoBack) and not config.checkpoint.every:
            lacking = "is ever saved" if isinstance(action, wanted.Checkpoint) else "is there to go back to"
            raise ConfigError(
                f"actions {number}, {action.do}: checkpoint.every is 0, so no checkpoint {lacking}. Set it to 1 "
                "or more, or leave the action out."
            )


def changed_settings(action: wanted.Action, config: TrainConfig, baseline: float) -> dict[str, Any]:
    """{dotted option: new value} of an intervention on the configuration in force. baseline: mean entropy, nats.

    Raises ConfigError if the intervention cannot work there.
    """
    loss, temperature = config.loss, config.rollout.temperature
    match action:
        case wanted.LowerLr():
            return {"optim.lr": config.optim.lr / action.factor}
        case wanted.RaiseTemperature():
            if loss.entropy_target is not None and loss.entropy_actuator == "temperature":
                raise ConfigError("the entropy control sets the temperature (loss.entropy_target). Leave one out.")
            if temperature >= action.most:
                raise ConfigError(f"the temperature is {temperature:.3g}, and most is {action.most:.3g}. Raise most.")
            return {"rollout.temperature": min(temperature * action.factor, action.most)}
        case wanted.ClipHigher():
            if config.optim.epochs == config.optim.mini_batches == 1:
                raise ConfigError(
                    "each step has one update, in which no ratio is clipped. Set optim.epochs or optim.mini_batches "
                    "above 1, or leave the action out."
                )
            if action.clip_high <= loss.clip_high:
                raise ConfigError(f"clip_high is {action.clip_high:.3g}, but loss.clip_high is {loss.clip_high:.3g}.")
            return {"loss.clip_high": action.clip_high}
        case wanted.HoldEntropy():
            if loss.entropy_target is not None:
                raise ConfigError("loss.entropy_target is set, so entropy is held already. Leave the action out.")
            if not math.isfinite(baseline):
                raise ConfigError("the baseline entropy is not known yet.")
            coefficient = max(loss.entropy_coef, 0.0)
            return {"loss.entropy_target": action.share * baseline, "loss.entropy_coef": coefficient}
        case wanted.SwitchWeighting():
            weighting = arm_config(config, parse_arm(action.weighting)).weighting
            return {"weighting": weighting.model_dump() | {"warmup_steps": 0}}
    raise ConfigError(f"{action.do} changes no settings.")


def with_settings(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """The configuration with dotted options changed. Raises ConfigError. Example: {"optim.lr": 1e-4}."""
    tree: dict[str, Any] = config.model_dump()
    for key, value in settings.items():
        group, dot, name = key.partition(".")
        if dot:
            tree[group] = tree[group] | {name: value}
        else:
            tree[key] = value
    return TrainConfig(**tree)


def _values(config: TrainConfig, keys: Sequence[str]) -> dict[str, Any]:
    tree = config.model_dump()
    found = {}
    for key in keys:
        group, dot, name = key.partition(".")
        found[key] = tree[group][name] if dot else tree[key]
    return found


def _told(settings: Mapping[str, Any], before: TrainConfig) -> str:
    """'optim.lr 0.0003 -> 0.0001'; settings that stay as they are are left out."""
    old = _values(before, list(settings))
    pairs = [(key, _short(old[key]), _short(value)) for key, value in settings.items()]
    return ", ".join(f"{key} {was} -> {now}" for key, was, now in pairs if was != now)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        own = [f"{k}={_short(v)}" for k, v in value.items() if k not in ("kind", "warmup_steps", "normalise")]
        return ":".join([str(value["kind"]), ",".join(own)] if own else [str(value["kind"])])
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)
