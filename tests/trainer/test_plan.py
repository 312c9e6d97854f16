"""What a run takes in memory: counted by hand, beside what torch's allocator gave out, and the command's choices."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.bench_plan import SHAPES, compare, model_folder, shape_of
from trainer.commands.plan import main
from trainer.commands.train import PRESETS, parse_config
from trainer.config import LoraConfig, TrainConfig
from trainer.errors import ModelError
from trainer.plan import SPARE, Device, changed, fitting, memory_plan
from trainer.policy.imagined import LiveBytes, Passes, counted
from trainer.policy.shapes import model_shape


def test_parameters_by_hand():
    # Qwen2.5-1.5B: embedding 151,936 x 1,536, tied. A layer: q 1536 (1536 + 1), k and v 256 (1536 + 1) each, o 1536^2,
    # gate, up and down 3 x 1536 x 8960, two norms of 1536; and the last norm
    layer = 1536 * 1537 + 2 * 256 * 1537 + 1536**2 + 3 * 1536 * 8960 + 2 * 1536
    counts = counted(model_shape("Qwen/Qwen2.5-1.5B"), LoraConfig())
    embedding = 151_936 * 1536
    assert counts.layer == layer == 46_797_824 and counts.all == counts.trained == 28 * layer + embedding + 1536
    assert counts.outside == embedding + 1536 and counts.largest == embedding
    # rank 4 on q, k, v, o, gate, up, down: 4 (in + out) each
    adapters = 4 * (2 * 3072 + 2 * 1792 + 3 * (1536 + 8960))
    assert counted(model_shape("Qwen/Qwen2.5-1.5B"), LoraConfig(rank=4)).trained == 28 * adapters


def test_live_bytes_are_those_that_live():
    before = torch.zeros(1000)
    with LiveBytes() as live:
        before.t().add_(1)
        assert live.peak == 0  # what was there before is not counted, nor a view of it
        a = torch.zeros(1000)  # 4,000 bytes
        view = a[:10]
        b = a + 1
        assert (live.now, live.peak) == (8_000, 8_000)
        del b
        c = torch.zeros(500)
        assert (live.now, live.lap()) == (6_000, 8_000)
        del a, c
        assert live.now == 4_000 and live.peak == 6_000  # a view keeps its storage
        del view
        assert live.now == 0


@pytest.mark.parametrize("name", [*list(SHAPES)[:3], "moments of 8 bits"])
def test_predictions_are_within_15_percent_of_the_allocators_peaks(tmp_path, name):
    predicted, measured, _ = compare(tmp_path, name)
    for phase, size in predicted.items():
        assert abs(size / measured[phase] - 1) < 0.15, (phase, size, measured[phase])


@pytest.mark.parametrize("name", [path.stem for path in PRESETS.glob("*.toml")])
def test_every_preset_fits_80_gb_with_a_tenth_to_spare(name):
    config = parse_config([name])
    plan = memory_plan(config, Passes(model_shape(config.model)), 512, Device(80 * 10**9))
    assert plan.peak < 0.9 * 80e9


def test_parts_by_hand_and_with_ranks(tmp_path):
    passes = Passes(model_shape(str(model_folder(tmp_path / "m", shape_of(64, 2)))))
    all_ = passes(counted, LoraConfig()).all
    config = TrainConfig(rollout={"prompts": 8, "max_new_tokens": 24}, loss={"kl_coef": 0.1}, optim={"epochs": 2})
    one = memory_plan(config, passes, 8, Device(10**9)).phases
    assert one["update"]["weights"] == one["update"]["reference"] == 4 * all_
    assert one["update"]["optimizer"] == 8 * all_ and one["optimizer"]["gradients"] == 4 * all_
    # 16 prompts of 16 samples evaluated at once: 256 rows of 256 columns (a multiple), 2 x 4 heads x 16, 2 layers, bf16
    assert one["rollouts"]["caches"] == 256 * 256 * 128 * 2 * 2
    shared = config.model_copy(update={"shard": True})
    four = memory_plan(shared, passes, 8, Device(10**9, ranks=4)).phases
    assert four["update"]["weights"] == all_ and four["update"]["optimizer"] == 2 * all_
    counts = passes(counted, LoraConfig())
    assert four["update"]["gathered"] == 4 * (counts.outside + 2 * counts.layer)
    shared = TrainConfig(
        **config.model_dump() | {"shard": True, "shard_gather": "bfloat16", "record": {"probe_every": 0}}
    )
    half = memory_plan(shared, passes, 8, Device(10**9, ranks=4)).phases
    assert half["update"]["gathered"] == 4 * counts.outside + 4 * counts.layer
    assert half["update"]["whole gradients"] == 4 * counts.outside + 6 * counts.layer
    assert four["update"]["whole gradients"] == 4 * counts.outside + 8 * counts.layer
    assert half["update"]["weights"] == all_ and half["update"]["optimizer"] == 2 * all_  # master weights in float32
    # sampling under autocast casts the head alone, not every linear layer
    assert (four["rollouts"]["sampler"], half["rollouts"]["sampler"]) == (2 * counts.linear, 2 * counts.head)
    assert counts.linear > 2 * counts.head and half["update"]["activations"] < four["update"]["activations"]
    whole = memory_plan(config, passes, 8, Device(10**9, ranks=4)).phases
    assert whole["update"]["weights"] == 4 * all_ and whole["optimizer"]["temporaries"] == 4 * all_  # one flat gradient


@pytest.mark.parametrize("cuda", [True, False])
def test_an_engine_of_vllm_by_hand(tmp_path, cuda):
    passes = Passes(model_shape(str(model_folder(tmp_path / "m", shape_of(64, 2)))))
    text, all_ = passes.shape.get_text_config(), passes(counted, LoraConfig()).all
    settings = {"prompts": 8, "group_size": 4, "max_new_tokens": 24, "backend": "vllm"}
    config = TrainConfig(rollout=settings, eval={"every": 0})
    phases = memory_plan(config, passes, 16, Device(10**9, cuda)).phases
    # 32 rows of 40 tokens: two blocks of 32 each, and an empty one; 2 x 4 heads x 16 numbers, 2 layers
    assert text.num_key_value_heads == 4 and text.hidden_size == 64
    width = 2 if cuda else 4
    assert phases["rollouts"]["caches"] == (32 * 2 + 1) * 32 * 128 * 2 * width
    head = text.vocab_size * 64 if text.tie_word_embeddings and not cuda else 0
    assert phases["rollouts"]["sampler"] == width * (all_ + head)
    assert phases["rollouts"]["logits"] == 4 * 4 * 32 * text.vocab_size
    assert ("sampler" in phases["update"]) is ("caches" in phases["optimizer"]) is (not cuda)  # on CUDA it sleeps
    crowded = memory_plan(config, passes, 16, Device(10**6, cuda)).phases["rollouts"]["caches"]
    assert crowded == (500_000 if cuda else phases["rollouts"]["caches"])  # half of the device, and rows wait


def test_what_does_not_fit_gets_smaller_passes_then_checkpointed_layers(tmp_path):
    passes = Passes(model_shape(str(model_folder(tmp_path / "m", shape_of(64, 6)))))
    config = TrainConfig(rollout={"prompts": 8, "max_new_tokens": 48}, optim={"epochs": 2}, eval={"every": 0})
    peak = memory_plan(config, passes, 8, Device(1, cuda=False)).peak
    roomy = fitting(config, passes, 8, Device(2 * peak, cuda=False))
    assert roomy.fits and roomy.settings == {} and roomy.plan.peak == peak
    for share in (0.6, 0.3):
        device = Device(int(share * peak), cuda=False)
        choice = fitting(config, passes, 8, device)
        assert choice.fits and choice.plan.peak <= (1 - SPARE) * device.memory
        assert choice.settings["optim.micro_tokens"] % (8 + 48) == 0
        assert memory_plan(changed(config, choice.settings), passes, 8, device) == choice.plan
    least = fitting(config, passes, 8, Device(10**6, cuda=False))
    assert (
        not least.fits and least.settings["optim.gradient_checkpointing"] and least.settings["rollout.max_batch"] == 1
    )


def test_the_command_names_settings_refuses_and_counts_prompts(tmp_path, capsys):
    model = str(model_folder(tmp_path / "m", shape_of(64, 6)))
    options = ["--model", model, "--rollout.max-new-tokens", "48", "--eval.every", "0", "--optim.epochs", "2"]
    capsys.readouterr()
    assert main([*options, "--memory-gb", "0.1", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt_tokens"] == 4 and found["fits"]  # "999:" at most
    assert "optim.micro_tokens" in found["settings"] and found["peak"] < 0.09e9
    assert main([*options, "--memory-gb", "0.1", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert f"--optim.micro-tokens {found['settings']['optim.micro_tokens']}" in told and "It fits: peak" in told
    assert main([*options, "--memory-gb", "0.002", "--device", "cpu", "--prompt-tokens", "9"]) == 1
    told = capsys.readouterr().out
    assert "It cannot fit" in told and "--lora.rank 16" in told and "prompts of 9 tokens" in told
    assert main([*options, "--ranks", "3"]) == 2
    assert "--ranks is 3 and rollout.prompts 16" in capsys.readouterr().err
    assert main([*options, "--device", "tpu"]) == 2
    assert "expected cuda or cpu" in capsys.readouterr().err


def test_a_model_that_is_not_here_says_what_can_be_planned(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"shape of 'no/such-model' cannot be read: .* one of smollm2-135m, Qwen"):
        model_shape("no/such-model")
