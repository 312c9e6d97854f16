"""Checkpoints: all that a run needs to go on as if it had never stopped, published by one rename.

    STORE/checkpoints/RUN/step-00000050/
      parameters.safetensors   trained parameters by name, float32
      optimizer.safetensors    AdamW moments, "<parameter>/<moment>"
      rng.safetensors          states of the samplers' generators and of torch's own
      state.json               step, prompt cursor, alert rules, optimizer's parameter groups

A folder appears under its final name only when all of it is durable, and only after every step up to it is durable in
the store: a resumed run repeats steps but never leaves a gap. On a CPU the resumed run is bit-identical to one that
never stopped, if the reward function has no state of its own.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from monitor.alerts.engine import AlertEngine
from monitor.errors import MonitorError
from monitor.recorder import Recorder
from monitor.store.segments import fsync_folder
from trainer.config import CheckpointConfig
from trainer.setup import Parts

_log = logging.getLogger("rlvr.trainer")
_FORMAT = 1
_WAIT_S = 30.0  # for the recorder, before a checkpoint
_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)


class CheckpointError(MonitorError):
    """A checkpoint that cannot be read or does not fit the run."""


def checkpoint_folder(store: str | Path, run: str) -> Path:
    return Path(store) / "checkpoints" / run


def checkpoints_of(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.name[5:].isdigit())


class Checkpoints:
    """Writes a run's checkpoints every `config.every` steps and at the last one, and keeps the newest `config.keep`."""

    def __init__(
        self, folder: Path, parts: Parts, recorder: Recorder, engine: AlertEngine, config: CheckpointConfig
    ) -> None:
        self.folder, self.parts, self.recorder, self.engine, self.config = folder, parts, recorder, engine, config

    def after(self, step: int) -> None:
        """Saves if a checkpoint is due after this step. A disk that refuses is an event; training goes on."""
        every = self.config.every
        if not every or (step % every and step != self.parts.config.steps):
            return
        try:
            if not self.recorder.flush(_WAIT_S):
                raise OSError(f"the recorder has not written step {step} within {_WAIT_S:.0f} s")
            self.save(step)
        except OSError as error:
            message = f"No checkpoint at step {step}: {error}."
            _log.error(message)
            self.recorder.event("checkpoint_error", message, step)

    def save(self, step: int) -> Path:
        """Writes the checkpoint of `step`. Raises OSError and leaves no half of one under its final name."""
        final = self.folder / f"step-{step:08d}"
        half = final.with_name(f"{final.name}.tmp")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        try:
            _write(half, step, self.parts, self.engine)
            shutil.rmtree(final, ignore_errors=True)  # a resumed run may come by again
            os.replace(half, final)
        except BaseException:
            shutil.rmtree(half, ignore_errors=True)
            raise
        fsync_folder(self.folder)
        for old in checkpoints_of(self.folder)[: -self.config.keep]:
            gone = old.rename(old.with_name(f"{old.name}.tmp"))  # never seen half deleted
            shutil.rmtree(gone, ignore_errors=True)
        return final


def resume(folder: Path, parts: Parts, engine: AlertEngine) -> int:
    """Loads the newest readable checkpoint into the parts; returns its step, 0 if there is none at all.

    Raises CheckpointError if there are some and none can be used.
    """
    found = checkpoints_of(folder)
    for path in reversed(found):
        try:
            return _read(path, parts, engine)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            _log.warning(
                "Checkpoint %s cannot be used: %s: %s. Trying an older one.", path, type(error).__name__, error
            )
    if found:
        raise CheckpointError(
            f"None of the {len(found)} checkpoints in {str(folder)!r} can be used. Remove that folder to start the run "
            "anew from its first step."
        )
    return 0


def _write(folder: Path, step: int, parts: Parts, engine: AlertEngine) -> None:
    optimizer: dict[str, Any] = get_optimizer_state_dict(parts.policy.model, parts.updater.optimizer, options=_OPTIONS)
    moments = {f"{name}/{key}": value for name, state in optimizer["state"].items() for key, value in state.items()}
    state = {
        "format": _FORMAT,
        "step": step,
        "stream": parts.stream.state_dict(),
        "alerts": engine.state_dict(),
        "param_groups": optimizer["param_groups"],
    }
    save_file(_trained(parts), folder / "parameters.safetensors")
    save_file({name: value.contiguous() for name, value in moments.items()}, folder / "optimizer.safetensors")
    save_file(_rng_states(parts), folder / "rng.safetensors")
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    fsync_folder(folder)


def _read(folder: Path, parts: Parts, engine: AlertEngine) -> int:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["format"] != _FORMAT:
        raise ValueError(f"its format is {state['format']}, expected {_FORMAT}")
    trained, rng = load_file(folder / "parameters.safetensors"), load_file(folder / "rng.safetensors")
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        name, _, moment = key.rpartition("/")
        moments.setdefault(name, {})[moment] = value
    _load_trained(parts, trained)
    optimizer: dict[str, Any] = {"state": moments, "param_groups": state["param_groups"]}
    set_optimizer_state_dict(parts.policy.model, parts.updater.optimizer, optimizer, options=_OPTIONS)
    parts.stream.load_state_dict(state["stream"])
    engine.load_state_dict(state["alerts"])
    for name, generator in _generators(parts).items():
        generator.set_state(rng[name])
    torch.set_rng_state(rng["torch"])
    return int(state["step"])


def _trained(parts: Parts) -> dict[str, Tensor]:
    parameters = parts.policy.model.named_parameters()  # names tied weights once
    return {name: p.detach().cpu().contiguous() for name, p in parameters if p.requires_grad}


@torch.no_grad()
def _load_trained(parts: Parts, saved: Mapping[str, Tensor]) -> None:
    parameters = {name: p for name, p in parts.policy.model.named_parameters() if p.requires_grad}
    if parameters.keys() != saved.keys():
        odd = sorted(parameters.keys() ^ saved.keys())
        raise ValueError(f"its parameters are not the model's: {len(odd)} differ, the first is {odd[0]!r}")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def _generators(parts: Parts) -> dict[str, torch.Generator]:
    return {"sampler": parts.generator, "weighting": parts.updater.weight_generator}


def _rng_states(parts: Parts) -> dict[str, Any]:
    states = {name: generator.get_state() for name, generator in _generators(parts).items()}
    return {**states, "torch": torch.get_rng_state()}
