"""Run, Config and Summary with the shape of wandb's, which record into a store."""

from __future__ import annotations

import json
import logging
import os
import secrets
import string
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from monitor.errors import MonitorError, StoreError
from monitor.integrations.judging import alert_settings, installed, judged_recorder
from monitor.integrations.like_wandb.rows import Rows
from monitor.integrations.like_wandb.stubs import Nothing, UsageError
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store.runs import free_name, read_info, run_names, safe_name
from monitor.store.schema import run_dir

PACKAGES = ("rlvr-monitor", "torch", "transformers", "trl", "verl", "openrlhf", "vllm", "accelerate")
_log = logging.getLogger("rlvr.monitor")
_LETTERS = string.ascii_lowercase + string.digits


def new_id() -> str:
    """Eight letters and digits."""
    return "".join(secrets.choice(_LETTERS) for _ in range(8))


class Config(dict[str, Any]):
    """As wandb.config: a dict whose keys are attributes too. changed: gets what was set."""

    def __init__(self, values: Any = None, changed: Callable[[dict[str, Any]], None] | None = None) -> None:
        super().__init__(plain_dict(values))
        self.__dict__["_changed"] = changed

    def update(  # type: ignore[override]
        self, values: Any = None, allow_val_change: bool | None = None, **more: Any
    ) -> None:
        """Of a dict, a namespace or an object with attributes. A key may change its value."""
        found = {**plain_dict(values), **more}
        super().update(found)
        self._tell(found)

    def setdefaults(self, values: Any) -> None:
        self.update({key: value for key, value in plain_dict(values).items() if key not in self})

    def as_dict(self) -> dict[str, Any]:
        return dict(self)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # a copy is no run's configuration

    def persist(self) -> None:
        """Nothing to do: it is recorded when the run is opened, and changes are events."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._tell({key: value})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"config has no key {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def _tell(self, found: dict[str, Any]) -> None:
        if self.__dict__["_changed"] is not None and found:
            self.__dict__["_changed"](found)


class Summary(dict[str, Any]):
    """As run.summary: the newest value of each name, and what the caller sets. own: the names that the caller set."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["own"] = dict[str, None]()

    def update(self, values: Any = None, **more: Any) -> None:  # type: ignore[override]
        for key, value in {**plain_dict(values), **more}.items():
            self[key] = value

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def logged(self, values: Mapping[str, Any]) -> None:
        super().update({key: value for key, value in values.items() if key not in self.own})

    def __setitem__(self, key: str, value: Any) -> None:
        self.own[key] = None
        super().__setitem__(key, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"summary has no key {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def plain_dict(values: Any) -> dict[str, Any]:
    """Of None, a mapping, or the attributes of an object such as argparse's namespace."""
    if values is None or isinstance(values, str):
        return {}
    found = values if isinstance(values, Mapping) else getattr(values, "__dict__", {})
    return {str(key): value for key, value in found.items()}


class Run:
    """As wandb's Run. Its run of the store is opened with the first row, so that the configuration is complete.

    mode "disabled" records nothing. strict: what cannot be opened raises StoreError; else a line says so and nothing is
    recorded.
    """

    def __init__(
        self,
        store: Path,
        name: str,
        *,
        id: str,
        project: str = "",
        entity: str = "",
        group: str = "",
        job_type: str = "",
        notes: str = "",
        tags: Iterable[str] = (),
        config: Any = None,
        mode: str = "online",
        resumed: bool = False,
        strict: bool = True,
    ) -> None:
        self.id, self.project, self.entity, self.group, self.job_type = id, project, entity, group, job_type
        self.notes, self.tags, self.mode, self.resumed = notes, tuple(tags), mode, resumed
        self.disabled, self.offline = mode == "disabled", mode == "offline"
        self.start_time, self.sweep_id, self.settings = time.time(), None, Nothing("run.settings", self._left_out_call)
        self.config, self.summary = Config(config, self._config_changed), Summary()
        self.step = _last_step(store, name) + 1 if resumed else 0
        self._store, self._name, self._strict = store, name, strict
        self._recorder: Recorder | None = None
        self._finished = False
        self._row: dict[Any, Any] = {}
        self._told: set[str] = set()
        self._waiting: list[tuple[str, str]] = []  # events before the run is open
        self._owner = os.getpid()
        self._rows = Rows(self._opened, self._left_out_value)

    # --- what callers use

    @property
    def name(self) -> str:
        """Name of the run, in the store too. It may be set until the first row."""
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        if self._recorder is None:
            self._name = free_name(self._store, safe_name(name))

    @property
    def path(self) -> str:
        return "/".join(filter(None, (self.entity, self.project, self.id)))

    @property
    def url(self) -> str:
        """The run's folder as an address."""
        return run_dir(self._store, self._name).resolve().as_uri()

    @property
    def dir(self) -> str:
        """A folder for the caller's files, beside the store. It is made when it is first asked for."""
        folder = self._store.resolve().with_name(f"{self._store.resolve().name}.files") / self._name
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def project_name(self) -> str:
        return self.project

    def get_url(self) -> str:
        return self.url

    def log(
        self, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None, sync: bool | None = None
    ) -> None:
        """As wandb's: without `step` each call is a row; with one, rows of a step add up; steps must not go back."""
        if not isinstance(data, Mapping):
            raise ValueError(f"log was given {data!r:.80}, expected a dict of names and values.")
        if self.disabled or self._finished or os.getpid() != self._owner:
            return
        self.summary.logged({key: value for key, value in data.items() if isinstance(value, int | float | str)})
        if step is not None and step < self.step:
            self._event(
                "log_step", f"Step {step} was logged after step {self.step}: steps must not go back.", once=True
            )
            return
        self._row.update(data)
        if step is None and commit is False:
            return
        if step is not None:
            self.step = int(step)
        row, self._row = self._row, {}
        self._opened()
        self._rows.add(row, self.step, step)
        if commit or step is None:
            self.step += 1

    def define_metric(self, name: str, step_metric: Any = None, **settings: Any) -> Nothing:
        """Rows with such names have their step in `step_metric`. What else it may say of a chart is not needed here."""
        column = getattr(step_metric, "name", step_metric)
        self._rows.define(str(name), None if column is None else str(column))
        return Nothing("define_metric", lambda _: None)

    def alert(self, title: str, text: str = "", level: Any = None, wait_duration: Any = None) -> None:
        """Becomes an event of the run."""
        severity = getattr(level, "value", level) or "INFO"
        self._event("alert", f"{severity}: {title}{f': {text}' if text else ''}")

    def finish(self, exit_code: int | None = None, quiet: bool | None = None) -> None:
        """Records what waits and ends the run: finished, or failed if exit_code is not 0."""
        self.end("failed" if exit_code else "finished")

    def end(self, status: str, *, at_exit: bool = False) -> None:
        """Ends the run with this status. A second call does nothing. at_exit: nothing can be opened any more."""
        if self._finished or os.getpid() != self._owner:
            return
        if at_exit and self._recorder is None:
            self.disabled = True
        if self._row and not self.disabled:
            self._rows.add(self._row, self.step, None)
        self._rows.close()
        if not self.disabled:
            own = {key: self.summary[key] for key in self.summary.own}
            if own:
                self._event("summary", json.dumps(own, default=str))
            recorder = self._opened()
            if recorder is not None:
                recorder.close(status)
        self._finished = True

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.finish(0 if kind is None else 1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_rows", "_told"):
            raise AttributeError(name)
        return Nothing(f"run.{name}", self._left_out_call)

    def _label(self, **_: Any) -> None:
        """As transformers' callback calls it: what wrote the run."""

    # --- the run of the store

    def _opened(self) -> Recorder | None:
        if self._recorder is not None or self.disabled:
            return self._recorder
        seed = self.config.get("seed")
        model = next((self.config[key] for key in ("model_name_or_path", "_name_or_path") if self.config.get(key)), "")
        info = RunInfo(
            name=self._name,
            model=str(model),
            weighting="",  # calls of W&B do not tell it
            seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else 0,
            config=dict(self.config),
            environment={
                "packages": installed(PACKAGES),
                "wandb": {
                    "id": self.id, "project": self.project, "entity": self.entity, "group": self.group,
                    "job_type": self.job_type, "notes": self.notes, "tags": list(self.tags),
                },
            },
        )  # fmt: skip
        try:
            self._recorder = judged_recorder(self._store, info, settings=alert_settings(True), resume=self.resumed)
        except MonitorError as error:
            if self._strict:
                raise
            print(f"rlvr: {error} The run goes on and is not recorded.", file=sys.stderr)
            self.disabled = True
            return None
        for kind, text in self._waiting:
            self._recorder.event(kind, text)
        self._waiting = []
        return self._recorder

    def _event(self, kind: str, text: str, *, once: bool = False) -> None:
        if self.disabled or (once and text in self._told):
            return
        self._told.add(text)
        if self._recorder is None:
            self._waiting.append((kind, text))
        else:
            self._recorder.event(kind, text)

    def _config_changed(self, found: dict[str, Any]) -> None:
        if self._recorder is not None:
            self._event("config", json.dumps(found, default=str))

    def _left_out_value(self, name: str, kind: str) -> None:
        self._event("left_out", f"{name!r} is a {kind}: not recorded.", once=True)

    def _left_out_call(self, name: str) -> None:
        self._event("left_out", f"{name} does nothing here.", once=True)


def run_with(store: Path, id: str) -> str | None:
    """The run of the store that was recorded under this id of wandb, or None."""
    for name in run_names(store) if (store / "runs").is_dir() else ():
        info = read_info(run_dir(store, name) / "run.json") or {}
        about = (info.get("environment") or {}).get("wandb")
        if isinstance(about, dict) and about.get("id") == id:
            return name
    return None


def _last_step(store: Path, run: str) -> int:
    from monitor.store.reader import open_store

    with open_store(store) as opened:
        return int(opened.sql("SELECT coalesce(max(step), -1) FROM steps WHERE run = ?", [run]).rows[0][0])


__all__ = ["Config", "Run", "StoreError", "Summary", "UsageError", "new_id", "run_with"]
