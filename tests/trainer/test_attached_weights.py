"""Weights in TRL's loss: the gradient of each update against our own loss in float64, of the same rollouts."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import rlvr_monitor
from monitor.errors import MonitorError
from monitor.integrations.trl.weights import token_advantages
from trainer.config import LossConfig, make_weighting
from trainer.flow import Rollouts
from trainer.learning.attached import IMPOSSIBLE
from trainer.learning.loss import LossTotals, loss_totals, policy_loss
from trainer.learning.weightings import WEIGHT_FUNCTIONS, WeightInputs, token_weights
from trainer.policy.policy import Policy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tiny_trl import WIDTH, Snapshots, tokenizer, trainer
    from trl import GRPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
LOW, HIGH = 0.02, 0.03  # so narrow that the second update of a rollout batch is clipped
NEEDED = {"rsi": ":low=-2,high=0.9"}  # parameters without a default
TOLERANCE = 2e-5  # of the gradient's norm: TRL's float32 against float64


class Gradients(TrainerCallback):
    """The gradient of each optimizer step, by its number."""

    def __init__(self) -> None:
        self.found: dict[int, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found[state.global_step + 1] = flat(model)


def flat(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, weighting: str, **settings: Any) -> SimpleNamespace:
    """One rollout batch of an attached trainer with its updates: TRL's gradients, and what ours need."""
    monkeypatch.setattr(GRPOTrainer, "_send_telemetry", lambda self: None)
    settings = {"max_grad_norm": 0.0, "epsilon": LOW, "epsilon_high": HIGH, "learning_rate": 2e-2} | settings
    trained, snapshots, gradients, batches = trainer(tmp_path, **settings), Snapshots(), Gradients(), []
    score = GRPOTrainer._generate_and_score_completions

    def scored(inputs):
        batches.append(score(trained, inputs))
        return batches[-1]

    trained._generate_and_score_completions = scored
    trained.add_callback(snapshots), trained.add_callback(gradients)
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", weighting=weighting)
    followed, take = [], trained.rlvr_attached._made
    monkeypatch.setattr(trained.rlvr_attached, "_made", lambda out: followed.append(take(out)) or followed[-1])
    trained.train()
    with rlvr_monitor.open_store(tmp_path / "runs") as store:
        assert store.sql("SELECT message FROM events WHERE kind = 'attach_error'").rows == []
        losses = store.sql("SELECT value FROM steps WHERE name = 'loss'").rows
    return SimpleNamespace(
        trained=trained, models=snapshots.models, gradients=gradients.found, out=batches[0], followed=followed[0],
        losses=[value for (value,) in losses],
    )  # fmt: skip


def ours(found: SimpleNamespace, weighting: str, loss: LossConfig) -> tuple[torch.Tensor, list[Any]]:
    """Our weights [n, T], and (loss, gradient) of each update, with the micro-batches that TRL had."""
    out, updates = found.out, sorted(found.models)
    width = out["completion_ids"].shape[1]
    mask = out["completion_mask"].bool()
    rollouts = Rollouts(
        torch.cat([out["prompt_ids"], out["completion_ids"]], 1),
        torch.cat([out["prompt_mask"], out["completion_mask"]], 1).bool(),
        mask, torch.zeros(mask.shape), torch.zeros(len(mask)),
    )  # fmt: skip
    policies = [Policy(found.models[step], tokenizer(), torch.device("cpu")) for step in updates]
    batch = SimpleNamespace(token_ids=out["completion_ids"], mask=mask, group_ids=torch.arange(len(mask)) // 4)
    with torch.no_grad():
        signals = policies[0].signals(hidden(policies[0], rollouts, width), batch, 1.0)  # type: ignore[arg-type]
    kind, _, settings = weighting.partition(":")
    config = make_weighting({"kind": kind} | dict(setting.split("=") for setting in settings.split(",")))
    generator = torch.Generator().manual_seed(5)
    weights = token_weights(WeightInputs(signals, mask, out["advantages"], generator, 1 - config.warmup_steps), config)
    totals = loss_totals(mask, weights, config.normalise, WIDTH)
    used = found.followed.used
    share = len(used) // len(updates)
    results = []
    for number, policy in enumerate(policies):
        rows = [part.rows for part in used[number * share : (number + 1) * share]]
        results.append(update(policy, rollouts, signals.logprob.double(), weights, out["advantages"], rows, totals,
                              loss, config.normalise, width))  # fmt: skip
    return weights, results


def hidden(policy: Policy, rollouts: Rollouts, width: int) -> torch.Tensor:
    return policy.padded_hidden(rollouts.input_ids, rollouts.attention_mask, width)


def update(
    policy: Policy, rollouts: Rollouts, old: Any, weights: Any, advantages: Any, parts: Any, totals: LossTotals,
    loss: LossConfig, normalise: Any, width: int,
) -> tuple[float, torch.Tensor]:  # fmt: skip
    policy.model.zero_grad()
    states, mask = hidden(policy, rollouts, width), rollouts.mask
    logits = policy.model.get_output_embeddings()(states)
    logp = torch.log_softmax(logits, -1).gather(-1, rollouts.token_ids.unsqueeze(-1)).squeeze(-1)
    terms = [
        policy_loss(logp[rows], old[rows], advantages[rows].double(), mask[rows], weights[rows].double(), loss,
                    totals=totals, normalise=normalise).loss
        for rows in parts
    ]  # fmt: skip
    total = torch.stack(terms).sum()
    total.backward()
    return float(total), flat(policy.model)


def compared(found: SimpleNamespace, weighting: str, kind: str) -> torch.Tensor:
    """Holds every update's gradient, and the recorded loss, to ours; returns the weights."""
    high = HIGH - 1 if kind == "cispo" else HIGH
    config = LossConfig(kind=kind, clip_low=LOW, clip_high=max(high, 1e-6), kl_coef=0.0)  # type: ignore[arg-type]
    weights, results = ours(found, weighting, config)
    torch.testing.assert_close(found.followed.weights, weights, rtol=0, atol=2e-5)  # of signals in float32
    for step, (_, gradient) in zip(sorted(found.models), results, strict=True):
        difference = (found.gradients[step] - gradient).norm() / gradient.norm()
        assert float(difference) < TOLERANCE, f"update {step}: {float(difference):.2g}"
    assert found.losses[0] == pytest.approx(sum(value for value, _ in results) / len(results), rel=1e-4, abs=2e-6)
    return weights


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
@pytest.mark.parametrize(
    "weighting", ["ict:keep=0.3,warmup_steps=0", "ict_budget:warmup_steps=0,share=-0.5,normalise=selected"]
)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_iterations": 2, "max_steps": 2},
    ],
    ids=["on-policy", "off-policy accumulated"],
)
def test_the_gradient_is_that_of_our_own_loss(tmp_path, monkeypatch, kind, weighting, settings):
    settings = settings | ({"epsilon_high": 1 + 1e-6} if kind == "cispo" else {})
    found = run(tmp_path, monkeypatch, weighting, loss_type=kind, **settings)
    weights = compared(found, weighting, kind)
    assert weights[found.followed.mask].std() > 0


@pytest.mark.parametrize("kind", sorted(WEIGHT_FUNCTIONS.keys() - IMPOSSIBLE.keys() - {"ict", "ict_budget"}))
def test_every_weighting_acts_as_in_our_own_loss(tmp_path, monkeypatch, kind):
    weighting = f"{kind}{NEEDED.get(kind, ':')}{',' if kind in NEEDED else ''}warmup_steps=0"
    compared(run(tmp_path, monkeypatch, weighting, loss_type="grpo", num_iterations=2, max_steps=2), weighting, "grpo")


def test_weights_are_1_until_the_warm_up_is_over(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, "ict:keep=0.3,warmup_steps=2", max_steps=3)
    with rlvr_monitor.open_store(tmp_path / "runs") as store:
        shares = store.sql("SELECT value FROM steps WHERE name = 'selected_share' ORDER BY step").rows
        assert store.run("mine").info["weighting"] == "ict" and store.run("mine").info["warmup_steps"] == 2
    assert [share for (share,) in shares[:2]] == [1.0, 1.0] and 0.3 <= shares[2][0] < 0.5


def test_advantages_of_tokens_by_hand():
    """Two responses of 3 and 1 tokens; weights 1 0 2 and 4; advantages 2 and -1. Tokens 4, weights 7."""
    weights = torch.tensor([[1.0, 0.0, 2.0], [4.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages = torch.tensor([2.0, -1.0])

    def found(loss: str, normalise: str = "selected", scale: Any = None) -> list[list[float]]:
        return token_advantages(advantages, weights, mask, loss, normalise, scale).tolist()

    plain = [[2.0, 0.0, 4.0], [-4.0, 0.0, 0.0]]  # w A
    assert found("dr_grpo") == plain and found("grpo", "all") == plain and found("dapo") == plain
    assert found("grpo") == [[2.0, 0.0, 4.0], [-1.0, 0.0, 0.0]]  # T / sum w: 3 / 3 and 1 / 4
    assert torch.tensor(found("bnpo")).allclose(torch.tensor(plain) * 4 / 7)
    assert torch.tensor(found("cispo", scale=torch.tensor(4 / 7))).allclose(torch.tensor(plain) * 4 / 7)
    nothing = token_advantages(advantages, torch.zeros(2, 3), mask, "grpo", "selected", None)
    assert nothing.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("weighting", "settings", "message"),
    [
        ("kl_cov", {}, r"^weighting 'kl_cov' is not possible in another trainer's loss: it adds a penalty"),
        ("ict:lr=1e-4", {}, r"^weighting 'ict:lr=1e-4' sets optim\.lr, which is the trainer's\."),
        ("itc", {}, r"^Arm 'itc': unknown weighting 'itc'\. Did you mean 'ict'"),
        ("ict", {"loss_type": "sapo"}, r"^weighting 'ict' cannot act: loss_type is 'sapo'\. Set it to one of grpo, "),
        ("ict", {"importance_sampling_level": "sequence"}, r"importance_sampling_level is 'sequence'"),
        ("ict", {"top_entropy_quantile": 0.2}, r"top_entropy_quantile is 0\.2, which chooses tokens too"),
    ],
)
def test_what_cannot_act_is_refused_before_training(tmp_path, monkeypatch, weighting, settings, message):
    monkeypatch.setattr(GRPOTrainer, "_send_telemetry", lambda self: None)
    trained = trainer(tmp_path, **settings)
    with pytest.raises((MonitorError, ValueError), match=message):
        rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", weighting=weighting)
    assert not hasattr(trained, "rlvr_attached") and not (tmp_path / "runs").exists()
