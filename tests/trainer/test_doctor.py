"""`rlvr doctor`: what is here, what is missing and for what, and a disk that refuses."""

from __future__ import annotations

import importlib.util
import json
import os

import torch

from trainer.commands import doctor as module
from trainer.commands.doctor import main


def told(capsys) -> dict[tuple[str, str], dict]:
    return {(each["part"], each["what"]): each for each in json.loads(capsys.readouterr().out)["findings"]}


def test_a_machine_that_can_train(tmp_path, capsys):
    assert main([str(tmp_path / "not" / "yet"), "--json"]) == 0
    found = told(capsys)
    assert found["versions", "torch"]["found"] == torch.__version__
    assert (
        found["training", "torch, transformers"]["fine"]
        and found["rollout.backend generate", "torch, transformers"]["fine"]
    )
    assert found["disk", "free"]["found"].endswith(str(tmp_path)) and found["disk", "write"]["found"].endswith("MB/s")
    assert not list(tmp_path.iterdir())  # the file that was written is gone, and no store was made
    if not torch.cuda.is_available():
        assert "no CUDA device" in found["device", "cpu"]["found"]
        assert found["rollout.backend vllm", "vllm"]["fine"] is (importlib.util.find_spec("vllm") is not None)
        assert "slower than generate on a CPU" in found["rollout.backend paged", "transformers"]["found"]
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("rlvr train can run here.\n")


def test_without_torch_it_says_what_to_install_and_ends_with_1(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in ("torch", "peft") else find(name))
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert 'training, torch, transformers: type: pip install "rlvr-monitor[train]"' in out
    assert out.endswith("rlvr train cannot run here.\n") and "rollout.backend" not in out


def test_what_vllm_lacks_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("monitor.extras._installed", lambda name: name != "vllm")
    monkeypatch.setattr("trainer.rollout.vllm_engine.version", lambda: None)
    assert main([str(tmp_path), "--json"]) == 0  # one part needs it, training does not
    found = told(capsys)["rollout.backend vllm", "vllm"]
    assert (found["found"], found["fine"]) == ("missing", False)
    assert 'pip install "rlvr-monitor[vllm]"' in found["cure"]
    monkeypatch.setattr("monitor.extras._installed", lambda name: True)
    monkeypatch.setattr("trainer.rollout.vllm_engine.version", lambda: "0.27.0")
    assert main([str(tmp_path), "--json"]) == 0
    found = told(capsys)["rollout.backend vllm", "vllm"]
    assert (found["found"], found["fine"]) == ("0.27.0", False) and "expected 0.28 or later" in found["cure"]


def test_a_disk_that_refuses_and_a_slow_one(tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(module.tempfile, "NamedTemporaryFile", refuse)
        assert main([str(tmp_path), "--json"]) == 1
        found = told(capsys)["disk", "write"]
        assert found["found"] == "Read-only file system" and "give another --store" in found["cure"]
    fsync, clock = os.fsync, [0.0]

    def slow(number):
        clock[0] += 8.0
        fsync(number)

    monkeypatch.setattr(module.os, "fsync", slow)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    assert main([str(tmp_path), "--json"]) == 0  # told, but nothing that training needs
    found = told(capsys)
    assert found["disk", "write"]["found"] == "8 MB/s" and found["disk", "write"]["fine"] is False  # 67.1 MB in 8 s
    assert found["disk", "fsync"]["found"] == "8000.0 ms (median of 9)" and not found["disk", "fsync"]["fine"]
