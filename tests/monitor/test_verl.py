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
import torch

import rlvr_monitor
from monitor.children import HOME
from monitor.integrations.verl.weights import MEANS, SUMS, OneProcess, batch_weights, token_advantages
from monitor.signals import token_signals
from trainer.learning.attached import FROM_LOGPROBS, AttachedWeighting

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


def test_advantages_of_tokens_by_hand():
    """Responses of 3 and 1 tokens; weights 1 0 2 and 4: 4 tokens, weights 7. Advantages 2 and -1."""
    weights, mask = torch.tensor([[1.0, 0.0, 2.0], [4.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    advantages = torch.tensor([[2.0, 2.0, 2.0], [-1.0, 0.0, 0.0]])

    def found(mean: str, normalise: str = "selected") -> torch.Tensor:
        return token_advantages(advantages, weights, mask, mean, normalise)

    plain = torch.tensor([[2.0, 0.0, 4.0], [-4.0, 0.0, 0.0]])  # w A
    assert found("token-mean").allclose(plain * 4 / 7)
    assert found("seq-mean-token-mean").tolist() == [[2.0, 0.0, 4.0], [-1.0, 0.0, 0.0]]  # 3 / 3 and 1 / 4
    assert all(torch.equal(found(mean), plain) for mean in SUMS)
    assert all(torch.equal(found(mean, "all"), plain) for mean in MEANS)


@pytest.mark.parametrize("kind", sorted(FROM_LOGPROBS))
def test_weights_need_no_more_than_logprobs_entropies_and_advantages(kind):
    """A batch that verl gives: the same weights as from whole signals, for each kind that is offered."""
    torch.manual_seed(1)
    logits, mask = torch.randn(4, 6, 9) * 2, torch.arange(6) < torch.tensor([[6], [4], [5], [1]])
    token_ids, advantages = torch.randint(0, 9, (4, 6)), torch.tensor([1.0, -1.0, 0.5, -0.5])
    whole = token_signals(logits, token_ids, mask, torch.tensor([0, 0, 1, 1]))
    text = f"{kind}:warmup_steps=0" + (",low=-1,high=0.5" if kind == "rsi" else "")
    tensors = {"old_log_probs": whole.logprob, "entropys": whole.entropy, "response_mask": mask.long(),
               "advantages": advantages.unsqueeze(1) * mask}  # fmt: skip
    found = batch_weights(tensors, AttachedWeighting(text, 3, 0, with_distributions=False), 1)
    expected = AttachedWeighting(text, 3, 0).weights(whole, mask, advantages, 1, OneProcess)
    assert torch.equal(found, expected) and found.sum() > 0
    tensors["entropys"] = whole.entropy[:, :3]
    with pytest.raises(ValueError, match=r"^no entropys of shape \[4, 6\], so the weights of step 1 are 1\.$"):
        batch_weights(tensors, AttachedWeighting(text, 3, 0, with_distributions=False), 1)


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
    assert np.isnan(np.array(deviation, float)).all()
    assert weight.tolist() == (saved["weights"][mask].tolist() if "weights" in saved else [1.0] * 9)
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


QUEUE = """
import ray, transfer_queue as tq
from types import SimpleNamespace
from tensordict import TensorDict
ray.init(num_cpus=32, include_dashboard=False, log_to_driver=False)  # logical ones: the queue asks for several
tq.init()
lengths = mask.sum(1).tolist() + [3]  # a row of padding at the end

def nested(tensor):
    rows = [row[:n] for row, n in zip(torch.cat([tensor, torch.zeros_like(tensor[:1])]), lengths)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

prompts = list(torch.cat([tensors["prompts"], torch.zeros(1, 2).long()]))
fields = TensorDict({
    "prompts": torch.nested.as_nested_tensor(prompts, layout=torch.jagged),
    "rm_scores": nested(scores), "entropy": nested(entropys),
    **{name: nested(tensors[name]) for name in
        ("responses", "response_mask", "old_log_probs", "rollout_log_probs", "advantages")},
    "uid": [*uids, "z"],
}, batch_size=5)
batch = SimpleNamespace(keys=list("abcde"), partition_id="train", tags=[{}] * 4 + [{"is_padding": True}])
tq.kv_batch_put(keys=batch.keys, partition_id="train", fields=fields, tags=batch.tags)

def advantages_now():
    return tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["advantages"]
                           )["advantages"].to_padded_tensor(0.0)
"""


@needs_verl
@pytest.mark.skipif(find_spec("transfer_queue") is None, reason="transfer_queue is not installed")
def test_the_v1_trainers_batch_gives_its_tokens_before_its_queue_is_cleared(tmp_path):
    """verl's own TransferQueue. keep=0.4 of 9 tokens keeps the 4 of highest entropy; the padding is no token."""
    weighting = '{"rlvr": {"weighting": "top_entropy:keep=0.4,warmup_steps=0"}}'
    config = CONFIG.replace('"trainer": {}', f'"trainer": {weighting}')
    script = f"""{BATCH}{TOKENIZER}{QUEUE}
import verl.trainer.ppo.v1.trainer_base as module
from verl.utils.tracking import Tracking
seen = []
module.PPOTrainer._update_actor = lambda self, batch, metrics: seen.append(advantages_now()) or batch
module.PPOTrainer._compute_metrics = lambda self, batch, metrics, timing_raw, global_steps, epoch: metrics.update(x=1.0)
lacking = {{name: None for name in module.PPOTrainer.__abstractmethods__}}
trainer = object.__new__(type("Trainer", (module.PPOTrainer,), lacking))
trainer.tokenizer, trainer.global_steps = Tokenizer(), 1
tracking = Tracking("p", "mine", ["rlvr"], {config})
metrics = {{"actor/grad_norm": 2.0, "actor/entropy": 99.0}}
assert trainer._update_actor(batch, metrics=metrics) is batch
plain = torch.cat([advantages, torch.zeros(1, 3)])
assert torch.equal(advantages_now(), plain), advantages_now()  # as they were
chosen = mask * (entropys >= torch.where(mask > 0, entropys, -1.0).flatten().sort().values[-4])
assert chosen.sum() == 4
assert torch.allclose(seen[0], torch.cat([advantages * chosen * 9 / 4, torch.zeros(1, 3)])), (seen, chosen)
trainer._compute_metrics(batch, metrics, {{}}, global_steps=1, epoch=0)
tracking.log(metrics, 1)
tracking.finish()
np.savez("numbers.npz", mask=mask, old=old, entropys=entropys, weights=chosen)
ray.shutdown()
"""
    run(tmp_path, script, RLVR_STORE=str(tmp_path / "runs"))
    check_tokens(tmp_path, tmp_path / "numbers.npz")
    assert scalars(tmp_path)["x"] == 1.0


WEIGHTED = """
import verl.trainer.ppo.ray_trainer as module
from verl.trainer.ppo import core_algos
from verl.utils.tracking import Tracking
from verl.workers.config import ActorConfig
entropys = torch.tensor([[.1, .9, .2], [.8, .3, 0], [.4, .7, .05], [.6, 0, 0]])
new = (old + 0.6 * torch.randn(4, 3)).double()  # ratios far beyond the clip of 0.2
seen = {}

def update(self, batch):
    logprob = new.clone().requires_grad_()
    config = ActorConfig(strategy="fsdp", rollout_n=2, use_dynamic_bsz=True, loss_agg_mode=MEAN)
    loss, _ = core_algos.get_policy_loss_fn(LOSS)(old_log_prob=old.double(), log_prob=logprob,
        advantages=batch.batch["advantages"].double(), response_mask=mask, loss_agg_mode=MEAN, config=config)
    loss.backward()
    seen["loss"], seen["gradient"] = loss.item(), logprob.grad
    return batch

module.RayPPOTrainer._update_actor = update
module.RayPPOTrainer._compute_old_log_prob = lambda self, batch: (DataProto.from_single_dict(
    {"old_log_probs": old, "entropys": entropys}), 0.0)
trainer = object.__new__(module.RayPPOTrainer)
trainer.global_steps, trainer.tokenizer = 1, None
batch = DataProto.from_dict(tensors=tensors, non_tensors={"uid": uids})
tracking = Tracking("p", "mine", ["rlvr"], {
    "trainer": {"rlvr": {"weighting": WEIGHTING}}, "actor_rollout_ref": {"actor": {
        "loss_agg_mode": MEAN, "policy_loss": {"loss_mode": LOSS}}}})
trainer._compute_old_log_prob(batch)[0].batch.pop("entropys")
trainer._update_actor(batch)
assert torch.equal(batch.batch["advantages"], advantages)
module.compute_data_metrics(batch=batch, use_critic=False)
tracking.log({"critic/score/mean": 0.5}, 1)
tracking.finish()
"""
# sum(w psi) / D: what each mean divides by, over weights in place of tokens
BY_HAND = """
w, m, A = WEIGHTS.double(), mask.double(), advantages.double()
logprob = new.clone().requires_grad_()
ratio = torch.exp(logprob - old.double())
if LOSS == "vanilla":
    psi = torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
    psi = torch.where(A < 0, torch.maximum(psi, 3.0 * A), psi)  # verl's second bound of losing tokens
elif LOSS == "cispo":
    psi = ratio.clamp(0.8, 1.2).detach() * A * logprob
else:
    psi = A * logprob
per_row = (w * m * psi).sum(1)
loss = -{"token-mean": per_row.sum() / (w * m).sum(),
         "seq-mean-token-mean": (per_row / (w * m).sum(1).clamp(min=1e-8)).mean(),
         "seq-mean-token-sum": per_row.mean(), "token-sum": per_row.sum(),
         "seq-mean-token-sum-norm": per_row.mean() / 3}[MEAN]
loss.backward()
assert abs(loss.item() - seen["loss"]) < 1e-6, (loss.item(), seen["loss"])
assert torch.allclose(logprob.grad, seen["gradient"], atol=1e-6), (logprob.grad, seen["gradient"])
assert seen["gradient"].abs().sum() > 0.1
np.savez("numbers.npz", mask=mask, weights=w)
"""


@needs_verl
@pytest.mark.parametrize("loss", ["vanilla", "cispo", "gpg"])
def test_weighted_advantages_give_the_weighted_loss_for_every_mean(tmp_path, loss):
    """top_entropy keeps ceil(.4 * 9) = 4 tokens: .9, .8, .7 and .6, one of each response."""
    means = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum", "seq-mean-token-sum-norm"]
    chosen = "torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]])"
    for mean in means if loss == "vanilla" else means[:2]:
        head = f"MEAN, LOSS, WEIGHTING, WEIGHTS = {mean!r}, {loss!r}, 'top_entropy:keep=0.4,warmup_steps=0', {chosen}"
        folder = tmp_path / mean
        folder.mkdir()
        run(folder, f"{BATCH}\n{head}{WEIGHTED}{BY_HAND}", RLVR_STORE=str(folder / "runs"))
    weights = [w for (w,) in ask(folder, "SELECT weight FROM tokens WHERE step = 1 ORDER BY sample, position")]
    assert weights == [0, 1, 0, 1, 0, 0, 1, 0, 1]
    advantages = ask(folder, "SELECT advantage FROM samples WHERE step = 1 ORDER BY sample")
    assert [a for (a,) in advantages] == [1.0, -1.0, 0.5, -0.5]  # the plain ones
    assert scalars(folder)["selected_share"] == pytest.approx(4 / 9)
    info = json.loads((folder / "runs/runs/mine/run.json").read_text())
    assert info["weighting"] == "top_entropy" and info["config"]["weighting"]["keep"] == 0.4


@needs_verl
def test_a_weighting_over_all_tokens_keeps_verls_counts(tmp_path):
    """advantage_reweight: w = .3 p + .7; with normalise=all the sum of w psi is divided by the count of tokens."""
    names = "'token-mean', 'vanilla', 'advantage_reweight:warmup_steps=0,normalise=all', 0.3 * old.exp() + 0.7"
    head = f"MEAN, LOSS, WEIGHTING, WEIGHTS = {names}"
    by_tokens = BY_HAND.replace("/ (w * m).sum(),", "/ m.sum(),")
    run(tmp_path, f"{BATCH}\n{head}{WEIGHTED}{by_tokens}", RLVR_STORE=str(tmp_path / "runs"))


@needs_verl
def test_a_weighting_that_cannot_act_is_refused_before_training(tmp_path):
    script = """
from monitor.errors import MonitorError
from trainer.config import ConfigError
from verl.utils.tracking import Tracking

def refused(weighting, actor={}, algorithm={}):
    try:
        Tracking("p", "e", "rlvr", {"trainer": {"rlvr": {"weighting": weighting}}, "algorithm": algorithm,
                                    "actor_rollout_ref": {"actor": actor}})
    except (MonitorError, ConfigError) as error:
        return str(error)

assert "'ict' is not possible here: it needs the logits of whole groups" in refused("ict")
assert "clip_cov, random" in refused("ict_budget")
assert "loss_mode is 'gspo'. Set it to one of vanilla" in refused("random", {"policy_loss": {"loss_mode": "gspo"}})
assert "loss_agg_mode is 'odd'" in refused("random", {"loss_agg_mode": "odd"})
assert "in bypass mode" in refused("random", algorithm={"rollout_correction": {"bypass_mode": True}})
assert "unknown weighting" in refused("randm")
"""
    run(tmp_path, script, RLVR_STORE=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@needs_verl
def test_a_weighting_that_fails_leaves_the_update_as_it_was_and_says_so(tmp_path):
    head = "MEAN, LOSS, WEIGHTING, WEIGHTS = 'token-mean', 'vanilla', 'top_entropy:warmup_steps=0', torch.ones(4, 3)"
    broken = WEIGHTED.replace(
        "trainer._update_actor(batch)", "trainer.rlvr_entropies = None; trainer._update_actor(batch)"
    )
    run(tmp_path, f"{BATCH}\n{head}{broken}{BY_HAND}", RLVR_STORE=str(tmp_path / "runs"))
    ((text,),) = ask(tmp_path, "SELECT message FROM events WHERE kind = 'verl_error'")
    assert "no entropys of shape [4, 3], so the weights of step 1 are 1" in text
    assert ask(tmp_path, "SELECT DISTINCT weight FROM tokens") == [(1.0,)]


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
