"""`attach` on TRL's trainers: what is recorded is exact, and training is what it was without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

import rlvr_monitor  # noqa: E402

with pytest.MonkeyPatch.context() as _patch:
    import warnings

    warnings.simplefilter("ignore")
    import tiny_trl
    from tiny_trl import Snapshots, tokenizer, trainer
    from trl import GRPOTrainer, RLOOTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
EXACT = 2e-4  # nats
SIGNALS = ("logprob", "entropy", "renyi2", "deviation")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (GRPOTrainer, RLOOTrainer):
        monkeypatch.setattr(kind, "_send_telemetry", lambda self: None)


def table(store: Any, query: str) -> dict[str, np.ndarray]:
    with rlvr_monitor.open_store(store) as opened:
        return opened.sql(query).frame()


def scalars(store: Any, step: int) -> dict[str, float]:
    rows = table(store, f"SELECT name, value FROM steps WHERE step = {step} AND rank = 0")
    return dict(zip(rows["name"], rows["value"], strict=True))


def events(store: Any, kind: str) -> list[str]:
    return list(table(store, f"SELECT message FROM events WHERE kind = '{kind}'")["message"])


def oracle(policy: Any, samples: dict[str, np.ndarray], tokens: dict[str, np.ndarray], temperature: float) -> Any:
    """Signals of a step's recorded tokens from an ordinary float64 forward of each rollout alone, without padding.

    float64 throughout: log-softmax and the definitions of docs/method.md, written out. Returns {signal: values} in the
    order of `tokens`.
    """
    encode = tokenizer()
    logps: dict[int, torch.Tensor] = {}
    for sample, text in zip(samples["sample"], samples["prompt"], strict=True):
        own = tokens["sample"] == sample
        ids = tokens["token_id"][own][np.argsort(tokens["position"][own])]
        prompt = encode(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([[*prompt, *ids.tolist()]])).logits[0]
        logps[int(sample)] = torch.log_softmax(logits[len(prompt) - 1 : -1].double() / temperature, -1)
    groups = dict(zip(samples["sample"].tolist(), samples["group_id"].tolist(), strict=True))

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return -torch.special.xlogy(p, p).sum()

    found: dict[str, list[float]] = {name: [] for name in SIGNALS}
    for sample, position, token in zip(tokens["sample"], tokens["position"], tokens["token_id"], strict=True):
        logp = logps[sample][position]
        alive = [
            other[position].exp()
            for row, other in logps.items()
            if groups[row] == groups[sample] and len(other) > position
        ]
        p, q = logp.exp(), torch.stack(alive).mean(0)
        found["logprob"].append(float(logp[token]))
        found["entropy"].append(float(entropy(p)))
        found["renyi2"].append(float(-torch.log((p * p).sum())))
        found["deviation"].append(float(entropy((p + q) / 2) - entropy(p) / 2 - entropy(q) / 2))
    return found


def errors(store: Any, snapshots: Snapshots, sampled_at: dict[int, int], temperature: float = 1.0) -> dict[str, float]:
    """Largest difference of each signal over the recorded steps. sampled_at: {recorded step: step that sampled}."""
    worst = dict.fromkeys(SIGNALS, 0.0)
    for step, sampled in sampled_at.items():
        samples = table(store, f"SELECT * FROM samples WHERE step = {step} ORDER BY sample")
        tokens = table(store, f"SELECT * FROM tokens WHERE step = {step} ORDER BY sample, position")
        assert len(tokens["sample"]) > 20
        expected = oracle(snapshots.models[sampled], samples, tokens, temperature)
        for name in SIGNALS:
            worst[name] = max(worst[name], float(np.abs(np.array(expected[name]) - tokens[name]).max()))
    return worst


@pytest.mark.parametrize(
    ("settings", "weighting", "sampled_at"),
    [
        ({}, None, {1: 1, 2: 2, 3: 3}),  # the loss's own forward is read
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, None, {1: 1, 3: 3}),  # shuffled parts
        ({"num_iterations": 2, "max_steps": 4}, None, {2: 1, 4: 3}),  # TRL's pass for old log-probabilities
        ({"per_device_train_batch_size": 4, "steps_per_generation": 2, "max_steps": 4}, None, {2: 1, 4: 3}),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 2}, None,
         {1: 1, 3: 3}),  # two rollout batches for an update
        ({"temperature": 0.6}, "ict:keep=0.3,warmup_steps=0", {1: 1, 3: 3}),  # a pass of its own
        ({"num_iterations": 2, "max_steps": 4}, "ict_budget:warmup_steps=0", {2: 1, 4: 3}),
        ({"gradient_checkpointing": True}, "ict:warmup_steps=1", {1: 1, 3: 3}),
        ({"gradient_checkpointing": True}, None, {1: 1, 3: 3}),
    ],
)  # fmt: skip
def test_signals_are_those_of_an_ordinary_float64_forward(tmp_path, settings, weighting, sampled_at):
    trained, snapshots = trainer(tmp_path, **settings), Snapshots()
    trained.add_callback(snapshots)
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", weighting=weighting)
    trained.train()
    assert events(tmp_path / "runs", "attach_error") == []
    steps = table(tmp_path / "runs", "SELECT DISTINCT step FROM steps ORDER BY step")["step"]
    assert set(sampled_at) <= set(steps.tolist())
    found = errors(tmp_path / "runs", snapshots, sampled_at, settings.get("temperature", 1.0))
    assert max(found.values()) <= EXACT, found


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2, "beta": 0.1}, {"loss_type": "cispo"}])
def test_an_attached_trainer_trains_bit_by_bit_as_before(tmp_path, settings):
    trained = []
    tiny_trl.model().save_pretrained(tmp_path / "policy")  # a reference is loaded from where the policy came from
    tokenizer().save_pretrained(tmp_path / "policy")
    for attached in (False, True):
        one = trainer(tmp_path, policy=str(tmp_path / "policy"), **settings)
        if attached:
            rlvr_monitor.attach(one, store=tmp_path / "runs", run="mine")
        one.train()
        trained.append(one.model.state_dict())
    assert events(tmp_path / "runs", "attach_error") == []
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


@pytest.mark.parametrize(
    ("settings", "weighting", "more"),
    [({}, None, 0), ({"num_iterations": 2, "max_steps": 4}, "ict", 0), ({}, "ict", 3), ({"max_steps": 2}, "random", 2)],
)
def test_a_pass_is_added_only_where_a_weighting_has_no_pass_to_read(tmp_path, settings, weighting, more):
    counts = []
    for attached in (False, True):
        trained, calls = trainer(tmp_path, **settings), []
        trained.model.base_model.register_forward_hook(
            lambda module, args, output, calls=calls: calls.append(output.last_hidden_state.shape[1])
        )
        if attached:
            rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", weighting=weighting)
        trained.train()
        counts.append(sum(width > 5 for width in calls))  # prompts of at most 5 tokens and decoding are sampling
    assert counts[1] - counts[0] == more
    extra = table(tmp_path / "runs", "SELECT value FROM steps WHERE name = 'perf/extra_forward_s' ORDER BY step")
    assert bool(sum(extra["value"]) > 0) == bool(more)
