"""Checkpoints hold all that a run needs to continue as if it had never stopped. A rename publishes each one whole.

    STORE/checkpoints/RUN/step-00000050/
      parameters.safetensors   trained parameters by name, float32
      optimizer.safetensors    AdamW moments, "<parameter>/<moment>"; of 8-bit ones also the scales of their blocks
      rng-r000.safetensors     states of a rank's generators: sampler, weighting, torch's own
      state.json               step, prompt cursor, alert rules, actions, entropy control, optimizer's parameter groups,
                               and the CRC-32 of all this

A folder appears under its final name only when all of it is durable, and only after the store holds every step up to
it. So a resumed run may repeat steps but never leaves a gap. On a CPU the resumed run is bit-identical to one that
never stopped, if the reward function has no state of its own. Another number of processes may go on, sharded or not,
with random numbers of its own.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from monitor.alerts.engine import AlertEngine
from monitor.errors import MonitorError
from monitor.recorder import Recorder
from monitor.records import StepRecord
from monitor.store.segments import fsync_folder
from trainer.config import CheckpointConfig
from trainer.learning.optimizers import load_moments_8bit, moment_shapes, moments_8bit
from trainer.runtime.action_state import ActionState
from trainer.runtime.build import Parts
from trainer.runtime.disk import attempt
from trainer.runtime.ranks import whole

_log = logging.getLogger("rlvr.trainer")
_FORMAT = 2
_FIRST_FORMAT = 1  # without a CRC
_WAIT_S = 30.0  # how long a checkpoint waits for the recorder
# what reading a damaged checkpoint raises
_UNUSABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError)
_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)


class CheckpointError(MonitorError):
    """A checkpoint cannot be read, or does not fit the run."""


def checkpoint_folder(store: str | Path, run: str) -> Path:
    return Path(store) / "checkpoints" / run


def checkpoints_of(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.name[5:].isdigit())


class Checkpoints:
    """Writes a run's checkpoints every `config.every` steps and at the last one, and keeps the newest `config.keep`.

    The last one at which no alert was pending or firing is kept too. All ranks call `after` and `finish`. Rank 0
    writes, the others add their generators. In the background (`config.background`) a step waits only until its state
    is copied to the host's memory; the checkpoint is there some steps later, and one is written at a time. engine: the
    alert engine of rank 0. actions: what the run's actions have done.
    """

    def __init__(
        self,
        folder: Path,
        parts: Parts,
        recorder: Recorder,
        engine: AlertEngine,
        config: CheckpointConfig,
        actions: ActionState,
    ) -> None:
        self.folder, self.parts, self.recorder, self.engine, self.config = folder, parts, recorder, engine, config
        self.actions = actions
        self._newest = -1
        self._pending: _Writing | None = None
        on_gpu = parts.policy.device.type == "cuda"
        self._background = config.background == "always" or (config.background == "auto" and on_gpu)

    def after(self, record: StepRecord) -> None:
        """Saves if a checkpoint is due after this step and there is none yet."""
        every, step, last = self.config.every, record.step, self.parts.config.steps
        if self._pending is not None and not self.parts.ranks.any(self._pending.thread.is_alive()):
            self.finish()
        due = every and step and (step % every == 0 or step == last)
        if not due or step == self._newest:
            return
        if self._background and step < last:
            self._tried(step, self._flush, self._start)
        else:
            self.now(step)

    def now(self, step: int) -> bool:
        """Saves a checkpoint. If the disk refuses, that is an event, False is returned and training goes on."""
        return self._tried(step, self._flush, self.save)

    def finish(self) -> None:
        """Waits for a checkpoint that is being written, and publishes it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.thread.join()
            self._tried(pending.step, lambda _: self._published(pending))

    def _flush(self, step: int) -> None:
        """Waits until the store holds the step on all ranks. Raises OSError."""
        if self.parts.ranks.any(not self.recorder.flush(_WAIT_S)):
            raise OSError(f"the recorder has not written step {step} within {_WAIT_S:.0f} s")

    def _tried(self, step: int, *parts: Callable[[int], Path | None]) -> bool:
        """Takes the parts of saving a step; the last one returns the checkpoint, or None where it is only begun."""
        try:
            saved = [part(step) for part in parts][-1]
            self._newest = step
            if saved is not None and self.parts.ranks.rank == 0:
                self.recorder.event("checkpoint", f"Saved as {saved}.", step)
            return True
        except OSError as error:
            message = f"No checkpoint at step {step} in {self.folder}: {error}. Training goes on, the next is tried."
            _log.error(message)
            self.recorder.event("checkpoint_error", message, step)
            return False

    def restore_policy(self, step: int) -> None:
        """Takes weights, optimizer and entropy control from the checkpoint of `step`; nothing else goes back.

        Raises OSError on all ranks if one of them cannot read it.
        """
        self.finish()
        path, saved, reason = self.folder / f"step-{step:08d}", None, "another rank cannot read it"
        try:
            saved = _Saved.read(path, self.parts)
        except _UNUSABLE as error:
            reason = f"{type(error).__name__}: {error}"
        if self.parts.ranks.any(saved is None) or saved is None:
            raise OSError(f"the checkpoint {path} cannot be used: {reason}.")
        saved.load_policy(self.parts)

    def save(self, step: int) -> Path:
        """Writes the checkpoint of `step`. Raises OSError, and then leaves no partial one under its final name."""
        self.finish()
        writing = self._begun(step)
        writing.run()
        return self._published(writing)

    def _start(self, step: int) -> None:
        self.finish()
        self._pending = self._begun(step)
        self._pending.thread.start()

    def _begun(self, step: int) -> _Writing:
        """The state of `step`, copied, and an empty folder for it. Raises OSError."""
        before = self.actions.good
        self.actions.good = before if self.actions.amiss else step
        half, ranks = self.folder / f"step-{step:08d}.tmp", self.parts.ranks
        trained, optimizer = _gathered(self.parts, copied=self._background)
        files, state = {f"rng-r{ranks.rank:03d}": _rng_states(self.parts)}, None
        if ranks.rank == 0:
            moments = {f"{of}/{key}": value for of, held in optimizer["state"].items() for key, value in held.items()}
            files |= {"parameters": trained, "optimizer": {name: value.contiguous() for name, value in moments.items()}}
            state = _state(step, self.parts, self.engine, self.actions, optimizer["param_groups"])
        error = attempt(lambda: _emptied(half)) if ranks.rank == 0 else None
        if ranks.any(error is not None):
            self.actions.good = before
            raise error or OSError("rank 0 could not make the folder")
        return _Writing(step, half, files, state, before)

    def _published(self, writing: _Writing) -> Path:
        """Gives what all ranks have written its final name. Raises OSError."""
        ranks, error, half = self.parts.ranks, writing.error, writing.folder
        final = half.with_name(half.name.removesuffix(".tmp"))
        failed = ranks.any(error is not None)
        if ranks.rank == 0 and not failed:
            error = attempt(lambda: self._publish(half, final))
        if ranks.any(error is not None) or failed:
            shutil.rmtree(half, ignore_errors=True)
            if self.actions.good == writing.step:
                self.actions.good = writing.good_before
            raise error or OSError("another rank could not write its part")
        return final

    def _publish(self, half: Path, final: Path) -> None:
        fsync_folder(half)
        shutil.rmtree(final, ignore_errors=True)  # a resumed run may reach this step a second time
        os.replace(half, final)
        fsync_folder(self.folder)
        for old in checkpoints_of(self.folder)[: -self.config.keep]:
            if self.actions.good is not None and old.name == f"step-{self.actions.good:08d}":
                continue
            gone = old.rename(old.with_name(f"{old.name}.tmp"))  # renamed first, so that nobody sees it half deleted
            shutil.rmtree(gone, ignore_errors=True)


def resume(folder: Path, parts: Parts, engine: AlertEngine, actions: ActionState) -> int:
    """Loads into the parts the newest checkpoint that all ranks can read; returns its step, or 0 without checkpoints.

    Raises CheckpointError if there are checkpoints and none can be used.
    """
    found = checkpoints_of(folder)
    for path in reversed(found):
        saved = None
        try:
            saved = _Saved.read(path, parts)
        except _UNUSABLE as error:
            _log.warning(
                "Checkpoint %s cannot be used: %s: %s. Trying an older one.", path, type(error).__name__, error
            )
        if not parts.ranks.any(saved is None) and saved is not None:
            return saved.load_into(parts, engine, actions)
    if found:
        raise CheckpointError(
            f"None of the {len(found)} checkpoints in {str(folder)!r} can be used. Remove that folder to start the run "
            "anew from its first step."
        )
    return 0


class _Writing:
    """What a rank writes of one checkpoint, by `run` or by its thread. error: why it could not, once that has ended."""

    def __init__(
        self,
        step: int,
        folder: Path,
        files: dict[str, dict[str, Tensor]],
        state: dict[str, Any] | None,
        good_before: int | None,
    ) -> None:
        self.step, self.folder, self._files, self._state, self.good_before = step, folder, files, state, good_before
        self.error: OSError | None = None
        self.thread = threading.Thread(target=self.run, name="checkpoint", daemon=True)

    def run(self) -> None:
        try:
            self.error = attempt(self._write)
        except Exception as error:  # in a thread nobody else would see it
            self.error = OSError(f"{type(error).__name__}: {error}")
        self._files = {}  # their memory

    def _write(self) -> None:
        for name, tensors in self._files.items():
            _save(tensors, self.folder / f"{name}.safetensors")
        if self._state is not None:
            with (self.folder / "state.json").open("w", encoding="utf-8") as file:
                json.dump(self._state, file)
                file.flush()
                os.fsync(file.fileno())


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _gathered(parts: Parts, copied: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trained parameters and optimizer state, whole, on the CPU. All ranks must call this where they are sharded.

    copied: not the tensors that training changes, as they would be on a CPU.
    """

    def host(tensor: Tensor) -> Tensor:
        found = tensor.cpu().contiguous()
        return found.clone() if copied and found.data_ptr() == tensor.data_ptr() else found

    trained = {name: host(whole(p.detach())) for name, p in parts.policy.trained().items()}
    if not parts.updater.optimizer.state:  # before the first update; asking torch for it would make a step of zeros
        return trained, {"state": {}, "param_groups": []}
    if parts.config.optim.kind == "adamw_8bit":
        kept = moments_8bit(parts.updater.optimizer, parts.policy.trained())
        held = {name: {key: host(value) for key, value in of.items()} for name, of in kept.items()}
        return trained, {"state": held, "param_groups": []}
    optimizer = cast(
        dict[str, Any], get_optimizer_state_dict(parts.policy.model, parts.updater.optimizer, options=_OPTIONS)
    )
    if copied and parts.policy.device.type == "cpu":
        held = optimizer.get("state", {})  # rank 0 alone has it where it is sharded
        optimizer["state"] = {name: {key: value.clone() for key, value in of.items()} for name, of in held.items()}
    return trained, optimizer


def _state(step: int, parts: Parts, engine: AlertEngine, actions: ActionState, groups: list[Any]) -> dict[str, Any]:
    """state.json, a copy of all that it is made of."""
    state = {
        "format": _FORMAT,
        "step": step,
        "stream": parts.stream.state_dict(),
        "alerts": engine.state_dict(),
        "actions": actions.state_dict(),
        "control": parts.updater.control.state_dict(),
        "ranks": parts.ranks.world,
        "param_groups": groups,
    }
    return cast(dict[str, Any], json.loads(json.dumps(state | {"crc32": _crc32_of(state)})))


def _crc32_of(state: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(state).encode())


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_shapes(what: str, found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless both have the same names, and under each the same shape."""
    if odd := sorted(name for name, _ in _shapes(found).items() ^ expected.items()):
        raise ValueError(f"its {what}: {len(set(odd))} differ, the first is {odd[0]!r}")


@dataclass(frozen=True, slots=True)
class _Saved:
    """A checkpoint in memory, already checked against the run, so that loading it cannot fail on one rank alone."""

    state: dict[str, Any]
    trained: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    rng: dict[str, Tensor] | None  # None: another number of processes saved it

    @classmethod
    def read(cls, folder: Path, parts: Parts) -> _Saved:
        """Reads a checkpoint. Raises one of _UNUSABLE if it is damaged or no fit."""
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["format"] not in (_FIRST_FORMAT, _FORMAT):
            raise ValueError(f"its format is {state['format']}, expected {_FORMAT}")
        if state["format"] == _FORMAT and state.pop("crc32") != _crc32_of(state):
            raise ValueError("its state.json is not as it was written")
        parts.stream.check(state["stream"])
        trained = load_file(folder / "parameters.safetensors")
        parameters = parts.policy.trained()
        _check_shapes("parameters are not the model's", trained, _shapes(parameters))
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in load_file(folder / "optimizer.safetensors").items():
            name, _, moment = key.rpartition("/")
            moments.setdefault(name, {})[moment] = value
        for moment in {moment for of in moments.values() for moment in of} - {"step"}:
            found = {name: of[moment] for name, of in moments.items() if moment in of}
            known = {name: parameters[name] for name in moments if name in parameters}
            _check_shapes("optimizer's state is not the model's", found, moment_shapes(moment, known))
        rng = None
        if state["ranks"] == parts.ranks.world:
            rng = load_file(folder / f"rng-r{parts.ranks.rank:03d}.safetensors")
            _check_shapes("generators are not the run's", rng, _shapes(_rng_states(parts)))
        return cls(state, trained, moments, rng)

    def load_into(self, parts: Parts, engine: AlertEngine, actions: ActionState) -> int:
        self.load_policy(parts)
        parts.stream.load_state_dict(self.state["stream"])
        engine.load_state_dict(self.state["alerts"])
        actions.load_state_dict(self.state.get("actions", {}))
        step = int(self.state["step"])
        if self.rng is None:
            _log.warning(
                "The checkpoint of step %d was saved by %d processes and %d go on: they draw new random numbers.",
                step,
                self.state["ranks"],
                parts.ranks.world,
            )
            seed = parts.config.seed + 7_919 * parts.ranks.rank + 1_000_003 * step
            for generator in _generators(parts).values():
                generator.manual_seed(seed)
            torch.manual_seed(seed)
            return step
        for name, generator in _generators(parts).items():
            generator.set_state(self.rng[name])
        torch.set_rng_state(self.rng["torch"])
        return step

    @torch.no_grad()
    def load_policy(self, parts: Parts) -> None:
        """Weights, optimizer and entropy control."""
        for name, parameter in parts.policy.trained().items():
            value = self.trained[name].to(parameter.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)
        optimizer: dict[str, Any] = {"state": self.moments, "param_groups": self.state["param_groups"]}
        if not self.moments:
            parts.updater.optimizer.state.clear()
        elif parts.config.optim.kind == "adamw_8bit":
            load_moments_8bit(parts.updater.optimizer, parts.policy.trained(), self.moments)
        else:
            set_optimizer_state_dict(parts.policy.model, parts.updater.optimizer, optimizer, options=_OPTIONS)
        parts.updater.control.load_state_dict(self.state["control"])


def _generators(parts: Parts) -> dict[str, torch.Generator]:
    return {"sampler": parts.generator, "weighting": parts.updater.weight_generator}


def _rng_states(parts: Parts) -> dict[str, Tensor]:
    states = {name: generator.get_state() for name, generator in _generators(parts).items()}
    return {**states, "torch": torch.get_rng_state()}
