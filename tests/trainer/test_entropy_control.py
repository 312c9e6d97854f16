"""The controller by hand, and what it does to a policy that learns."""

from __future__ import annotations

import json
import math

import pytest
import torch

from monitor.signals import token_signals
from trainer.config import LossConfig, TrainConfig
from trainer.learning.entropy_control import EntropyControl
from trainer.learning.loss import policy_loss
from trainer.learning.weightings import WeightInputs, token_weights


def control_of(kind: str = "entropy_budget", **loss) -> EntropyControl:
    return EntropyControl(TrainConfig(loss=loss, weighting={"kind": kind}))


def test_without_a_target_both_values_are_the_configured_ones_for_ever():
    control = EntropyControl(TrainConfig(loss={"entropy_coef": -0.3}, rollout={"temperature": 0.7}))
    for entropy in (0.0, 9.0, math.nan):
        control.observe(entropy)
        assert (control.coefficient, control.temperature) == (-0.3, 0.7)


def test_the_coefficient_climbs_below_the_target_and_the_bonus_stops_above_it():
    control = control_of(entropy_target=0.3, entropy_step=0.001, entropy_coef_max=0.002)
    applied = []
    # c after each: .001, .002, .002 (bound), .001 (above), .002 (at the target), 0.001, 0, 0 (bound)
    for entropy in (0.2, 0.2, 0.1, 0.4, 0.3, 0.5, 0.5, 0.5):
        control.observe(entropy)
        applied.append(control.coefficient)
    assert applied == pytest.approx([0.001, 0.002, 0.002, 0.0, 0.002, 0.0, 0.0, 0.0])
    assert control.state_dict()["coefficient"] == 0.0 and control.temperature == 1.0


def test_the_temperature_moves_with_the_error_and_within_its_bounds():
    control = control_of(entropy_target=0.4, entropy_actuator="temperature", temperature_step=0.1, temperature_max=1.2)
    control.observe(0.3)  # error (0.4 - 0.3) / 0.4 = 1/4
    assert control.temperature == pytest.approx(math.exp(0.1 / 4))
    control.observe(4.0)  # error -9, cut to -1
    assert control.temperature == pytest.approx(math.exp(0.1 / 4 - 0.1))
    for _ in range(9):
        control.observe(0.0)
    assert control.temperature == 1.2 and control.coefficient == 0.0
    for _ in range(20):
        control.observe(9.0)
    assert control.temperature == 0.5


def test_the_budget_follows_the_distance_and_its_change_within_bounds():
    control = control_of(entropy_target=0.4, entropy_actuator="budget", budget_step=0.1, budget_min=-0.2)
    shares = [control.share]
    # e: 0.1, 0.05, -0.25, -0.25, -0.05. i: 0.31, 0.315, then i + 5 e = -0.935 is out of bounds twice, so i stays; 0.31.
    # share: 0.31 + 0.5, 0.315 + 0.25, -0.2, -0.2, 0.31 - 0.25
    for entropy in (0.44, 0.42, 0.3, 0.3, 0.38):
        control.observe(entropy)
        shares.append(control.share)
    assert shares == pytest.approx([0.3, 0.81, 0.565, -0.2, -0.2, 0.06])
    assert control.weighting == TrainConfig(weighting={"kind": "entropy_budget"}).weighting.model_copy(
        update={"share": control.share}
    )
    assert (control.coefficient, control.temperature) == (0.0, 1.0)
    control.observe(9.0)  # e cut to 1
    assert control.share == 1.0


def test_other_controls_and_other_kinds_leave_the_weighting_as_configured():
    control = control_of(entropy_target=0.4, entropy_actuator="temperature")
    control.observe(0.1)
    assert control.share == control.weighting.share == 0.3
    assert control_of("stare").share is None and control_of("stare").weighting.share == 0.1


def test_a_checkpoint_from_before_budgets_is_read():
    control = control_of(entropy_target=0.4, entropy_actuator="budget")
    control.load_state_dict({"coefficient": 0.0, "entropy": 0.4, "temperature": 1.0})
    assert control.share == 0.3  # at the target: i, which is the configured share


@pytest.mark.parametrize("entropy", [math.nan, math.inf, -math.inf])
def test_a_non_finite_entropy_changes_nothing(entropy):
    control = control_of(entropy_target=0.4, entropy_actuator="temperature")
    control.observe(0.3)
    before = control.state_dict()
    control.observe(entropy)
    assert control.state_dict() == before


@pytest.mark.parametrize("actuator", ["coefficient", "temperature", "budget"])
def test_a_control_goes_on_from_its_state(actuator):
    one, other = (control_of(entropy_target=0.4, entropy_actuator=actuator) for _ in range(2))
    for entropy in (0.3, 0.2, 0.5, 0.1):
        one.observe(entropy)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for entropy in (0.39, 0.41, 0.2):
        assert one.state_dict() == other.state_dict() and one.weighting == other.weighting
        one.observe(entropy)
        other.observe(entropy)
    assert one.state_dict() == other.state_dict()


def learned_entropy(control: EntropyControl, steps: int = 300) -> list[float]:
    """Entropies while 16 categorical policies over 8 tokens are rewarded for the lowest tokens."""
    torch.manual_seed(0)
    logits = torch.zeros(16, 8, requires_grad=True)
    optimizer, seen = torch.optim.SGD([logits], lr=20.0), []
    mask = torch.ones(16, 32, dtype=torch.bool)
    for _ in range(steps):
        logp = torch.log_softmax(logits / control.temperature, 1)
        tokens = torch.multinomial(logp.detach().exp(), 32, replacement=True)
        weights = mask.float()
        logprobs, entropy = logp.gather(1, tokens), -(logp.exp() * logp).sum(1)
        reward = (tokens.float().mean(1) * -1).detach()
        if control.share is not None:
            each = (logits.detach() / control.temperature).unsqueeze(1).expand(16, 32, 8)
            signals = token_signals(each, tokens, mask, torch.arange(16), moments=True)
            inputs = WeightInputs(signals, mask, reward - reward.mean(), torch.Generator())
            weights = token_weights(inputs, control.weighting)
        loss = policy_loss(
            logprobs, logprobs.detach(), reward - reward.mean(), mask, weights, LossConfig(), normalise="all",
            entropies=entropy.unsqueeze(1).expand_as(logprobs), entropy_coef=control.coefficient,
        ).loss  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(entropy.detach().mean()))
        control.observe(seen[-1])
    return seen


def test_a_budget_holds_a_learning_policy_near_its_target():
    """A constant share of 0.3 ends at 1.5 nats after 300 steps; the control goes to each target and stays."""
    for target in (1.0, 1.5):
        late = learned_entropy(control_of(entropy_target=target, entropy_actuator="budget"))[-100:]
        assert sum(late) / 100 == pytest.approx(target, rel=0.05) and max(late) - min(late) < 0.1


def test_either_actuator_holds_a_learning_policy_near_its_target():
    """Left alone the entropy falls from ln 8 = 2.08 to below 0.6 nats; held it stays at 1.0."""
    coefficient = {"entropy_step": 0.01, "entropy_coef_max": 1.0}
    temperature = {"entropy_actuator": "temperature", "temperature_step": 0.1, "temperature_max": 8.0}
    assert max(learned_entropy(control_of("uniform"))[-100:]) < 0.6
    for settings in (coefficient, temperature):
        late = learned_entropy(control_of("uniform", entropy_target=1.0, **settings))[-100:]
        assert sum(late) / 100 == pytest.approx(1.0, abs=0.05) and max(late) - min(late) < 0.2
