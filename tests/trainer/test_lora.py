"""Low-rank adapters: the base policy at first, few trained parameters, resumed, saved as an ordinary model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from monitor.store.reader import open_store
from trainer.commands.train import main, parse_config
from trainer.config import ConfigError, LoraConfig, TrainConfig
from trainer.policy.lora import merged_copy, with_adapters
from trainer.policy.sources import BUILTIN
from trainer.runtime.build import prepare
from trainer.runtime.checkpoint import checkpoints_of

OPTIONS = (
    "--lora.rank 4 --lora.alpha 8 --optim.lr 1e-3 --threads 1 --rollout.prompts 4 --rollout.group-size 4 "
    "--eval.every 0 --weighting.warmup-steps 0 --checkpoint.every 2"
).split()


def test_merged_adapters_are_w_plus_alpha_over_rank_b_a():
    """rank 4, alpha 8: W + 2 B A, checked against the product written out."""
    base = AutoModelForCausalLM.from_pretrained(BUILTIN["builtin"], dtype=torch.float32)
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = with_adapters(base, LoraConfig(rank=4, alpha=8))
    layer = next(m for name, m in model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (b == 0).all() and a.abs().sum() > 0
    torch.nn.init.normal_(b)
    expected = before["model.layers.0.self_attn.q_proj.weight"] + 2.0 * b @ a
    merged = dict(merged_copy(model).named_parameters())
    assert merged.keys() == before.keys()
    torch.testing.assert_close(merged["model.layers.0.self_attn.q_proj.weight"], expected)


def test_only_adapters_are_trained_and_the_start_is_the_base_policy():
    plain, adapted = prepare(parse_config([])), prepare(parse_config(OPTIONS))
    assert all(".lora_" in name for name in adapted.policy.trained())
    share = sum(p.numel() for p in adapted.updater.trained) / sum(p.numel() for p in plain.updater.trained)
    assert 0.01 < share < 0.1
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(adapted.policy.model(ids).logits, plain.policy.model(ids).logits, rtol=0, atol=0)


def test_a_run_with_adapters_learns_resumes_and_leaves_an_ordinary_model(tmp_path):
    for name, steps in (("whole", "4"), ("cut", "2")):
        assert main([*OPTIONS, "--steps", steps, "--store", str(tmp_path), "--run", name]) == 0
    assert main(["--resume", "cut", "--steps", "4", "--store", str(tmp_path)]) == 0
    with open_store(tmp_path) as store:
        query = "SELECT step, name, value FROM steps WHERE run = ? AND name NOT LIKE 'perf/%' ORDER BY ALL"
        assert store.sql(query, ["whole"]).rows == store.sql(query, ["cut"]).rows
    newest = checkpoints_of(tmp_path / "checkpoints" / "cut")[-1] / "parameters.safetensors"
    assert newest.stat().st_size < 500_000  # the adapters alone
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "policies" / "cut")
    base = AutoModelForCausalLM.from_pretrained(BUILTIN["builtin"], dtype=torch.float32)
    assert [n for n, _ in trained.named_parameters()] == [n for n, _ in base.named_parameters()]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(trained.get_parameter(name), base.get_parameter(name))


def test_sharded_adapters_are_refused():
    with pytest.raises(ConfigError, match=r"shard is true and lora.rank is 4"):
        TrainConfig(shard=True, lora={"rank": 4})
