"""The module `wandb` as training code uses it, which records into a store: `import rlvr_monitor.wandb as wandb`.

Known names of scalars get the keys of METRICS as in `rlvr check`; others keep their own. The store is RLVR_STORE, else
the folder "runs". What W&B does beyond recording is left out: calls of it do nothing, and an event of the run says so
once.
"""

from __future__ import annotations

import argparse
import atexit
import enum
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monitor.integrations.judging import exit_status
from monitor.integrations.like_wandb import stubs
from monitor.integrations.like_wandb.run import Config, Run, new_id, run_with
from monitor.integrations.like_wandb.stubs import CommError, Error, Nothing, Settings, UsageError
from monitor.integrations.like_wandb.values import Histogram, Table
from monitor.store.runs import free_name, safe_name

__version__ = "0.31.0"  # whose names these are
MODES = ("online", "offline", "shared", "disabled")
run: Run | None = None


class AlertLevel(enum.Enum):
    """As wandb.AlertLevel."""

    INFO = "INFO"
    WARN = "WARN"
    ERROR = "ERROR"


def init(
    entity: str | None = None,
    project: str | None = None,
    dir: str | os.PathLike[str] | None = None,
    id: str | None = None,
    name: str | None = None,
    notes: str | None = None,
    tags: Any = None,
    config: Any = None,
    config_exclude_keys: Any = None,
    config_include_keys: Any = None,
    allow_val_change: bool | None = None,
    group: str | None = None,
    job_type: str | None = None,
    mode: str | None = None,
    force: bool | None = None,
    anonymous: str | None = None,
    reinit: bool | str | None = None,
    resume: bool | str | None = None,
    resume_from: str | None = None,
    fork_from: str | None = None,
    save_code: bool | None = None,
    tensorboard: bool | None = None,
    sync_tensorboard: bool | None = None,
    monitor_gym: bool | None = None,
    settings: Any = None,
) -> Run:
    """As wandb.init. The run of the store is called `name`, else as WANDB_NAME, `id` or the project say.

    A name that the store has gets -2 behind it. resume, with the id (or else the name) of a run that was recorded
    here: "allow", "auto" and True go on with it, "must" insists, "never" refuses. mode or WANDB_MODE "disabled"
    records nothing; all others record. Raises StoreError with the first row if the store cannot be written, UsageError
    for a resume that cannot be.
    """
    global run
    env, found = os.environ, _settings(settings)
    if run is not None and not run._finished:
        if reinit in (None, False, "default", "return_previous"):
            if config:
                run.config.update(config)
            return run
        if reinit != "create_new":
            run.finish()
    mode = mode or found.get("mode") or env.get("WANDB_MODE") or "online"
    if mode not in MODES:
        raise UsageError(f"mode is {mode!r}, expected one of {', '.join(MODES)}.")
    id = id or found.get("run_id") or env.get("WANDB_RUN_ID")
    project = project or found.get("project") or env.get("WANDB_PROJECT") or "uncategorized"
    name = env.get("RLVR_RUN") or name or found.get("run_name") or env.get("WANDB_NAME") or id
    store, wanted = Path(env.get("RLVR_STORE") or "runs"), safe_name(name or f"{project}-{new_id()}")
    resume = env.get("WANDB_RESUME") if resume is None else resume
    known = None if mode == "disabled" else _recorded(store, id, name and wanted)
    if known is not None and resume == "never":
        raise UsageError(f"Run {id or name!r} exists in store {str(store)!r} and resume is 'never'.")
    if known is None and resume == "must":
        raise UsageError(f"Run {id or name!r} is not in store {str(store)!r} and resume is 'must'.")
    resumed = known is not None and resume in (True, "allow", "auto", "must")
    chosen = _chosen(config, config_include_keys, config_exclude_keys)
    run = Run(
        store,
        known if resumed and known is not None else wanted if mode == "disabled" else free_name(store, wanted),
        id=id or new_id(),
        project=project,
        entity=entity or env.get("WANDB_ENTITY") or "",
        group=group or env.get("WANDB_RUN_GROUP") or "",
        job_type=job_type or env.get("WANDB_JOB_TYPE") or "",
        notes=notes or env.get("WANDB_NOTES") or "",
        tags=[tags] if isinstance(tags, str) else tags or (),
        config=chosen,
        mode=mode,
        resumed=resumed,
        strict="RLVR_TAP" not in env,
    )
    atexit.register(_at_exit, run)
    return run


def _settings(settings: Any) -> Mapping[str, Any]:
    found = settings if isinstance(settings, Mapping) else getattr(settings, "__dict__", {})
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _recorded(store: Path, id: str | None, name: str | None) -> str | None:
    """The run of the store with this id, or without an id the one of this name."""
    if id:
        return run_with(store, id)
    return name if name and free_name(store, name) != name else None


def _chosen(config: Any, include: Any, exclude: Any) -> dict[str, Any]:
    if isinstance(config, argparse.Namespace):
        config = vars(config)
    values = dict(Config(config))
    return {key: value for key, value in values.items()
            if (not include or key in include) and (not exclude or key not in exclude)}  # fmt: skip


def _at_exit(ending: Run) -> None:
    ending.end(exit_status(), at_exit=True)


def _active(what: str) -> Run:
    if run is None:
        raise Error(f"You must call wandb.init() before wandb.{what}()")
    return run


def log(data: Mapping[str, Any], step: int | None = None, commit: bool | None = None, sync: bool | None = None) -> None:
    """As wandb.log."""
    _active("log").log(data, step=step, commit=commit, sync=sync)


def define_metric(name: str, step_metric: Any = None, **settings: Any) -> Nothing:
    """As wandb.define_metric."""
    return _active("define_metric").define_metric(name, step_metric=step_metric, **settings)


def alert(title: str, text: str = "", level: Any = None, wait_duration: Any = None) -> None:
    """As wandb.alert: an event of the run."""
    _active("alert").alert(title, text, level, wait_duration)


def watch(models: Any = None, *args: Any, **kwargs: Any) -> list[Any]:
    """Gradients and parameters are not recorded; an event says so once."""
    _active("watch")._left_out_call("wandb.watch")
    return []


def unwatch(models: Any = None) -> None:
    """Nothing to do."""


def finish(exit_code: int | None = None, quiet: bool | None = None) -> None:
    """As wandb.finish; without a run it does nothing."""
    global run
    if run is not None:
        run.finish(exit_code=exit_code, quiet=quiet)
        run = None


teardown = finish


def login(*args: Any, **kwargs: Any) -> bool:
    """Nothing is sent anywhere, so there is nothing to log into."""
    return True


def setup(*args: Any, **kwargs: Any) -> Settings:
    """Nothing to set up."""
    return Settings()


def require(*args: Any, **kwargs: Any) -> None:
    """Nothing to require."""


def termlog(text: str = "", *args: Any, **kwargs: Any) -> None:
    """As wandb.termlog."""
    print(f"rlvr: {text}", file=sys.stderr)


termwarn = termerror = termlog


def _tell(name: str) -> None:
    if run is not None:
        run._left_out_call(name if name.startswith("wandb") else f"wandb.{name}")


api = Settings(api_key="none is needed: nothing is sent")  # OpenRLHF looks whether there is one
errors = stubs.module("wandb.errors", _tell, Error=Error, CommError=CommError, UsageError=UsageError)
util = stubs.module("wandb.util", _tell, generate_id=new_id)
SUBMODULES = {  # what `import wandb.x.y` finds
    "errors": errors,
    "util": util,
    **{
        name: stubs.module(f"wandb.{name}", _tell)
        for name in ("plot", "apis", "apis.public", "integration", "sdk.data_types", "sdk.interface", "env")
    },
    "data_types": stubs.module("wandb.data_types", _tell, Histogram=Histogram, Table=Table),
    "sdk": stubs.module("wandb.sdk", _tell),
    "sdk.wandb_run": stubs.module("wandb.sdk.wandb_run", _tell, Run=Run),
    "sdk.wandb_config": stubs.module("wandb.sdk.wandb_config", _tell, Config=Config),
    "sdk.lib": stubs.module("wandb.sdk.lib", _tell),
    "sdk.lib.runid": stubs.module("wandb.sdk.lib.runid", _tell, generate_id=new_id),
    "sdk.lib.config_util": stubs.module("wandb.sdk.lib.config_util", _tell, ConfigError=stubs.ConfigError),
}
_NO_RUN = Config()


def __getattr__(name: str) -> Any:
    if name == "config":
        return _NO_RUN if run is None else run.config
    if name == "summary":
        return {} if run is None else run.summary
    if name in SUBMODULES:
        return SUBMODULES[name]
    if name.startswith("__"):
        raise AttributeError(f"module 'wandb' has no attribute {name!r}")
    return Nothing(f"wandb.{name}", _tell)
