"""verl's plugin, against the installed verl: its plugin loader, Tracking, DataProto and trainers' methods.

Each script runs in a process of its own, because verl loads plugins when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlvr_monitor
from monitor.children import HOME

needs_verl = pytest.mark.skipif(
    find_spec("verl") is None,
    reason="verl is not installed: pip install --no-deps verl==0.9.1 into an environment of its own runs these tests",
)
# two prompts of two rollouts; response lengths 3, 2, 3, 1
BATCH = """
import numpy as np, torch
from verl import DataProto
torch.manual_seed(0)
mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
entropys = torch.rand(4, 3)
old = -torch.rand(4, 3)
rollout = old + 0.01
scores = torch.zeros(4, 3); scores[0, 2] = 1.0; scores[2, 2] = 1.0; scores[3, 0] = 0.5
advantages = torch.tensor([[1.0], [-1.0], [0.5], [-0.5]]) * mask
tensors = dict(prompts=torch.tensor([[7, 7], [7, 7], [8, 8], [8, 8]]), responses=torch.arange(12).view(4, 3),
               response_mask=mask, attention_mask=torch.cat([torch.ones(4, 2).long(), mask], 1),
               old_log_probs=old, rollout_log_probs=rollout, advantages=advantages, returns=advantages,
               token_level_scores=scores, token_level_rewards=scores)
uids = np.array(["b", "b", "a", "a"], dtype=object)
"""


def run(tmp_path: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script where our entry points are those of an installed distribution."""
    (tmp_path / "site").mkdir(exist_ok=True)
    info = tmp_path / "site" / "rlvr_monitor_under_test-0.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rlvr-monitor-under-test\nVersion: 0.0\n")
    points = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    lines = [f"{name} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[verl.plugins]", *lines, ""]))
    settings = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(HOME)])} | environment
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done


def ask(tmp_path: Path, query: str) -> list[tuple[Any, ...]]:
    with rlvr_monitor.open_store(tmp_path / "runs") as opened:
        return list(opened.sql(query).rows)


def scalars(tmp_path: Path, step: int = 1) -> dict[str, float]:
    return dict(ask(tmp_path, f"SELECT name, value FROM steps WHERE step = {step}"))


def test_the_entry_point_names_a_module_that_is_there():
    points = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    assert points == {"rlvr": "rlvr_monitor.verl"} and find_spec("rlvr_monitor.verl") is not None


@needs_verl
def test_installed_means_available_and_scalars_are_recorded(tmp_path):
    script = """
from verl.utils.tracking import Tracking  # imports verl, which loads the plugin
config = {"trainer": {"rlvr": {"store": "runs"}}, "data": {"seed": 3},
          "actor_rollout_ref": {"model": {"path": "tiny"}, "rollout": {"temperature": 0.7}}}
tracking = Tracking("project", "my experiment", ["console", "rlvr"], config)
for step in (1, 2):
    tracking.log({"actor/entropy": 0.5 / step, "critic/score/mean": 0.25, "critic/rewards/mean": 9.0,
                  "training/global_step": step, "timing_s/gen": 1.5, "val-core/math/acc/mean@4": 0.1, "text": "x"},
                 step)
tracking.finish()
"""
    run(tmp_path, script)
    assert scalars(tmp_path, 2) == pytest.approx({
        "entropy": 0.25, "reward": 0.25, "critic/rewards/mean": 9.0, "timing_s/gen": 1.5, "eval/math/pass@1": 0.1,
        "perf/queue": scalars(tmp_path, 2)["perf/queue"],
    })  # fmt: skip
    info = json.loads((tmp_path / "runs/runs/my-experiment/run.json").read_text())
    assert (info["model"], info["seed"], info["task"]) == ("tiny", 3, "project")
    assert info["config"]["verl"]["actor_rollout_ref"]["rollout"] == {"temperature": 0.7}
    assert info["environment"]["packages"]["verl"]
    with rlvr_monitor.open_store(tmp_path / "runs") as opened:
        assert opened.run("my-experiment").status == "finished"


@needs_verl
def test_without_the_logger_nothing_of_ours_is_imported_or_written(tmp_path):
    script = """
import sys
from verl.utils.tracking import Tracking
Tracking("p", "e", ["console"], {"trainer": {}}).finish()
assert "rlvr" in Tracking.supported_backend
heavy = [name for name in sys.modules if name in ("duckdb", "monitor.recorder", "monitor.signals")]
assert not heavy, heavy
"""
    run(tmp_path, script)
    assert not (tmp_path / "runs").exists()


@needs_verl
def test_a_wrong_option_is_told_and_the_name_gets_a_number_or_goes_on(tmp_path):
    script = """
from monitor.errors import MonitorError
from verl.utils.tracking import Tracking
try:
    Tracking("p", "e", "rlvr", {"trainer": {"rlvr": {"sore": 1}}})
except MonitorError as error:
    assert "trainer.rlvr has sore, expected some of store, run" in str(error), error
for options in ({}, {}, {"run": "e", "resume": True}):
    tracking = Tracking("p", "e", "rlvr", {"trainer": {"rlvr": options}})
    tracking.log({"reward": 1.0}, 1)
    tracking.finish(exit_code=1)
"""
    run(tmp_path, script, RLVR_STORE=str(tmp_path / "runs"))
    assert ask(tmp_path, "SELECT DISTINCT run, attempt FROM steps ORDER BY 1, 2") == [("e", 2), ("e-2", 1)]
    with rlvr_monitor.open_store(tmp_path / "runs") as opened:
        assert opened.run("e").status == "failed"


def check_tokens(tmp_path: Path, numbers: Path) -> None:
    """The tokens of BATCH, whose tensors the script has saved."""
    saved = np.load(numbers)
    mask = saved["mask"].astype(bool)
    rows = ask(tmp_path, "SELECT sample, position, token_id, logprob, entropy, deviation, alive, weight FROM tokens "
               "WHERE step = 1 ORDER BY sample, position")  # fmt: skip
    assert len(rows) == 9  # 3 + 2 + 3 + 1
    sample, position, ids, logprob, entropy, deviation, alive, weight = (
        np.array(column) for column in zip(*rows, strict=True)
    )
    assert ids.tolist() == (3 * sample + position).tolist()
    assert logprob == pytest.approx(saved["old"][mask], abs=1e-6)
    assert entropy == pytest.approx(saved["entropys"][mask], abs=1e-6)
    assert np.isnan(np.array(deviation, float)).all() and set(weight) == {1.0}
    assert alive.tolist() == [2, 2, 1, 2, 2, 2, 1, 1, 2]  # groups of rows 0, 1 and 2, 3
    found = scalars(tmp_path)
    assert found["entropy"] == pytest.approx(saved["entropys"][mask].mean(), abs=1e-6)
    assert found["sampler_mismatch"] == pytest.approx(0.01, abs=1e-6)  # old - rollout everywhere
    assert found["reward"] == pytest.approx(2.5 / 4) and found["correct_share"] == 0.5
    assert (found["zero_variance_share"], found["temperature"]) == (0.0, 0.7)
    a = np.repeat([1.0, -1.0, 0.5, -0.5], mask.sum(1))
    assert found["logprob_advantage_cov"] == pytest.approx(np.cov(saved["old"][mask], a, bias=True)[0, 1], abs=1e-6)
    assert found["grad_norm"] == 2.0
    samples = ask(
        tmp_path, "SELECT group_id, reward, advantage, n_tokens, prompt, completion FROM samples ORDER BY sample"
    )
    assert [row[:4] for row in samples] == [(1, 1.0, 1.0, 3), (1, 0.0, -1.0, 2), (0, 1.0, 0.5, 3), (0, 0.5, -0.5, 1)]
    assert (samples[0][4], samples[1][5]) == ("7 7", "3 4")
    assert ask(tmp_path, "SELECT message FROM events WHERE kind = 'verl_error'") == []


TOKENIZER = """
class Tokenizer:
    def decode(self, ids, **_):
        return " ".join(str(int(i)) for i in ids)
    def batch_decode(self, rows, **_):
        return [self.decode(row) for row in rows]
"""
CONFIG = '{"trainer": {}, "actor_rollout_ref": {"rollout": {"temperature": 0.7}}}'


@needs_verl
def test_the_ray_trainers_batch_gives_its_tokens(tmp_path):
    script = f"""{BATCH}{TOKENIZER}
import verl.trainer.ppo.ray_trainer as module
from verl.utils.tracking import Tracking
trainer = object.__new__(module.RayPPOTrainer)  # without workers; the methods are its own
trainer.tokenizer = Tokenizer()
module.RayPPOTrainer._compute_old_log_prob = lambda self, batch: (DataProto.from_single_dict(
    {{"old_log_probs": old, "entropys": entropys}}), 0.0)
tracking = Tracking("p", "mine", ["rlvr"], {CONFIG})
batch = DataProto.from_dict(tensors=tensors, non_tensors={{"uid": uids}})
scored, _ = trainer._compute_old_log_prob(batch)
scored.batch.pop("entropys")  # as fit() does
metrics = module.compute_data_metrics(batch=batch, use_critic=False)
assert metrics["critic/score/mean"] == 0.625
tracking.log({{**metrics, "actor/grad_norm": 2.0, "actor/entropy": 99.0}}, 1)
tracking.finish()
np.savez("numbers.npz", mask=mask, old=old, entropys=entropys)
"""
    run(tmp_path, script, RLVR_STORE=str(tmp_path / "runs"))
    check_tokens(tmp_path, tmp_path / "numbers.npz")
    assert scalars(tmp_path)["response_length"] == 2.25 and "critic/score/max" in scalars(tmp_path)


@needs_verl
@pytest.mark.skipif(find_spec("transfer_queue") is None, reason="transfer_queue is not installed")
def test_the_v1_trainers_batch_gives_its_tokens_before_its_queue_is_cleared(tmp_path):
    script = f"""{BATCH}{TOKENIZER}
from types import SimpleNamespace
from tensordict import TensorDict
import transfer_queue as tq
import verl.trainer.ppo.v1.trainer_base as module
from verl.utils.tracking import Tracking
lengths = mask.sum(1).tolist() + [3]  # a row of padding at the end

def nested(tensor):
    rows = [row[:n] for row, n in zip(torch.cat([tensor, torch.zeros_like(tensor[:1])]), lengths)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

prompts = list(torch.cat([tensors["prompts"], torch.zeros(1, 2).long()]))
held = TensorDict({{
    "prompts": torch.nested.as_nested_tensor(prompts, layout=torch.jagged),
    "rm_scores": nested(scores), "entropy": nested(entropys),
    **{{name: nested(tensors[name]) for name in
        ("responses", "response_mask", "old_log_probs", "rollout_log_probs", "advantages")}},
    "uid": [*uids, "z"],
}}, batch_size=5)
tq.kv_batch_get = lambda keys, partition_id, select_fields: held.select(
    *[name for name in select_fields if name in held.keys()])
module.PPOTrainer._compute_metrics = lambda self, batch, metrics, timing_raw, global_steps, epoch: metrics.update(x=1.0)
trainer = SimpleNamespace(tokenizer=Tokenizer())
tracking = Tracking("p", "mine", ["rlvr"], {CONFIG})
metrics = {{"actor/grad_norm": 2.0, "actor/entropy": 99.0}}
batch = SimpleNamespace(keys=list("abcde"), partition_id="train", tags=[{{}}] * 4 + [{{"is_padding": True}}])
module.PPOTrainer._compute_metrics(trainer, batch, metrics, {{}}, global_steps=1, epoch=0)
tracking.log(metrics, 1)
tracking.finish()
np.savez("numbers.npz", mask=mask, old=old, entropys=entropys)
"""
    run(tmp_path, script, RLVR_STORE=str(tmp_path / "runs"))
    check_tokens(tmp_path, tmp_path / "numbers.npz")
    assert scalars(tmp_path)["x"] == 1.0


@needs_verl
def test_a_fault_in_the_batch_leaves_the_scalars_and_training(tmp_path):
    script = f"""{BATCH}
import verl.trainer.ppo.ray_trainer as module
from verl.utils.tracking import Tracking
tracking = Tracking("p", "mine", ["rlvr"], {CONFIG})
del tensors["response_mask"]
tensors["response_mask"] = mask
batch = DataProto.from_dict(tensors=tensors, non_tensors={{"uid": uids[:4]}})
for step in (1, 2):
    batch.batch["old_log_probs"] = old[:, :2]  # a shape that does not fit
    module.compute_data_metrics(batch=batch, use_critic=False)
    tracking.log({{"critic/score/mean": 0.5}}, step)
tracking.finish()
"""
    run(tmp_path, script, RLVR_STORE=str(tmp_path / "runs"))
    assert [scalars(tmp_path, step)["reward"] for step in (1, 2)] == [0.5, 0.5]
    ((text,),) = ask(tmp_path, "SELECT message FROM events WHERE kind = 'verl_error'")
    assert "has shape" in text and ask(tmp_path, "SELECT count(*) FROM tokens") == [(0,)]
