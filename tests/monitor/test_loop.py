"""`rlvr_monitor.init` and `step`: a loop of one's own is recorded exactly, from logits, hidden states or log-probs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="Monitor.step needs torch")

import rlvr_monitor  # noqa: E402
from monitor.alerts.settings import AlertsError  # noqa: E402
from monitor.errors import StoreError  # noqa: E402
from monitor.integrations.loop import Monitor  # noqa: E402
from monitor.integrations.loop import measure as measuring  # noqa: E402
from monitor.store.pull import Puller  # noqa: E402

N, T, V, D = 8, 7, 23, 12
GROUPS = torch.tensor([5, 5, 5, 9, 9, 9, 9, 2])  # of 3, 4 and 1 rollouts
LENGTHS = torch.tensor([7, 3, 5, 1, 7, 2, 4, 6])
REWARDS = [1.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 1.0]


def batch(seed: int = 0) -> dict[str, Any]:
    """Hidden states, a head, the logits that they make, tokens, and what goes with them."""
    made = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, T, D, generator=made), torch.randn(V, D, generator=made)
    bias = torch.randn(V, generator=made)
    ids = torch.randint(V, (N, T), generator=made)
    mask = torch.arange(T) < LENGTHS.unsqueeze(1)
    ids[~mask] = -100  # padding as losses have it
    advantages, sampled = torch.randn(N, generator=made), -3 * torch.rand(N, T, generator=made)
    return {
        "hidden": hidden, "weight": weight, "bias": bias, "logits": hidden @ weight.T + bias, "ids": ids,
        "mask": mask, "advantages": advantages, "sampled": sampled,
    }  # fmt: skip


def tokens_of(b: dict[str, Any]) -> dict[str, Any]:
    return {"token_ids": b["ids"], "mask": b["mask"], "group_ids": GROUPS}


def oracle(b: dict[str, Any], temperature: float) -> dict[str, np.ndarray]:
    """Signals of every response token in float64, the definitions of docs/method.md written out."""
    logp = torch.log_softmax(b["logits"].double() / temperature, -1)
    p, mask = logp.exp(), b["mask"]

    def entropy(q: Any) -> Any:
        return -torch.special.xlogy(q, q).sum(-1)

    found: dict[str, list[float]] = {"logprob": [], "entropy": [], "renyi2": [], "deviation": [], "alive": []}
    for row, t in mask.nonzero().tolist():
        there = (GROUPS[row] == GROUPS) & mask[:, t]
        mean = p[there, t].mean(0)
        found["logprob"].append(float(logp[row, t, b["ids"][row, t]]))
        found["entropy"].append(float(entropy(p[row, t])))
        found["renyi2"].append(float(-torch.log((p[row, t] ** 2).sum())))
        js = entropy((p[row, t] + mean) / 2) - entropy(p[row, t]) / 2 - entropy(mean) / 2
        found["deviation"].append(float(js))
        found["alive"].append(float(there.sum()))
    return {name: np.array(values) for name, values in found.items()}


def ask(store: Path, query: str) -> dict[str, np.ndarray]:
    with rlvr_monitor.open_store(store) as opened:
        return opened.sql(query).frame()


def scalars(store: Path, step: int = 1, run: str = "mine") -> dict[str, float]:
    rows = ask(store, f"SELECT name, value FROM steps WHERE step = {step} AND run = '{run}'")
    return dict(zip(rows["name"], rows["value"], strict=True))


def events(store: Path, kind: str) -> list[tuple[int, str]]:
    rows = ask(store, f"SELECT step, message FROM events WHERE kind = '{kind}' ORDER BY ts")
    return [(int(step), str(text)) for step, text in zip(rows["step"], rows["message"], strict=True)]


def status(store: Path, run: str = "mine") -> str:
    with rlvr_monitor.open_store(store) as opened:
        return opened.run(run).status


def distributions(b: dict[str, Any], way: str) -> dict[str, Any]:
    if way == "logits":
        return {"logits": b["logits"]}
    return {"hidden_states": b["hidden"], "head_weight": b["weight"], "head_bias": b["bias"]}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("way", ["logits", "hidden states"])
def test_what_is_recorded_is_what_float64_says(tmp_path, monkeypatch, way, temperature):
    monkeypatch.setattr(measuring, "SLAB_ELEMENTS", 3 * N * V)  # three positions of all rows: slabs of 3, 3 and 1
    b = batch()
    with rlvr_monitor.init(store=tmp_path, run="mine") as monitor:
        monitor.step(**distributions(b, way), **tokens_of(b), temperature=temperature, advantages=b["advantages"],
                     sampler_logprobs=b["sampled"])  # fmt: skip
    tokens = ask(tmp_path, "SELECT * FROM tokens ORDER BY sample, position")
    expected = oracle(b, temperature)
    assert tokens["token_id"].tolist() == b["ids"][b["mask"]].tolist()
    for name, values in expected.items():
        assert tokens[name] == pytest.approx(values, rel=1e-6, abs=2e-6), name  # float32
    found = scalars(tmp_path)
    for name in ("entropy", "renyi2", "deviation"):
        assert found[name] == pytest.approx(expected[name].mean(), abs=1e-6), name
    assert found["surprisal"] == pytest.approx(-expected["logprob"].mean(), abs=1e-6)
    assert (found["tokens"], found["temperature"]) == (35, temperature)  # 7 + 3 + 5 + 1 + 7 + 2 + 4 + 6
    # Cov(ln p, A) over tokens, and the first-order change of H1 of theorem 3.1 with A of the token's rollout
    a = b["advantages"].double()[b["mask"].nonzero()[:, 0]].numpy()
    assert found["logprob_advantage_cov"] == pytest.approx(np.cov(expected["logprob"], a, bias=True)[0, 1], abs=1e-6)
    logp = torch.log_softmax(b["logits"].double() / temperature, -1)[b["mask"]].numpy()
    p, o, h = np.exp(logp), np.exp(expected["logprob"]), expected["entropy"]
    change = -a * (o * (expected["logprob"] + h) - (p**2 * (logp + h[:, None])).sum(1))
    assert found["predicted_entropy_change"] == pytest.approx(change.mean(), abs=1e-6)
    gap = np.abs(expected["logprob"] - b["sampled"][b["mask"]].double().numpy())
    assert found["sampler_mismatch"] == pytest.approx(gap.mean(), abs=1e-6)
    counts = ask(tmp_path, "SELECT split, n FROM histograms WHERE metric = 'entropy'")
    assert dict(zip(counts["split"], counts["n"], strict=True)) == {"all": 35, "selected": 35}  # nothing is "correct"


def test_a_mirror_has_the_run_when_it_is_finished(tmp_path):
    url, b = f"file://{tmp_path}/objects", batch()
    with rlvr_monitor.init(store=tmp_path / "runs", run="mine", mirror=url) as monitor:
        monitor.step(**distributions(b, "logits"), **tokens_of(b), rewards=REWARDS)
    Puller(url, tmp_path / "copy").look()
    query = "SELECT * FROM tokens ORDER BY sample, position"
    source, copy = (ask(tmp_path / folder, query) for folder in ("runs", "copy"))
    assert len(copy["entropy"]) == 35  # 7 + 3 + 5 + 1 + 7 + 2 + 4 + 6
    for name, values in source.items():
        np.testing.assert_array_equal(copy[name], values, err_msg=name)
    with pytest.raises(StoreError, match="is no URL of an object store"):
        rlvr_monitor.init(store=tmp_path / "runs", run="other", mirror="ftp://there")
    assert not (tmp_path / "runs/runs/other").exists()


def test_logits_and_hidden_states_give_the_same_records(tmp_path):
    b = batch(1)
    a = b["advantages"]
    for way, advantages in (("logits", a), ("hidden states", a.unsqueeze(1).expand(N, T))):  # one a token: the same
        with rlvr_monitor.init(store=tmp_path, run=way.replace(" ", "-")) as monitor:
            monitor.step(**distributions(b, way), **tokens_of(b), rewards=REWARDS, advantages=advantages)
    both = [ask(tmp_path, f"SELECT * FROM tokens WHERE run = '{run}' ORDER BY sample, position")
            for run in ("logits", "hidden-states")]  # fmt: skip
    for name in ("logprob", "entropy", "renyi2", "deviation", "alive", "weight", "token_id"):
        assert both[0][name] == pytest.approx(both[1][name], abs=1e-6), name
    found = [scalars(tmp_path, run=run) for run in ("logits", "hidden-states")]
    assert found[0].keys() == found[1].keys()
    assert {k for k in found[0] if not k.startswith("perf/") and abs(found[0][k] - found[1][k]) > 1e-6} == set()


def test_log_probabilities_alone_give_what_they_can_and_say_once_what_not(tmp_path):
    b = batch(2)
    logps = torch.log_softmax(b["logits"], -1).gather(-1, b["ids"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    given = {**tokens_of(b), "rewards": REWARDS, "advantages": b["advantages"], "sampler_logprobs": b["sampled"]}
    for run, way in (("mine", {"logprobs": logps}), ("logits", {"logits": b["logits"]})):
        with rlvr_monitor.init(store=tmp_path, run=run) as monitor:
            for _ in range(3):
                monitor.step(**way, **given)
    found, whole = scalars(tmp_path, 3), scalars(tmp_path, 3, "logits")
    needs = {"entropy", "renyi2", "deviation", "decided", "selected_decided", "regime", "predicted", "unselectable"}
    lost = {key for key in whole if key.startswith(tuple(needs))} | {"temperature"}
    assert whole.keys() - found.keys() == lost and not found.keys() - whole.keys()
    assert {k for k in found if not k.startswith("perf/") and abs(found[k] - whole[k]) > 1e-6} == set()
    assert found["nonfinite"] == 0  # what is not known is no fault
    assert set(ask(tmp_path, "SELECT DISTINCT metric FROM histograms WHERE run = 'mine'")["metric"]) == {
        "surprisal", "weight"
    }  # fmt: skip
    tokens = ask(tmp_path, "SELECT * FROM tokens WHERE run = 'mine' AND step = 3 ORDER BY sample, position")
    assert tokens["logprob"] == pytest.approx(logps[b["mask"]].numpy(), abs=1e-6)
    counted = "SELECT count(entropy), count(renyi2), count(deviation), count(logprob) FROM tokens WHERE run = 'mine'"
    assert [int(column[0]) for column in ask(tmp_path, counted).values()] == [0, 0, 0, 3 * 35]  # NULL where not known
    assert tokens["alive"].tolist() == oracle(b, 1.0)["alive"].tolist()
    said = "The steps hold no distributions, so entropy, Renyi-2 entropy and deviation are not recorded."
    assert [(step, text) for step, text in events(tmp_path, "no_distributions")] == [(1, said)]


def test_entropies_that_the_loop_has_computed_are_recorded(tmp_path):
    b = batch(2)
    logp = torch.log_softmax(b["logits"], -1)
    given = {
        "logprobs": logp.gather(-1, b["ids"].clamp(min=0).unsqueeze(-1)).squeeze(-1),
        "entropies": -(logp.exp() * logp).sum(-1),
        **tokens_of(b),
    }
    with rlvr_monitor.init(store=tmp_path, run="mine") as monitor:
        monitor.step(**given)
    expected = oracle(b, 1.0)["entropy"]
    assert scalars(tmp_path)["entropy"] == pytest.approx(expected.mean(), abs=1e-6)
    assert ask(tmp_path, "SELECT entropy FROM tokens ORDER BY sample, position")["entropy"] == pytest.approx(
        expected, abs=2e-6
    )
    counts = ask(tmp_path, "SELECT metric, n FROM histograms WHERE split = 'all'")
    assert dict(zip(counts["metric"], counts["n"], strict=True)) == {"entropy": 35, "surprisal": 35, "weight": 35}
    assert "deviation" not in scalars(tmp_path) and "decided_share" in scalars(tmp_path)


def test_rollouts_become_samples_and_scalars(tmp_path):
    b = batch(3)

    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(chr(97 + token) for token in ids)

    with rlvr_monitor.init(store=tmp_path, run="mine", tokenizer=Letters(), task="letters", seed=4,
                           config={"lr": 1e-3}) as monitor:  # fmt: skip
        monitor.step(
            7, logits=b["logits"], **tokens_of(b), rewards=REWARDS, truncated=[True] + [False] * 7,
            advantages=torch.ones(N, T), prompts=["x"] * 3 + ["y"] * 4 + ["z"], scalars={"loss": torch.tensor(0.25)},
        )  # fmt: skip
        monitor.step(scalars={"loss": 0.5, "grad_norm": 2, "my/own": torch.tensor([3.0])})
        monitor.step(logits=b["logits"], **tokens_of(b), texts=[f"text {i}" for i in range(N)])
    found = scalars(tmp_path, 7)
    assert found["reward"] == pytest.approx(5 / 8) and found["correct_share"] == 3 / 8
    assert found["zero_variance_share"] == pytest.approx(2 / 3)  # the groups 9 (all 0.5) and 2 (one rollout)
    assert found["all_correct_share"] == pytest.approx(1 / 3) and found["all_wrong_share"] == pytest.approx(1 / 3)
    assert (found["response_length"], found["truncated_share"], found["loss"]) == (35 / 8, 1 / 8, 0.25)
    later = scalars(tmp_path, 8)  # steps count on from 7
    assert later.keys() == {"loss", "grad_norm", "my/own", "perf/queue"} and later["my/own"] == 3.0
    samples = ask(tmp_path, "SELECT * FROM samples WHERE step = 7 ORDER BY sample")
    assert samples["reward"].tolist() == REWARDS and samples["correct"].tolist() == [r == 1 for r in REWARDS]
    assert samples["group_id"].tolist() == GROUPS.tolist() and samples["n_tokens"].tolist() == LENGTHS.tolist()
    assert samples["advantage"].tolist() == [1.0] * N and samples["truncated"].tolist() == [True] + [False] * 7
    assert len(set(samples["prompt_id"])) == 3
    row = b["ids"][1, :3].tolist()
    assert samples["completion"][1] == Letters().decode(row)
    assert samples["token_texts"][1].tolist() == [Letters().decode([token]) for token in row]
    later = ask(tmp_path, "SELECT * FROM samples WHERE step = 9 ORDER BY sample")
    assert later["completion"].tolist() == [f"text {i}" for i in range(N)] and np.isnan(later["reward"]).all()
    with rlvr_monitor.open_store(tmp_path) as opened:
        info = opened.run("mine").info
    assert (info["task"], info["seed"], info["config"]) == ("letters", 4, {"lr": 1e-3})
    assert status(tmp_path) == "finished"


def test_same_texts_in_groups_of_different_sizes(tmp_path):
    # a group of three, two of them equal, and one of two different: 2 of 3 x 2 + 2 x 1 ordered pairs are equal
    ids = torch.tensor([[1, 2], [1, 2], [3, 4], [5, 6], [1, 2]])
    with rlvr_monitor.init(store=tmp_path, run="mine") as monitor:
        monitor.step(token_ids=ids, mask=torch.ones_like(ids).bool(), group_ids=[0, 0, 0, 1, 1])
    assert scalars(tmp_path)["duplicate_share"] == 2 / 8


def test_without_groups_there_is_no_deviation(tmp_path):
    b = batch()
    with rlvr_monitor.init(store=tmp_path, run="mine") as monitor:
        for _ in range(2):
            monitor.step(logits=b["logits"], token_ids=b["ids"], mask=b["mask"], rewards=REWARDS)
    found = scalars(tmp_path)
    assert found["entropy"] == pytest.approx(oracle(b, 1.0)["entropy"].mean(), abs=1e-6)
    assert not {"deviation", "zero_variance_share", "duplicate_share"} & found.keys()
    assert [step for step, _ in events(tmp_path, "no_groups")] == [1]


WRONG = [
    ({"entropies": torch.zeros(N, T)}, "step was given entropies without logprobs"),
    ({"logprobs": torch.zeros(N, T)}, "step was given logits and logprobs, expected one of them"),
    ({"mask": None}, "step was given logits without mask. Pass mask=, bool"),
    ({"mask": torch.ones(N, T)}, "mask has dtype torch.float32, expected bool. Use mask.bool()."),
    ({"token_ids": torch.zeros(N, T + 1).long()}, r"token_ids has shape (8, 8), expected [N, T] = (8, 7) like logits"),
    ({"token_ids": torch.full((N, T), 23)}, "token_ids hold 23 where mask is True, expected 0 to 22"),
    ({"group_ids": GROUPS[:3]}, "group_ids has shape (3,), expected [N] = (8) like logits"),
    ({"group_ids": GROUPS.float()}, "group_ids has dtype torch.float32, expected int. Use group_ids.long()."),
    ({"rewards": ["good"] * N}, "rewards is ['good'"),
    ({"texts": "all of them"}, "texts is 'all of them', expected a list of strings"),
    ({"texts": ["a"]}, "texts has 1 strings, expected 8"),
    ({"logits": None, "hidden_states": torch.zeros(N, T, D)}, "hidden_states and head_weight belong together"),
    ({"temperature": 0.0}, "temperature is 0.0, expected a finite number > 0"),
    ({"logits": None, "logprobs": torch.ones(N, T)}, "logprobs hold 1 where mask is True, expected ln p <= 0"),
    ({"scalars": {"loss": torch.zeros(2)}}, "scalars: loss has shape (2,), expected a number"),
    ({"step": -1}, "step is -1, expected a whole number >= 0"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[text[:40] for _, text in WRONG])
def test_arguments_of_the_first_step_that_do_not_fit_are_refused_before_anything(tmp_path, changed, message):
    b = batch()
    with rlvr_monitor.init(store=tmp_path, run="mine") as monitor:
        with pytest.raises(ValueError) as caught:
            monitor.step(**{"logits": b["logits"], **tokens_of(b), **changed})
        assert message in str(caught.value)
        monitor.step(logits=b["logits"], **tokens_of(b))  # put right
    assert set(ask(tmp_path, "SELECT step FROM tokens")["step"]) == {1}
    assert events(tmp_path, "step_error") == []


def test_later_faults_are_events_and_the_loop_goes_on(tmp_path, monkeypatch):
    b = batch()
    good = {"logits": b["logits"], **tokens_of(b)}
    monitor = rlvr_monitor.init(store=tmp_path, run="mine")
    monitor.step(**good)
    for _ in range(2):  # the same fault twice is one event
        monitor.step(**{**good, "mask": b["mask"].float()}, scalars={"loss": 1.5})
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "step_record", lambda *args, **kwargs: 1 / 0)
        monitor.step(**good, scalars={"loss": 2.5})
    monitor.step(**good)
    monitor.finish()
    monitor.finish()
    monitor.step(**good)  # after the end: a warning, no error
    assert ask(tmp_path, "SELECT DISTINCT step FROM tokens ORDER BY step")["step"].tolist() == [1, 5]
    assert [scalars(tmp_path, step)["loss"] for step in (2, 3, 4)] == [1.5, 1.5, 2.5]
    found = events(tmp_path, "step_error")
    assert [step for step, _ in found] == [2, 4]
    assert found[0][1].startswith("ValueError: mask has dtype torch.float32") and "ZeroDivisionError" in found[1][1]


def test_a_gradient_does_not_flow_and_nothing_is_changed(tmp_path):
    b = batch()
    logits = b["logits"].clone().requires_grad_()
    before = {name: tensor.clone() for name, tensor in b.items()}
    with rlvr_monitor.init(store=tmp_path, run="mine") as monitor:
        monitor.step(logits=logits, **tokens_of(b), rewards=REWARDS, advantages=b["advantages"].requires_grad_())
    (logits * 2).sum().backward()
    assert torch.equal(logits.grad, torch.full_like(logits, 2))
    assert all(torch.equal(before[name], b[name]) for name in before)


def test_alerts_fire_live_with_the_rules_of_a_file_or_none(tmp_path):
    rules = tmp_path / "alerts.toml"
    rules.write_text("[rules.entropy_collapse]\nenabled = false\n")
    fired: list[str] = []
    for run, alerts in (("default", True), ("file", rules), ("none", False)):
        with rlvr_monitor.init(store=tmp_path / "s", run=run, alerts=alerts,
                               on_alert=lambda alert: fired.append(alert.rule)) as monitor:  # fmt: skip
            for step in range(1, 81):
                monitor.step(scalars={"entropy": 1.0 if step <= 30 else max(0.01, 1 - (step - 30) / 20), "reward": 0.5})
    found = ask(tmp_path / "s", "SELECT DISTINCT run, rule FROM alerts WHERE state = 'firing'")
    pairs = set(zip(found["run"], found["rule"], strict=True))
    assert ("default", "entropy_collapse") in pairs and ("file", "entropy_collapse") not in pairs
    assert "none" not in found["run"] and "entropy_collapse" in fired
    (tmp_path / "acts.toml").write_text('[[actions]]\ndo = "stop"\n')
    with pytest.raises(AlertsError, match="actions: this run is only watched"):
        rlvr_monitor.init(store=tmp_path / "s", run="more", alerts=tmp_path / "acts.toml")


def test_a_run_goes_on_where_it_stopped(tmp_path):
    with rlvr_monitor.init(store=tmp_path, run="mine") as monitor:
        for _ in range(3):
            monitor.step(scalars={"reward": 0.5})
    with pytest.raises(StoreError, match="already exists"):
        rlvr_monitor.init(store=tmp_path, run="mine")
    with rlvr_monitor.init(store=tmp_path, run="mine", resume=True) as monitor:
        monitor.step(scalars={"reward": 0.75})
    rows = ask(tmp_path, "SELECT step, attempt, value FROM steps WHERE name = 'reward' ORDER BY step")
    assert list(zip(rows["step"], rows["attempt"], rows["value"], strict=True)) == [
        (1, 1, 0.5), (2, 1, 0.5), (3, 1, 0.5), (4, 2, 0.75)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("end", "expected"),
    [("", "finished"), ("raise ValueError('bad')", "failed"), ("raise KeyboardInterrupt", "stopped"),
     ("monitor.finish('stopped')", "stopped")],
)  # fmt: skip
def test_the_end_of_the_process_ends_the_run(tmp_path, end, expected):
    script = (
        "import rlvr_monitor\n"
        f"monitor = rlvr_monitor.init(store={str(tmp_path)!r}, run='mine')\n"
        f"monitor.step(scalars={{'reward': 1.0}})\n{end}\n"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert status(tmp_path) == expected
    assert scalars(tmp_path)["reward"] == 1.0


def test_scalars_need_no_torch(tmp_path):
    script = (
        "import sys, rlvr_monitor\n"
        f"with rlvr_monitor.init(store={str(tmp_path)!r}, run='mine') as monitor:\n"
        "    monitor.step(scalars={'reward': 1.0})\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_head_never_makes_all_logits(tmp_path, monkeypatch):
    b, shapes = batch(), []
    monkeypatch.setattr(measuring, "SLAB_ELEMENTS", 2 * N * V)
    original = measuring.functional.linear

    def linear(states: Any, *rest: Any) -> Any:
        shapes.append(tuple(states.shape))
        return original(states, *rest)

    monkeypatch.setattr(measuring.functional, "linear", linear)
    with rlvr_monitor.init(store=tmp_path, run="mine") as monitor:
        monitor.step(**distributions(b, "hidden states"), **tokens_of(b))
    assert shapes == [(N, 2, D)] * 3 + [(N, 1, D)]


def test_the_monitor_is_what_init_gives(tmp_path):
    with rlvr_monitor.init(store=tmp_path, run="mine") as monitor:
        assert isinstance(monitor, Monitor)
        with monitor.recorder.busy("evaluation"):
            monitor.step(scalars={"reward": 0.0})
        assert monitor.recorder.flush() and monitor.recorder.lost_steps == 0
