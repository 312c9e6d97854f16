"""What the vllm backend asks of vLLM and what it refuses, without vLLM: test_vllm.py runs the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from tiny import tiny_policy

import monitor.extras
from monitor.errors import MissingPackageError
from monitor.store.reader import open_store
from trainer.commands.train import main
from trainer.config import ConfigError, LoraConfig, RolloutConfig, TrainConfig
from trainer.errors import NonFiniteError
from trainer.policy.lora import merged_copy, merged_weights, with_adapters
from trainer.rollout import vllm_engine as module
from trainer.rollout.sampling import auto_backend, sample
from trainer.rollout.truncation import Truncation
from trainer.rollout.vllm_engine import cache_bytes, check_usable, sampling_settings
from trainer.runtime.ranks import Ranks


def test_sampling_parameters(policy):
    found = sampling_settings(policy, 24, 0.9, Truncation(top_k=5, top_p=0.8, min_p=0.1))
    assert found == {
        "max_tokens": 24, "temperature": 0.9, "top_k": 5, "top_p": 0.8, "min_p": 0.1,
        "stop_token_ids": policy.end_ids, "ignore_eos": True, "logprobs": 0, "detokenize": False,
    }  # fmt: skip
    policy.converse(RolloutConfig(stop=("12", 5)))
    stops = sampling_settings(policy, 24, 1.0, Truncation())
    assert stops["stop"] == ["12"] and stops["include_stop_str_in_output"] and stops["detokenize"]
    assert stops["skip_special_tokens"] is False and 5 in stops["stop_token_ids"]


def test_a_temperature_that_vllm_would_raise_is_refused(policy):
    with pytest.raises(ConfigError, match=r"temperature is 0\.005, but vLLM samples at 0\.01 or more"):
        sampling_settings(policy, 24, 0.005, Truncation())


def test_the_cache_of_whole_blocks():
    """2 (keys, values) x 2 heads x 16 x 4 bytes x 2 layers = 512 bytes a token; 33 tokens take 2 blocks of 32, and
    vLLM keeps one empty: (1 x 2 + 1) x 32 = 96 tokens. Of three rows (3 x 2 + 1) x 32 = 224."""
    shape = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=64, num_hidden_layers=2)
    assert cache_bytes(shape, 1, 33, 4) == 96 * 512
    assert cache_bytes(shape, 3, 64, 2) == 224 * 256


@pytest.mark.parametrize("tied", [False, True])
def test_pushed_weights_are_those_of_a_saved_policy(tied):
    model = tiny_policy(tied=tied).model
    plain = dict(merged_weights(model))
    assert plain.keys() == model.state_dict().keys()
    assert all(plain[name].data_ptr() == weight.data_ptr() for name, weight in model.state_dict().items())
    adapted = with_adapters(model, LoraConfig(rank=4, alpha=8))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    merged, expected = dict(merged_weights(adapted)), merged_copy(adapted).state_dict()
    assert merged.keys() == expected.keys() == plain.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(merged[name], weight)
    changed = "model.layers.1.mlp.down_proj.weight"
    assert not torch.allclose(merged[changed], plain[changed])


class Engine:
    """Stands for a vLLM engine: notes what it is told, and answers with what it is given."""

    def __init__(self, answers, columns=64):
        self.answers, self.columns, self.told = answers, columns, []

    def refresh(self):
        self.told.append("refresh")

    def release(self):
        self.told.append("release")

    def responses(self, prompts, settings, seeds):
        self.told.append((len(prompts), settings["temperature"], seeds))
        return self.answers


def draw(policy, seed=0, limit=4):
    return sample(
        policy, [[3], [4, 5]], max_new_tokens=limit, temperature=0.9, backend="vllm",
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def test_weights_are_pushed_before_each_sampling_and_memory_is_given_back_after_it(policy):
    end, pad = policy.end_ids[0], policy.pad_id
    engine = policy.sampler_copies["vllm"] = Engine([([7, end], [-0.5, -1.5]), ([8, 9, 10, 11], [-1.0] * 4)])
    rollouts = draw(policy)
    assert rollouts.input_ids.tolist() == [[pad, 3, 7, end, pad, pad], [4, 5, 8, 9, 10, 11]]
    assert rollouts.attention_mask.tolist() == [[0, 1, 1, 1, 0, 0], [1] * 6]
    assert rollouts.sampler_logprobs.tolist() == [[-0.5, -1.5, 0, 0], [-1.0] * 4]
    assert rollouts.truncated.tolist() == [False, True]
    draw(policy)
    draw(policy, seed=1)
    assert [each for each in engine.told if isinstance(each, str)] == ["refresh", "release"] * 3
    first, again, other = (each for each in engine.told if not isinstance(each, str))
    assert first == again and first[:2] == (2, 0.9) and first[2][0] != first[2][1]  # a seed for each row
    assert other[2] != first[2]
    engine.answers = [([7], [float("nan")]), ([8], [-1.0])]
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        draw(policy)
    with pytest.raises(ConfigError, match=r"may take 65 tokens, but the vLLM engine was started for 64"):
        draw(policy, limit=63)


@pytest.mark.parametrize("cuda", [True, False])
def test_on_cuda_the_engine_sleeps_between_samplings_and_wakes_around_the_push(policy, cuda):
    class Llm:
        told: ClassVar[list] = []

        def __getattr__(self, name):
            return lambda *args, **named: self.told.append((name, *args, named.get("tags") or named.get("level")))

    Llm.told.clear()
    engine = object.__new__(module.Engine)
    engine._policy, engine._cuda, engine._asleep, engine._llm = policy, cuda, False, Llm()
    for step in (engine.release, engine.release, engine.refresh, engine.refresh, engine.release):
        step()
    push = [("collective_rpc", "reload_weights", None), ("reset_prefix_cache", None)]
    awake = [("wake_up", ["weights"]), push[0], ("wake_up", ["kv_cache"]), push[1]]
    assert Llm.told == ([("sleep", 2), *awake, *push, ("sleep", 2)] if cuda else push * 2)


def test_what_is_missing_is_said_before_anything_is_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(monitor.extras, "_installed", lambda name: name != "vllm")
    with pytest.raises(MissingPackageError, match=r'needs vllm, .* pip install "rlvr-monitor\[vllm\]" \(without a GPU'):
        check_usable()
    options = ["--rollout.backend", "vllm", "--store", str(tmp_path)]
    monkeypatch.setattr("trainer.runtime.build.make_task", lambda task: pytest.fail("it was loaded"))
    assert main(options) == 2
    assert "rlvr train: rollout.backend vllm needs vllm" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_old_vllm_and_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(monitor.extras, "_installed", lambda name: True)
    for found, fine in (("0.27.1", False), ("0.28.0", True), ("1.0", True), ("0.31.0+cpu", True)):
        monkeypatch.setattr(module, "version", lambda found=found: found)
        if fine:
            check_usable()
        else:
            with pytest.raises(ConfigError, match=r"vLLM 0\.27\.1 is installed, expected 0\.28 or later"):
                check_usable()
    with pytest.raises(ConfigError, match="'vllm' with 2 processes, expected one"):
        check_usable(2)
    with pytest.raises(ConfigError, match=r"rollout\.backend is 'vllm' with shard true"):
        TrainConfig(shard=True, rollout={"backend": "vllm"})


def placed(device, world=1):
    return SimpleNamespace(device=torch.device(device), in_step=Ranks(0, world))


def test_auto_says_why(monkeypatch):
    monkeypatch.setattr("trainer.rollout.sampling._flash_attention", lambda: True)
    assert auto_backend(placed("cpu"), 4096, 8192) == ("generate", "on a CPU it was faster than paged")
    assert auto_backend(placed("cuda", 2), 64, 1024) == ("generate", "a sharded policy cannot be paged")
    assert auto_backend(placed("cuda"), 16, 1024) == (
        "generate", "16 rollouts of 1024 tokens are too few for paged (from 32 rollouts of 512 tokens)",
    )  # fmt: skip
    assert auto_backend(placed("cuda"), 64, 1024)[0] == "paged"
    monkeypatch.setattr("trainer.rollout.sampling._flash_attention", lambda: False)
    assert auto_backend(placed("cuda"), 64, 1024) == ("generate", "paged needs flash attention, which is not installed")


def test_a_run_says_what_auto_means_and_records_importance_weights(tmp_path, capsys):
    options = (
        "--steps 1 --threads 1 --rollout.prompts 2 --rollout.group-size 2 --eval.every 0 --checkpoint.every 0 "
        "--loss.sampler-ratio-max 2 --run r"
    )
    assert main([*options.split(), "--store", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    if not torch.cuda.is_available():
        assert "rollout.backend auto is generate: on a CPU it was faster than paged.\n" in said
    with open_store(tmp_path) as store:
        found = dict(store.sql("SELECT name, value FROM steps WHERE name LIKE 'sampler_%'").rows)
    assert found["sampler_ratio"] == pytest.approx(1, abs=1e-4) and found["sampler_ess"] == pytest.approx(1, abs=1e-6)
    assert found["sampler_ratio_cut"] == 0
