"""Two and four processes against one: gradients, parameters, histograms; a sharded run with its store, end to end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from parallel_child import GROUP, STEPS, replay
from rounding import gradient_rounding
from safetensors.torch import load_file
from transformers import AutoConfig

from monitor.alerts.engine import AlertEngine
from monitor.metrics import METRICS
from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord
from monitor.signals.histograms import device_histograms
from monitor.store.check import check_store
from monitor.store.reader import open_store
from monitor.store.runs import get_run
from trainer.commands.train import parse_config
from trainer.config import ConfigError, TrainConfig
from trainer.flow import TokenBatch
from trainer.learning.batch import token_batch
from trainer.policy.policy import Policy
from trainer.policy.sources import BUILTIN, resolve_model
from trainer.runtime.action_state import ActionState
from trainer.runtime.build import prepare
from trainer.runtime.checkpoint import resume
from trainer.runtime.ranks import Ranks
from trainer.runtime.runs import _next_attempt
from trainer.train import sample_step

CHILD = Path(__file__).with_name("parallel_child.py")


def torchrun(
    *command: str, cwd: Path | None = None, timeout: float = 150, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command],
        capture_output=True, text=True, timeout=timeout, check=False, cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, str(CHILD.parent)])},
    )  # fmt: skip


@pytest.fixture(scope="module")
def batch(tmp_path_factory) -> tuple[TokenBatch, Path]:
    """Real rollouts of four groups; a token outside what the policy samples now makes ratios differ from 1."""
    config = parse_config(
        ["--rollout.prompts", "4", "--rollout.group-size", str(GROUP), "--rollout.temperature", "1.5"]
    )
    parts = prepare(config)
    rollouts, scored = sample_step(parts)
    made = token_batch(rollouts, scored, 1.0, config)
    assert made.advantages.abs().sum() > 0
    path = tmp_path_factory.mktemp("batch") / "batch.pt"
    torch.save({spec.name: getattr(made, spec.name) for spec in fields(made)}, path)
    return made, path


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Norm of the difference over the norm of theirs, in float64."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    return float(torch.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)))


@pytest.mark.parametrize(
    ("loss", "micro_batch", "mode", "kind", "processes"),
    [
        ("grpo", 256, "replicate", "ict", 2),
        ("dapo", GROUP, "replicate", "ict_budget", 2),
        ("gspo", GROUP - 1, "replicate", "ict", 2),
        ("grpo", 3, "shard", "entropy_budget", 2),
        ("grpo", GROUP, "shard", "ict_budget", 4),
    ],
)
def test_several_processes_make_the_update_of_one(batch, tmp_path, loss, micro_batch, mode, kind, processes):
    """Denominators are those of the step, gradients are summed: splits over ranks and micro-batches change nothing."""
    made, path = batch
    done = torchrun(
        str(CHILD), str(path), str(tmp_path / "out"), loss, str(micro_batch), mode, kind, processes=processes
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"out.{rank}", weights_only=False) for rank in range(processes)]
    single = replay(made, Ranks(), loss, 256, "replicate", kind)
    tokens = int(made.mask.sum())
    allowed = gradient_rounding(AutoConfig.from_pretrained(BUILTIN["builtin"]), made.input_ids.shape[1], tokens)
    # a token whose step changes the entropy by less than rounding may change sides
    assert ((torch.cat([rank["weights"] for rank in ranks]) - single["weights"]).abs() > 1e-4).sum() <= 0.01 * tokens
    for rank in ranks:
        assert difference(rank["gradients"], single["gradients"]) < allowed
        assert difference(rank["parameters"], single["parameters"]) < allowed
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["parameters"], ranks[1]["parameters"], strict=True))
    both = [rank["record"] for rank in ranks]
    assert both[0].scalars == both[1].scalars  # means and shares are those of all ranks
    for key, value in single["record"].scalars.items():
        assert both[0].scalars[key] == pytest.approx(value, rel=STEPS * allowed, abs=1e-6), key
    merged_are_those_of_the_concatenated_tokens(ranks)


def merged_are_those_of_the_concatenated_tokens(ranks):
    for metric in ("entropy", "deviation", "weight"):
        merged = sum(h.counts for r in ranks for h in r["record"].histograms if (h.metric, h.split) == (metric, "all"))
        values = torch.from_numpy(np.concatenate([getattr(rank["tokens"], metric) for rank in ranks]))
        joined = device_histograms(values, torch.ones(1, len(values), dtype=torch.bool), METRICS[metric].edges)
        np.testing.assert_array_equal(merged, joined.counts[0].numpy())
        assert int(merged.sum()) == len(values) > 100


def test_a_sharded_run_records_every_rank_and_resumes(tmp_path, crowded_folder):
    store = tmp_path / "store"
    options = ("--threads 1 --rollout.prompts 4 --rollout.group-size 4 --eval.every 2 --eval.prompts 3 "
               "--eval.samples 4 --weighting.warmup-steps 1 --checkpoint.every 1 --checkpoint.background always "
               "--shard").split()  # fmt: skip
    train = ["--no-python", "--", str(Path(sys.executable).with_name("rlvr")), "train"]
    done = torchrun(*train, *options, "--steps", "2", "--store", str(store), "--run", "two", cwd=crowded_folder)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [path.name for path in (store / "checkpoints" / "two").iterdir()]
    assert sorted(made) == ["step-00000001", "step-00000002"]  # the first was written while step 2 was trained
    done = torchrun(*train, "--resume", "two", "--steps", "3", "--store", str(store), cwd=crowded_folder)
    assert done.returncode == 0 and "goes on at step 3" in done.stderr, done.stderr[-3000:]
    with open_store(store) as opened:
        counts = opened.sql("SELECT step, rank, count(*) FROM tokens GROUP BY ALL ORDER BY ALL").rows
        assert [row[:2] for row in counts] == [(step, rank) for step in (1, 2, 3) for rank in (0, 1)]
        told = dict(opened.sql("SELECT step, value FROM steps WHERE name = 'tokens' AND rank = 0").rows)
        assert told == {step: sum(n for s, _, n in counts if s == step) for step in (1, 2, 3)}
        judged = opened.sql("SELECT step, value FROM steps WHERE name = 'eval/heldout/pass@1' ORDER BY ALL").rows
        assert [step for step, _ in judged] == [0, 0, 2, 2, 3, 3]  # on both ranks, and the same
        assert all(a == b and (12 * a[1]) % 1 == 0 for a, b in zip(judged[::2], judged[1::2], strict=True))  # 3 x 4
        assert opened.run("two").status == "finished"
    assert json.loads((store / "runs" / "two" / "run.json").read_text())["environment"]["processes"] == 2
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(store / "policies" / "two")
    assert sum(p.numel() for p in model.parameters()) > 5e5
    other_numbers_of_processes_go_on(store, train, crowded_folder)


def other_numbers_of_processes_go_on(store, train, folder):
    """One process goes on at the checkpoint of step 2, then four; what the first attempts had beyond it gives way."""
    shutil.rmtree(store / "checkpoints" / "two" / "step-00000003")
    before = load_file(store / "checkpoints" / "two" / "step-00000002" / "parameters.safetensors")
    moments = load_file(store / "checkpoints" / "two" / "step-00000002" / "optimizer.safetensors")
    config = TrainConfig.of_run(get_run(store, "two").info["config"])
    parts = prepare(config)
    engine = AlertEngine(warmup_steps=1)
    assert resume(store / "checkpoints" / "two", parts, engine, ActionState()) == 2
    trained = parts.policy.trained()
    assert all(torch.equal(trained[name], value) for name, value in before.items()) and len(before) == len(trained)
    state = parts.updater.optimizer.state
    assert all(torch.equal(state[trained[name]]["exp_avg"], moments[f"{name}/exp_avg"]) for name in trained)
    command = [str(Path(sys.executable).with_name("rlvr")), "train", "--resume", "two", "--store", str(store)]
    done = subprocess.run([*command, "--steps", "4"], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0 and "goes on at step 3" in done.stderr, done.stderr[-3000:]
    assert "was saved by 2 processes and 1 go on: they draw new random numbers" in done.stderr
    done = torchrun(*train, "--resume", "two", "--steps", "5", "--store", str(store), cwd=folder, processes=4)
    assert done.returncode == 0 and "goes on at step 5" in done.stderr, done.stderr[-3000:]
    with open_store(store) as opened:
        steps = opened.sql("SELECT DISTINCT step, rank, attempt FROM tokens ORDER BY ALL").rows
        fourth = [(5, rank, 4) for rank in range(4)]
        assert steps == [(1, 0, 1), (1, 1, 1), (2, 0, 1), (2, 1, 1), (3, 0, 3), (4, 0, 3), *fourth]
        assert (opened.run("two").status, opened.run("two").acknowledged) == ("finished", 5)
    assert [finding for finding in check_store(store) if finding.damage] == []


def test_an_old_rank_that_still_writes_is_not_overrun(tmp_path):
    """A resume with fewer processes takes the locks of those alone: the other old ranks must be gone."""
    for rank in (0, 1):
        recorder = Recorder(tmp_path, RunInfo("a"), rank=rank)
        recorder.record(StepRecord(1, {"reward": 0.0}))
        recorder.close() if rank == 0 else recorder.flush(10)
    told = _next_attempt(str(tmp_path), "a", Ranks())
    assert str(told).startswith("Cannot resume run 'a' with 1 processes: rank 1, process ")
    recorder.close()
    assert _next_attempt(str(tmp_path), "a", Ranks()) == 2


def test_prompts_that_do_not_divide_are_refused():
    config = parse_config(["--rollout.prompts", "5"])
    with pytest.raises(ValueError, match=r"prompts is 5 for 2 processes.* to 4 or 6, or another multiple of 2"):
        prepare(config, Ranks(0, 2))
    config = parse_config(["--rollout.prompts", "6", "--optim.mini-batches", "4"])
    with pytest.raises(ValueError, match=r"batches is 4 .* has 3 of the 6 groups.* to 3 or less, or .* to 8 or more"):
        prepare(config, Ranks(0, 2))
    prepare(parse_config(["--rollout.prompts", "6", "--optim.mini-batches", "2"]), Ranks(0, 2))


def test_two_processes_act_on_an_alert_alike(tmp_path, crowded_folder):
    """A rate of 3e-3 ruins the small policy; rank 0 judges, both go back, lower the rate and stop at the same step."""
    store, alerts = tmp_path / "store", tmp_path / "alerts.toml"
    alerts.write_text("".join(f'[[actions]]\ndo = "{do}"\n' for do in ("go_back", "lower_lr", "stop")))
    options = (
        f"--model builtin-small --threads 1 --steps 12 --rollout.prompts 4 --rollout.group-size 8 --eval.every 0 "
        f"--weighting.kind uniform --weighting.warmup-steps 0 --optim.lr 3e-3 --alerts {alerts} --store {store}"
    ).split()
    rlvr = str(Path(sys.executable).with_name("rlvr"))
    done = torchrun("--no-python", "--", rlvr, "train", *options, "--run", "acts", cwd=crowded_folder)
    assert "stop for" in done.stderr and "exitcode  : 3" in done.stderr, done.stderr[-3000:]
    with open_store(store) as opened:
        told = opened.sql("SELECT rank, step, message FROM events WHERE kind = 'action' ORDER BY step, ts").rows
        ends = opened.sql("SELECT rank, max(step) FROM steps WHERE name = 'reward' GROUP BY ALL ORDER BY ALL").rows
        assert opened.run("acts").status == "stopped"
    step = told[0][1]
    assert [(rank, at, text.split(" ")[0]) for rank, at, text in told] == [
        (0, step, "go_back"), (0, step, "lower_lr"), (0, step, "stop"),
    ]  # fmt: skip
    assert ends == [(0, step), (1, step)]


def test_layers_gathered_in_bfloat16_halve_the_traffic(batch, tmp_path):
    """Same passes, half the bytes of each layer. What rounding changes is near what autocast alone changes."""
    made, path = batch
    found = {}
    for mode in ("shard", "shard-half"):
        done = torchrun(str(CHILD), str(path), str(tmp_path / mode), "grpo", "3", mode, "uniform")
        assert done.returncode == 0, done.stderr[-3000:]
        found[mode] = torch.load(tmp_path / f"{mode}.0", weights_only=False)
    half, full = found["shard-half"], found["shard"]
    model = Policy.load(resolve_model("builtin"), torch.device("cpu")).model
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    passes = full["gathered"].pop(4 * layer)
    assert half["gathered"].pop(2 * layer) == passes > 20
    assert (
        half["gathered"] == full["gathered"] and len(half["gathered"]) == 1
    )  # embedding, head and last norm: as before
    assert half["kept"] == half["reduced"] == {torch.float32}  # master weights, and sums of gradients
    exact, rounded = (replay(made, Ranks(), "grpo", 256, mode, "uniform")["gradients"] for mode in ("whole", "half"))
    alone = difference(rounded, exact)
    assert 1e-3 < difference(half["gradients"], exact) < 1.5 * alone < 0.06  # alone: 0.033


def test_what_cannot_be_gathered_in_bfloat16_is_refused():
    with pytest.raises(ConfigError, match=r"shard_gather is 'bfloat16' with shard false.* Add --shard"):
        TrainConfig(shard_gather="bfloat16")
    with pytest.raises(ConfigError, match=r"probe_every is 10 with shard_gather 'bfloat16'.* Set record.probe_every"):
        TrainConfig(shard=True, shard_gather="bfloat16")
    TrainConfig(shard=True, shard_gather="bfloat16", record={"probe_every": 0})
