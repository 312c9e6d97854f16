"""A short real run of every weighting: the recorded tokens and advantages alone give the recorded weights again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from weighting_inputs import KINDS, inputs_of, signals_of

from monitor.store.reader import open_store
from trainer.commands.train import main
from trainer.config import WEIGHTINGS, Budget, make_weighting
from trainer.learning.weightings import WeightInputs, token_weights

SMALL = (
    "--threads 1 --steps 3 --eval.every 0 --rollout.prompts 2 --rollout.group-size 4 --weighting.warmup-steps 0 "
    "--optim.mini-batches 2 --loss.kind dapo"
).split()
SETTINGS = {  # chosen so that each acts on the built-in policy within three steps
    "stapo": {"max_probability": 0.3},
    "rsi": {"low": -2.0, "high": 0.9},
    "stare": {"target_entropy": 9.0},
    "clip_cov": {"share": 0.05, "low": 0.1},
    "divergence": {"ramp_steps": 1.0},
}
COLUMNS = ("logprob", "entropy", "deviation", "alive", "weight")


def recorded(opened, run: str, step: int) -> tuple[WeightInputs, torch.Tensor, dict[str, float]]:
    """The inputs of a step's weighting as the store has them, the weights, and the step's scalars."""

    def rows(query: str) -> list[tuple]:
        return [tuple(row) for row in opened.sql(f"{query} WHERE run = '{run}' AND step = {step} ORDER BY 1").rows]

    tokens = np.array(rows(f"SELECT sample, position, {', '.join(COLUMNS)} FROM tokens"), dtype=np.float64)
    advantages = [row[1] for row in rows("SELECT sample, advantage FROM samples")]
    sample, position = tokens[:, 0].astype(int), tokens[:, 1].astype(int)
    grids = np.zeros((len(COLUMNS), len(advantages), position.max() + 1))
    grids[:, sample, position] = tokens[:, 2:].T
    mask = np.zeros(grids.shape[1:], dtype=bool)
    mask[sample, position] = True
    logprob, entropy, deviation, alive, weight = torch.tensor(grids, dtype=torch.float32)
    signals = signals_of(logprob=logprob, entropy=entropy, deviation=deviation, alive=alive.int())
    inputs = inputs_of(signals, torch.tensor(mask), advantages, steps_active=step)
    return inputs, weight, dict(rows("SELECT name, value FROM steps"))


def follows_its_rule(kind: str, inputs: WeightInputs, weight: torch.Tensor, scalars: dict[str, float]) -> bool:
    """The weights that the record gives again; of kinds that need more than the record, what is known of them."""
    mask = inputs.mask
    if (
        kind.endswith("_budget") or kind == "opefo"
    ):  # the recorded flow is that of the weights, whose mean it is divided by
        net, kept = (
            sum(scalars[f"predicted_entropy_{side}{how}"] for side in ("lowering", "raising"))
            for how in ("", "_weighted")
        )
        expected = 0.0 if kind == "opefo" else net if net >= 0 else 0.3 * net
        return kept * scalars["weight_mean"] == pytest.approx(expected, rel=1e-4, abs=1e-8)
    if kind == "random_undecided":
        undecided = inputs.undecided(0.05)
        expected = torch.ceil(undecided.sum(1) * 0.1 - 1e-6)
        return torch.equal(weight.sum(1), expected) and bool((weight[~undecided] == 0).all())
    if kind == "random":
        return torch.equal(weight.sum(1), torch.ceil(mask.sum(1) * 0.1 - 1e-6))
    if kind == "clip_cov":
        return bool((mask & (weight == 0)).sum() <= mask.sum() * 0.05) and set(weight.unique().tolist()) == {0, 1}
    if kind == "divergence":
        return bool(((weight >= 1 - 1e-6) & (weight <= 1.15))[mask].all() and weight.max() > 1)
    if kind == "attention":
        return torch.allclose(weight.sum(1), mask.sum(1).float(), rtol=1e-4) and weight[mask].unique().numel() > 100
    return torch.allclose(
        weight, token_weights(inputs, make_weighting({"kind": kind, **SETTINGS.get(kind, {})})), atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_each_kind_records_its_weights(tmp_path, kind):
    options = [text for name, value in SETTINGS.get(kind, {}).items() for text in (f"--weighting.{name}", str(value))]
    assert main([*SMALL, "--store", str(tmp_path), "--run", kind, "--weighting.kind", kind, *options]) == 0
    with open_store(tmp_path) as opened:
        steps = [recorded(opened, kind, step) for step in (1, 2, 3)]
    for inputs, weight, scalars in steps:
        assert follows_its_rule(kind, inputs, weight, scalars)
        assert scalars.get("budget_share") == (0.3 if issubclass(WEIGHTINGS[kind], Budget) else None)
        used = weight[inputs.mask].double()
        effective = float(used.sum() ** 2 / (len(used) * (used**2).sum()))
        assert scalars["weight_mean"] == pytest.approx(float(used.mean()), rel=1e-5)
        assert scalars["effective_sample_share"] == pytest.approx(effective, rel=1e-5)
        assert scalars["selected_share"] == pytest.approx(float((used != 0).double().mean()))
    acted = any((weight[inputs.mask] != 1).any() for inputs, weight, _ in steps)
    assert acted == (kind not in ("uniform", "kl_cov"))


def test_the_settings_above_are_of_known_kinds():
    assert SETTINGS.keys() <= WEIGHTINGS.keys()
