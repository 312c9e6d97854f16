"""8-bit moments: a float64 oracle, how far from float32 AdamW, bytes beside the plan's, checkpoints, refusals."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import SMALL
from torch import Tensor

from monitor import extras
from monitor.alerts.engine import AlertEngine
from monitor.errors import MissingPackageError
from trainer.commands.train import parse_config
from trainer.config import ConfigError, OptimConfig, TrainConfig
from trainer.learning.optimizers import BLOCK, make_optimizer, moment_bytes
from trainer.plan import Device, memory_plan
from trainer.policy.imagined import Passes
from trainer.policy.shapes import model_shape
from trainer.runtime import checkpoint
from trainer.runtime.action_state import ActionState
from trainer.runtime.build import Parts, prepare
from trainer.train import sample_step, token_batch

LR, DECAY, STEPS = 1e-3, 0.1, 5
CELL = 2 / 65_536  # bitsandbytes finds a value on a CPU by a table of 65,536 cells from -1 to 1: it may err by one
SHAPES = ((96, 64), (83, 61), (40,))  # whole blocks; a last block of 199; fewer than 4,096 numbers: float32 moments


def optimizer_of(kind: str) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return make_optimizer(OptimConfig(kind=kind, lr=LR, weight_decay=DECAY), parameters), parameters


def gradients_of(step: int) -> list[Tensor]:
    """Gradients whose sizes differ by a decade within a block, and by a factor of three between steps."""
    now, always = torch.Generator().manual_seed(step), torch.Generator().manual_seed(99)
    return [
        torch.randn(shape, generator=always).sign()
        * 10 ** (torch.rand(shape, generator=always) - 4)
        * (0.5 + torch.rand(shape, generator=now))
        for shape in SHAPES
    ]


def stepped(kind: str, steps: int) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    optimizer, parameters = optimizer_of(kind)
    for step in range(1, steps + 1):
        for p, gradient in zip(parameters, gradients_of(step), strict=True):
            p.grad = gradient
        optimizer.step()
    return optimizer, parameters


def rounded(moment: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(the moment as 8 bits hold it, the most that rounding moves each number), float64 [like moment]."""
    blocks = torch.nn.functional.pad(moment.flatten(), (0, -moment.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-300)
    share = (blocks / scale).contiguous()
    above = torch.searchsorted(values, share).clamp(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    nearest = torch.where(share - low <= high - share, low, high)
    return tuple((x * scale).flatten()[: moment.numel()].view_as(moment) for x in (nearest, (high - low) / 2 + CELL))


@pytest.mark.parametrize("tensor", [0, 1])
def test_the_update_is_adamw_on_rounded_moments(tensor):
    """Oracle: AdamW in float64 (Loshchilov & Hutter) whose moments are rounded in blocks after each update."""
    optimizer, parameters = stepped("adamw_8bit", STEPS)
    state = optimizer.state[parameters[tensor]]
    maps = [state["qmap1"].double(), state["qmap2"].double()]
    p = optimizer_of("adamw")[1][tensor].detach().double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, STEPS + 1):
        gradient = gradients_of(step)[tensor].double()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        p *= 1 - LR * DECAY
        p -= LR * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        m, v = rounded(m, maps[0])[0], rounded(v, maps[1])[0]
    off = (parameters[tensor].detach().double() - p).abs() / LR
    # values lie about 0.01 apart, so a cell decides 0.3 % of what is rounded: 8 times in five updates, 2.4 %
    assert (off > 1e-3).float().mean() < 0.04
    assert off.median() < 3e-4  # parameters of size 1 in float32: 6e-8 in an update of 1e-3, five times


def test_near_float32_adamw_within_the_rounding_of_its_moments():
    """The first update is AdamW's own: nothing was rounded yet. The second differs by what rounding moved its moments.

    With errors e_m and e_v of the first moments, |m2 - m2'| <= 0.9 e_m and v2' >= v2 - 0.999 e_v, so the update moves
    by at most lr / 0.19 (0.9 e_m / root + |m2| (1 / root - 1 / exact)), root and exact the two denominators.
    """
    first, second = stepped("adamw_8bit", 1)[1], stepped("adamw_8bit", 2)
    for ours, exact in zip(first, stepped("adamw", 1)[1], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-7)
    for tensor, exact in list(enumerate(stepped("adamw", 2)[1]))[:2]:
        state = second[0].state[second[1][tensor]]
        g1, g2 = (gradients_of(step)[tensor].double() for step in (1, 2))
        m1, v1 = 0.1 * g1, 0.001 * g1**2
        (_, e_m), (_, e_v) = rounded(m1, state["qmap1"].double()), rounded(v1, state["qmap2"].double())
        m2, v2 = (0.9 * m1 + 0.1 * g2).abs(), 0.999 * v1 + 0.001 * g2**2
        root, whole = (((x / (1 - 0.999**2)).sqrt() + 1e-8) for x in ((v2 - 0.999 * e_v).clamp(min=0), v2))
        bound = LR / 0.19 * (0.9 * e_m / root + m2 * (1 / root - 1 / whole))
        off = (second[1][tensor].detach().double() - exact.detach().double()).abs()
        assert (off <= bound + 1e-6).all() and off.max() > 1e-6 and bound.median() < 0.1 * LR
    many, exact = stepped("adamw_8bit", STEPS)[1], stepped("adamw", STEPS)[1]
    start = optimizer_of("adamw")[1]
    assert torch.equal(many[2], exact[2]) or (many[2] - exact[2]).abs().max() < 1e-6  # too small for 8 bits
    for ours, theirs, before in list(zip(many, exact, start, strict=True))[:2]:
        moved = (theirs - before).norm()
        assert (ours - theirs).norm() < 0.02 * moved  # 0.01 here


def test_moments_are_8_bits_and_take_what_the_plan_says():
    """On the built-in policy, after real updates: 2 bytes a parameter and a float32 scale for 256 of each moment."""
    parts = trained_parts("adamw_8bit", 2)
    state = parts.updater.optimizer.state
    held = 0
    for p in parts.policy.trained().values():
        assert state[p]["state1"].dtype == (torch.uint8 if p.numel() >= 4096 else torch.float32)
        held += sum(v.numel() * v.element_size() for k, v in state[p].items() if k[:4] in ("stat", "absm"))
    plan = memory_plan(parts.config, Passes(model_shape("builtin")), 4, Device(1 << 40, cuda=False))
    assert plan.phases["update"]["optimizer"] == held
    numbers = sum(p.numel() for p in parts.policy.trained().values())
    assert 2 * numbers < held < 2.1 * numbers  # 2 + 8 / 256, and norms in float32
    assert moment_bytes(parts.config.optim, 5_000) == 2 * (5_000 + 4 * 20)
    assert moment_bytes(parts.config.optim, 4_095) == moment_bytes(OptimConfig(), 4_095) == 8 * 4_095


def trained_parts(kind: str, steps: int, *options: str) -> Parts:
    parts = prepare(parse_config([*SMALL, "--optim.kind", kind, "--steps", "9", *options]))
    train_on(parts, 1, steps)
    return parts


def train_on(parts: Parts, first: int, last: int) -> None:
    for step in range(first, last + 1):
        rollouts, scored = sample_step(parts)
        parts.updater.update(token_batch(rollouts, scored, parts.task.correct_at, parts.config), step)


@pytest.mark.parametrize("background", ["always", "never"])
def test_a_run_goes_on_bit_identically(tmp_path, background):
    """Saved after step 2 and trained on to step 4, beside one that goes on from there, with a falling rate."""
    options = ["--optim.schedule", "cosine", "--checkpoint.background", background]
    parts, engine, actions = trained_parts("adamw_8bit", 2, *options), AlertEngine(), ActionState()
    checkpoints = checkpoint.Checkpoints(tmp_path, parts, None, engine, parts.config.checkpoint, actions)
    writing = checkpoints._begun(2)
    if background == "never":
        writing.run()
    train_on(parts, 3, 4)  # a copy in the background must not see it
    if background == "always":
        writing.run()
    kept = load_file(checkpoints._published(writing) / "optimizer.safetensors")
    assert {key.rpartition("/")[2] for key in kept} == {"state1", "state2", "absmax1", "absmax2", "step"}
    other = trained_parts("adamw_8bit", 0, *options)
    assert checkpoint.resume(tmp_path, other, engine, actions) == 2
    train_on(other, 3, 4)
    for (name, p), q in zip(parts.policy.trained().items(), other.policy.trained().values(), strict=True):
        assert torch.equal(p, q), name
        ours, theirs = parts.updater.optimizer.state[p], other.updater.optimizer.state[q]
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"] == 4
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() - {"step"})
    checkpoints.restore_policy(2)  # what an action does that goes back
    assert parts.updater.optimizer.state[parts.updater.trained[0]]["step"] == 2


def test_moments_of_another_shape_are_refused(tmp_path, caplog):
    parts, engine, actions = trained_parts("adamw_8bit", 1), AlertEngine(), ActionState()
    saved = checkpoint.Checkpoints(tmp_path, parts, None, engine, parts.config.checkpoint, actions).save(1)
    kept = load_file(saved / "optimizer.safetensors")
    name = next(key for key in kept if key.endswith("absmax1"))
    save_file(kept | {name: kept[name][:-1].clone()}, saved / "optimizer.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="None of the 1 checkpoints"):
        checkpoint.resume(tmp_path, parts, engine, actions)
    assert "optimizer's state is not the model's: 1 differ" in caplog.text


def test_what_cannot_be_is_refused_before_the_run(monkeypatch):
    with pytest.raises(ConfigError, match=r"adamw_8bit' with shard true.* Set optim.kind to adamw.*leave out --shard"):
        TrainConfig(shard=True, optim={"kind": "adamw_8bit"})
    monkeypatch.setattr(extras, "_installed", lambda module: module != "bitsandbytes")
    told = r'optim.kind adamw_8bit needs bitsandbytes, .* Type: pip install "rlvr-monitor\[bitsandbytes\]"'
    with pytest.raises(MissingPackageError, match=told):
        prepare(TrainConfig(optim={"kind": "adamw_8bit"}))
    prepare(TrainConfig(model="builtin-small"))
