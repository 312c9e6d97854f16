"""The losses against TRL's GRPOTrainer._compute_loss: value and every parameter's gradient, on one tiny Qwen2.

TRL computes from token ids, through its own fused head; we through Policy and policy_loss, on a copy of the model.
"""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from rounding import gradient_rounding
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from trainer.config import LossConfig, TrainConfig
from trainer.flow import Rollouts
from trainer.learning.entropy_control import EntropyControl
from trainer.learning.loss import loss_totals, policy_loss
from trainer.policy.policy import Policy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TAU, WIDTH, LENGTHS = 0.8, 9, (9, 4, 1, 6, 9, 3)  # ragged responses of at most 9 tokens
LOW, HIGH = 0.15, 0.28
MODEL = Qwen2Config(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=1,
    pad_token_id=0,
)  # fmt: skip
ROUNDING = gradient_rounding(MODEL, 5 + WIDTH, sum(LENGTHS))  # TRL adds in another order, through a head of its own


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """(TRL's trainer, our policy on a copy of its model, the batch)."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from trl import GRPOConfig, GRPOTrainer

        patch.setattr(GRPOTrainer, "_send_telemetry", lambda self: None)  # a test reaches no network
        words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 40)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
        )
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(MODEL)
        policy = Policy(copy.deepcopy(model), tokenizer, torch.device("cpu"))
        args = GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to=[], beta=0.0,
            per_device_train_batch_size=2, num_generations=2, max_completion_length=WIDTH, temperature=TAU,
            epsilon=LOW, epsilon_high=HIGH, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
            train_dataset=Dataset.from_dict({"prompt": ["w2"] * 4}), processing_class=tokenizer,
        )  # fmt: skip
    trainer.model.train()
    return trainer, policy, batch_of(policy)


def batch_of(policy):
    """Random tokens, left-padded prompts; old and reference log-probabilities near the policy's, so ratios vary."""
    g = torch.Generator().manual_seed(1)
    n, lengths = len(LENGTHS), torch.tensor(LENGTHS)
    prompt_mask = torch.arange(5) >= torch.tensor([0, 2, 1, 3, 0, 4]).unsqueeze(1)
    mask = torch.arange(WIDTH) < lengths.unsqueeze(1)
    ids = torch.where(torch.cat([prompt_mask, mask], 1), torch.randint(2, 40, (n, 5 + WIDTH), generator=g), 0)
    rollouts = Rollouts(ids, torch.cat([prompt_mask, mask], 1), mask, torch.zeros(n, WIDTH), lengths == WIDTH)
    with torch.no_grad():
        logprobs, _ = forward(policy, rollouts)
    noise = torch.randn(2, n, WIDTH, generator=g)
    return SimpleNamespace(
        rollouts=rollouts,
        mask=mask,
        advantages=torch.tensor([1.2, -0.7, 0.4, -1.5, 0.9, -0.3]),
        old=torch.where(mask, logprobs + 0.5 * noise[0], 0.0),
        reference=torch.where(mask, logprobs + 0.4 * noise[1], 0.0),
    )


def forward(policy, rollouts):
    mask = rollouts.mask
    found = policy.logprobs(policy.hidden(rollouts)[mask], rollouts.token_ids[mask], TAU)
    return [torch.zeros(mask.shape).masked_scatter(mask, values) for values in found]


def theirs(trainer, batch, mask, config, *, parts=1, off_policy=True, quantile=1.0):
    """(loss, gradient) of TRL with our configuration translated into its attributes, over `parts` micro-batches."""
    trainer.loss_type = "grpo" if config.kind == "gspo" else config.kind
    trainer.importance_sampling_level = "sequence" if config.kind == "gspo" else "token"
    trainer.epsilon_low = config.clip_low
    trainer.epsilon_high = config.clip_high + (1 if config.kind == "cispo" else 0)
    trainer.beta, trainer.args.use_bias_correction_kl = config.kl_coef, config.kl_bias_correction
    trainer.args.delta = config.clip_delta
    trainer.entropy_coef, trainer._entropy_bonus_enabled = config.entropy_coef, config.entropy_coef != 0
    trainer.top_entropy_quantile, trainer.max_completion_length = quantile, WIDTH
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = parts
    trainer.model.zero_grad()
    losses = []
    for rows in torch.arange(len(mask)).chunk(parts):
        inputs = {
            "prompt_ids": batch.rollouts.input_ids[rows, :5],
            "prompt_mask": batch.rollouts.attention_mask[rows, :5].long(),
            "completion_ids": batch.rollouts.token_ids[rows],
            "completion_mask": mask[rows].long(),
            "advantages": batch.advantages[rows],
            "num_items_in_batch": mask.sum(),
            "old_per_token_logps": batch.old[rows] if off_policy else None,
            "ref_per_token_logps": batch.reference[rows],
        }
        losses.append(trainer._compute_loss(trainer.model, inputs))
    sum(losses).backward()
    return sum(losses).detach(), flat_gradient(trainer.model)


def ours(policy, batch, mask, config, *, weights=None, normalise="selected", parts=1, off_policy=True):
    """(loss, gradient) summed over `parts` micro-batches."""
    policy.model.zero_grad()
    weights = mask.float() if weights is None else weights
    totals, total = loss_totals(mask, weights, normalise, WIDTH), torch.tensor(0.0)
    logprobs, entropies = forward(policy, batch.rollouts)
    for rows in torch.arange(len(mask)).chunk(parts):
        total = total + policy_loss(
            logprobs[rows], batch.old[rows] if off_policy else logprobs[rows].detach(), batch.advantages[rows],
            mask[rows], weights[rows], config, ref_logprobs=batch.reference[rows] if config.kl_coef else None,
            entropies=entropies[rows], totals=totals, normalise=normalise,
        ).loss  # fmt: skip
    total.backward()
    return total.detach(), flat_gradient(policy.model)


def flat_gradient(model):
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def assert_same(found, expected, scale=1.0):
    (loss, gradient), (their_loss, their_gradient) = found, expected
    assert float(loss) == pytest.approx(float(their_loss) * scale, rel=ROUNDING, abs=ROUNDING)
    assert (gradient - scale * their_gradient).norm() < ROUNDING * (scale * their_gradient).norm()
    assert their_gradient.norm() > 1e-3


KINDS = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "gspo")
OPTIONS = {
    "plain": {},
    "kl": {"kl_coef": 0.3},
    "kl_bias_correction": {"kl_coef": 0.3, "kl_bias_correction": True},
    "delta": {"clip_delta": 1.4},
    "entropy": {"entropy_coef": 0.02},
    "all": {"kl_coef": 0.1, "kl_bias_correction": True, "clip_delta": 1.4, "entropy_coef": -0.01},
}
# cispo has no delta; TRL's gspo corrects a token's KL by the ratio of its response (test_loss.py: ours is unbiased)
NOT_THEIRS = {("cispo", "clip_delta"), ("gspo", "kl_bias_correction")}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_trl(oracle, kind, option):
    trainer, policy, batch = oracle
    settings = {k: v for k, v in OPTIONS[option].items() if (kind, k) not in NOT_THEIRS}
    config = LossConfig(kind=kind, clip_low=LOW, clip_high=HIGH, **settings)
    assert_same(ours(policy, batch, batch.mask, config), theirs(trainer, batch, batch.mask, config))


def test_the_batch_clips_on_all_sides(oracle):
    """Otherwise the agreement above would say nothing of clips and bounds."""
    _, policy, batch = oracle
    logprobs, _ = forward(policy, batch.rollouts)
    config = LossConfig(clip_low=LOW, clip_high=HIGH)
    terms = policy_loss(logprobs, batch.old, batch.advantages, batch.mask, batch.mask.float(), config)
    beyond_delta = (terms.log_ratio.exp() > 1.4) & (batch.advantages < 0).unsqueeze(1)
    assert min(int(x.sum()) for x in (terms.clipped_low, terms.clipped_high, beyond_delta)) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_where_the_old_log_probabilities_are_the_new_ones(oracle, kind):
    trainer, policy, batch = oracle
    config = LossConfig(kind=kind, kl_coef=0.3, kl_bias_correction=kind != "gspo")
    found = ours(policy, batch, batch.mask, config, off_policy=False)
    assert_same(found, theirs(trainer, batch, batch.mask, config, off_policy=False))


@pytest.mark.parametrize("kind", KINDS)
def test_two_micro_batches_are_those_of_trl(oracle, kind):
    """bnpo too: TRL averages its local means over the accumulation steps."""
    trainer, policy, batch = oracle
    config = LossConfig(kind=kind, clip_high=HIGH, kl_coef=0.1)
    found = ours(policy, batch, batch.mask, config, parts=2)
    assert_same(found, theirs(trainer, batch, batch.mask, config, parts=2))


@pytest.mark.parametrize("kind", KINDS)
def test_masked_truncated_responses(oracle, kind):
    """TRL empties their masks. Where it divides by responses it still counts them, 6; we count the 4 that are left."""
    trainer, policy, batch = oracle
    mask = batch.mask & ~batch.rollouts.truncated.unsqueeze(1)
    scale = 6 / 4 if kind in ("grpo", "dr_grpo", "gspo") else 1.0
    config = LossConfig(kind=kind, clip_high=HIGH, kl_coef=0.1)
    assert_same(ours(policy, batch, mask, config), theirs(trainer, batch, mask, config), scale)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gspo"])
def test_sparse_weights_with_kl_on_all_tokens_are_the_top_entropy_quantile_of_trl(oracle, kind):
    """TRL divides by all tokens and leaves the KL unmasked. Its gspo takes the ratio over all tokens: not ours."""
    trainer, policy, batch = oracle
    config = LossConfig(kind=kind, clip_high=HIGH, kl_coef=0.2, kl_bias_correction=True, kl_outside_mask=True)
    with torch.no_grad():
        _, entropies = forward(policy, batch.rollouts)
    weights = trainer.get_high_entropy_mask(entropies, batch.mask, 0.6).float()
    assert weights.sum() == 13  # of 32
    found = ours(policy, batch, batch.mask, config, weights=weights, normalise="all")
    assert_same(found, theirs(trainer, batch, batch.mask, config, quantile=0.4))


def test_the_entropy_coefficient_follows_the_controller_of_trl(oracle):
    """Batches of other rows have other entropies, on both sides of the target."""
    trainer, policy, batch = oracle
    with torch.no_grad():
        _, entropies = forward(policy, batch.rollouts)
    masks = [batch.mask & (torch.arange(6) % 3 == k).unsqueeze(1) for k in (0, 1, 2, 2, 1, 1, 0, 1)]
    means = [float(entropies[mask].mean()) for mask in masks]
    settings = {"kind": "dapo", "entropy_target": sorted(means)[3] + 1e-4, "entropy_step": 0.01, "entropy_coef": 0.02}
    config = LossConfig(**settings, entropy_coef_max=0.03)
    control = EntropyControl(TrainConfig(loss=config))
    trainer.use_adaptive_entropy, trainer._last_world_entropy = True, float("inf")
    trainer.args.entropy_target, trainer.args.entropy_coef_delta = config.entropy_target, config.entropy_step
    trainer.args.entropy_coef_max, trainer.accelerator.gradient_state.sync_gradients = 0.03, True
    applied, kept = [], trainer.entropy_coef
    try:
        for mask, mean in zip(masks, means, strict=True):
            state = control.state_dict()["coefficient"]
            expected = theirs(trainer, batch, mask, config.model_copy(update={"entropy_coef": state}))
            fixed = config.model_copy(update={"entropy_coef": control.coefficient})
            assert_same(ours(policy, batch, mask, fixed), expected)
            applied.append(control.coefficient)
            control.observe(mean)
            assert control.state_dict()["coefficient"] == pytest.approx(trainer.entropy_coef, abs=1e-12)
    finally:
        trainer.use_adaptive_entropy, trainer.entropy_coef = False, kept
    assert len(set(applied)) >= 3 and applied[0] == 0.0 and max(applied) == 0.03
