"""The logger `rlvr` of verl's Tracking: its scalars, and the tokens of the batch that they are of."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monitor.by_name import resolve
from monitor.errors import MonitorError
from monitor.integrations.judging import alert_settings, exit_status, installed, judged_recorder
from monitor.integrations.like_wandb.names import STEPS, Names
from monitor.integrations.like_wandb.values import flat, number
from monitor.integrations.loop.measure import Measure
from monitor.integrations.verl.weights import check_weighting
from monitor.integrations.weighted import Weighting
from monitor.records import RunInfo, StepRecord
from monitor.store.runs import free_name, safe_name

PACKAGES = ("rlvr-monitor", "verl", "torch", "transformers", "vllm", "sglang", "ray")
OPTIONS = ("store", "run", "resume", "alerts", "correct_at", "weighting")
_log = logging.getLogger("rlvr.monitor")


class Backend:
    """Records what verl logs. Its options stand under trainer.rlvr of verl's configuration:

    store: folder of the store, else RLVR_STORE, else "runs". run: name of the run, else the experiment's, with -2
    behind it if the store has it. resume: go on with that run. alerts: path of an alerts file, or false. correct_at: a
    rollout whose score reaches this is correct (1.0). weighting: as `rlvr compare` names arms, e.g.
    "top_entropy:keep=0.2".

    Raises MonitorError if the run cannot be opened, an option is unknown or a weighting cannot act; afterwards nothing
    raises into training.
    """

    def __init__(self, project: str, experiment: str, config: Mapping[str, Any] | None = None) -> None:
        config = dict(config or {})
        trainer = dict(config.get("trainer") or {})
        options = dict(trainer.get("rlvr") or {})
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            raise MonitorError(f"trainer.rlvr has {', '.join(unknown)}, expected some of {', '.join(OPTIONS)}.")
        store = Path(options.get("store") or os.environ.get("RLVR_STORE") or "runs")
        resume = bool(options.get("resume", False))
        name = options.get("run") or safe_name(experiment)
        correct_at = float(options.get("correct_at", 1.0))
        model = _at(config, "actor_rollout_ref", "model", "path")
        seed = _at(config, "actor_rollout_ref", "actor", "data_loader_seed") or _at(config, "data", "seed")
        actor = _at(config, "actor_rollout_ref", "actor") or {}
        self.loss_mean = str(actor.get("loss_agg_mode", "token-mean"))
        self.weighting: Weighting | None = None
        text = options.get("weighting")
        if text is not None:
            check_weighting(str(text), actor, config.get("algorithm") or {})
            self.weighting = resolve("trainer.learning.attached:AttachedWeighting")(
                str(text), seed if isinstance(seed, int) else 0, 0, with_distributions=False
            )
        info = RunInfo(
            name=name if resume or options.get("run") else free_name(store, name),
            model=str(model or ""),
            task=str(project),
            seed=seed if isinstance(seed, int) else 0,
            weighting="uniform" if self.weighting is None else self.weighting.kind,
            warmup_steps=0 if self.weighting is None else self.weighting.warmup_steps,
            config={
                "verl": config,
                **({} if self.weighting is None else {"weighting": self.weighting.settings()}),
            },
            environment={"packages": installed(PACKAGES), "verl": {"project": project, "experiment": experiment}},
        )
        alerts = options.get("alerts", True)
        self.recorder = judged_recorder(store, info, settings=alert_settings(alerts), resume=resume)
        self._names = Names(lambda text: self.recorder.event("name", text))
        self._correct_at = correct_at
        self._measure: Measure | None = None
        self._batch: dict[str, Any] | None = None
        self._told: set[str] = set()
        self._ended = False
        self.temperature = number(_at(config, "actor_rollout_ref", "rollout", "temperature")) or 1.0
        atexit.register(self._at_exit)

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """As verl calls it: a step's scalars. The tokens that `take` got since the last call are of the same step."""
        try:
            batch, self._batch = self._batch, None
            scalars = self._scalars(data)
            made = None if batch is None else self._measured(batch, step)
            if made is None:
                self.recorder.record(StepRecord(int(step), scalars))
                return
            record, tokens, samples = made
            # what is measured here goes before verl's own figure, whose mean may be another one
            self.recorder.record(
                StepRecord(int(step), {**scalars, **record.scalars}, record.histograms), tokens, samples
            )
        except Exception as error:
            self.fault(error, step)

    def take(self, batch: Mapping[str, Any], decode: Any) -> None:
        """The rollouts of a step, as arguments of `Monitor.step`; decode: the tokenizer's."""
        self._batch = dict(batch)
        if self._measure is None:
            self._measure = Measure(self._correct_at, decode, self.recorder.event)

    def fault(self, error: Exception, step: int | None = None) -> None:
        """An event of each different fault, once."""
        text = f"{type(error).__name__}: {error}"
        _log.warning("verl's step could not be recorded as a whole: %s", text)
        if text not in self._told:
            self._told.add(text)
            self.recorder.event("verl_error", text, step)

    def finish(self, exit_code: int = 0) -> None:
        """Ends the run; a second call does nothing, not even while Python takes its modules apart."""
        if not self._ended:
            self._ended = True
            atexit.unregister(self._at_exit)
            self.recorder.close("failed" if exit_code else "finished")

    def _measured(self, batch: Mapping[str, Any], step: int) -> Any:
        assert self._measure is not None
        try:
            record, tokens, samples = self._measure(int(step), batch, self.temperature, {}, False)
        except Exception as error:
            self.fault(error, step)
            return None
        known = {**record.scalars, "temperature": self.temperature}
        known.pop("perf/memory_gib", None)  # of the driver, which is not where the policy is
        return StepRecord(record.step, known, record.histograms), tokens, samples

    def _scalars(self, data: Mapping[str, Any]) -> dict[str, float]:
        found = {name: value for name, raw in flat(data).items() if (value := number(raw)) is not None}
        found = {name: value for name, value in found.items() if name not in STEPS}
        self._names.see(found)
        return {key: value for name, value in found.items() if (key := self._names[name]) is not None}

    def _at_exit(self) -> None:
        self._ended = True
        self.recorder.close(exit_status())


def _at(config: Mapping[str, Any], *path: str) -> Any:
    """The value at a path of nested mappings, or None."""
    found: Any = config
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
