"""`attach` on TRL's trainers: what is recorded is exact, and training is what it was without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

import rlvr_monitor  # noqa: E402
from monitor.store.pull import Puller  # noqa: E402

with pytest.MonkeyPatch.context() as _patch:
    import warnings

    warnings.simplefilter("ignore")
    import tiny_trl
    from tiny_trl import Snapshots, low_words, tokenizer, trainer
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


def starts_low(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    """1 where the first token is below 20; it says nothing of a rollout that starts with 30 or more."""
    return [None if ids[0] >= 30 else float(ids[0] < 20) for ids in completion_ids]


def test_a_mirror_has_the_run_when_training_ends(tmp_path):
    trained, url = trainer(tmp_path, max_steps=2), f"file://{tmp_path}/objects"
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", mirror=url)
    trained.train()
    Puller(url, tmp_path / "copy").look()
    for name in ("steps", "tokens", "samples", "histograms"):
        query = f"SELECT * FROM {name} ORDER BY ALL"
        with rlvr_monitor.open_store(tmp_path / "runs") as source, rlvr_monitor.open_store(tmp_path / "copy") as copy:
            assert len(copy.sql(query)) and copy.sql(query).arrow.equals(source.sql(query).arrow), name


def test_texts_rewards_and_advantages_are_those_of_the_trainer(tmp_path):
    seen: list[tuple[list[Any], list[Any], list[list[int]], list[float]]] = []

    def watched(prompts, completions, completion_ids, **columns):
        rewards = low_words(completion_ids)
        seen.append((prompts, completions, completion_ids, rewards))
        return rewards

    settings = {"reward_weights": [1.0, 0.5], "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trained = trainer(tmp_path, reward=[watched, starts_low], **settings)
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", correct_at=0.9)
    trained.train()
    for step, (prompts, completions, completion_ids, first) in enumerate(seen, 1):
        rows = table(tmp_path / "runs", f"SELECT * FROM samples WHERE step = {step} ORDER BY sample")
        second = [value or 0.0 for value in starts_low(completion_ids)]  # None adds nothing
        rewards = np.array([a + 0.5 * b for a, b in zip(first, second, strict=True)])
        groups = rewards.reshape(2, 4)
        advantages = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
        assert rows["prompt"].tolist() == prompts and rows["completion"].tolist() == completions
        assert rows["group_id"].tolist() == [0] * 4 + [1] * 4
        assert rows["n_tokens"].tolist() == [len(ids) for ids in completion_ids]
        assert rows["truncated"].tolist() == [ids[-1] not in (0, 1) for ids in completion_ids]
        np.testing.assert_allclose(rows["reward"], rewards, atol=1e-6)
        np.testing.assert_allclose(rows["advantage"], advantages.ravel(), atol=1e-5)
        assert rows["correct"].tolist() == (rewards >= 0.9 - 1e-7).tolist()
        assert [" ".join(texts) for texts in rows["token_texts"]] == [
            " ".join(tokenizer().convert_ids_to_tokens(ids)) for ids in completion_ids
        ]
        found = scalars(tmp_path / "runs", step)
        assert found["reward/watched"] == pytest.approx(np.mean(first), abs=1e-6)
        known = [value for value in starts_low(completion_ids) if value is not None]
        assert found["reward/starts_low"] == pytest.approx(np.mean(known), abs=1e-6)
        assert found["correct_share"] == (rewards >= 0.9 - 1e-7).mean()
    tokens = table(tmp_path / "runs", "SELECT step, sample, count(*) AS n FROM tokens GROUP BY ALL ORDER BY ALL")
    assert tokens["n"].tolist() == [len(ids) for batch in seen for ids in batch[2]]


@pytest.mark.parametrize("loss", ["grpo", "cispo"])
def test_scalars_are_those_of_the_trainers_own_log(tmp_path, loss):
    tiny_trl.model().save_pretrained(tmp_path / "policy")
    tokenizer().save_pretrained(tmp_path / "policy")
    trained = trainer(
        tmp_path, policy=str(tmp_path / "policy"), loss_type=loss, num_iterations=2, max_steps=4, beta=0.05,
        use_bias_correction_kl=False, learning_rate=3e-2, lr_scheduler_type="linear", epsilon=0.02,
        epsilon_high=1.02 if loss == "cispo" else 0.02, entropy_coef=0.01,
    )  # fmt: skip
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine")
    trained.train()
    logs = {row["step"]: row for row in trained.state.log_history if "reward" in row or "loss" in row}
    for step in (2, 4):  # a rollout batch has the updates step - 1 and step
        found, first, last = scalars(tmp_path / "runs", step), logs[step - 1], logs[step]
        for ours, theirs in (
            ("reward", "reward"), ("reward_std", "reward_std"), ("zero_variance_share", "frac_reward_zero_std"),
            ("response_length", "completions/mean_length"), ("truncated_share", "completions/clipped_ratio"),
            ("entropy", "entropy"),
        ):  # fmt: skip
            assert found[ours] == pytest.approx(first[theirs], rel=1e-5), ours
        pairs = [("loss", "loss"), ("grad_norm", "grad_norm"), ("kl", "kl")]
        if loss == "cispo":
            pairs += [("clip_share_high", "cispo_clip_ratio")]
            assert found["clip_share_low"] == 0.0
        else:
            pairs += [("clip_share_low", "clip_ratio/low_mean"), ("clip_share_high", "clip_ratio/high_mean")]
        for ours, theirs in pairs:
            mean = (first[theirs] + last[theirs]) / 2
            assert found[ours] == pytest.approx(mean, rel=2e-4, abs=2e-6), ours
        assert found["clip_share_high"] > 0
        assert found["lr"] == pytest.approx(last["learning_rate"]) and found["entropy_coef"] == 0.01
        assert found["log_ratio_abs"] > 0 and found["temperature"] == 1.0
        rows = table(
            tmp_path / "runs",
            f"SELECT n FROM histograms WHERE step = {step} AND metric = 'log_ratio' AND split = 'all'",
        )
        assert rows["n"].tolist() == [2 * found["tokens"]]


def test_the_tables_are_those_of_our_own_trainer(tmp_path):
    """Every scalar and histogram that `rlvr train` records of a run without evaluations and control of the entropy."""
    from trainer.config import TrainConfig
    from trainer.runtime.build import prepare, run_info
    from trainer.train import train

    config = TrainConfig(
        steps=2, rollout={"prompts": 2, "group_size": 4, "max_new_tokens": 24}, eval={"every": 0},
        record={"probe_every": 0},
    )  # fmt: skip
    with rlvr_monitor.Recorder(tmp_path / "runs", run_info(config, "ours")) as recorder:
        train(prepare(config), recorder)
    trained = trainer(tmp_path)
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="theirs")
    trained.train()
    for query in (
        "SELECT DISTINCT name AS x FROM steps WHERE step = 2 AND run = '{}'",
        "SELECT DISTINCT metric || ' ' || split || ' ' || edges_id AS x FROM histograms WHERE run = '{}'",
    ):
        ours, theirs = (set(table(tmp_path / "runs", query.format(run))["x"]) for run in ("ours", "theirs"))
        unlike = {"entropy_coef", "kl", "same_answer_share"}  # no bonus, no reference, no canonical answers
        unlike |= {"sampler_mismatch", "sampler_mismatch_k3", "sampler_mismatch_beyond2", "sampler_mismatch_nonfinite"}
        assert ours - theirs <= unlike and theirs <= ours


def attached_run(tmp_path: Any, *, weighting: str | None = None, **settings: Any) -> tuple[Any, Snapshots]:
    trained, snapshots = trainer(tmp_path, **settings), Snapshots()
    trained.add_callback(snapshots)
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", weighting=weighting)
    trained.train()
    assert events(tmp_path / "runs", "attach_error") == []
    return trained, snapshots


@pytest.mark.parametrize("weighting", [None, "ict:keep=0.3,warmup_steps=0"])
@pytest.mark.parametrize("retrained", [False, True])
def test_adapters_are_part_of_the_policy(tmp_path, weighting, retrained):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    made = {"policy": get_peft_model(tiny_trl.model(), config)} if retrained else {"peft": config}
    settings = {"beta": 0.1, "num_iterations": 2, "max_steps": 4}  # the reference is the model without adapters
    _, snapshots = attached_run(tmp_path, weighting=weighting, **made, **settings)
    assert max(errors(tmp_path / "runs", snapshots, {2: 1, 4: 3}).values()) <= EXACT
    assert scalars(tmp_path / "runs", 4)["kl"] > 0


def test_adapters_with_a_reference_and_one_update_a_step(tmp_path):
    """TRL's only pass while it scores is then the reference's, through the same body: it must not be taken."""
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    _, snapshots = attached_run(tmp_path, peft=config, beta=0.1, weighting="ict:warmup_steps=0")
    assert max(errors(tmp_path / "runs", snapshots, {1: 1, 3: 3}).values()) <= EXACT


def test_conversations_are_shown_as_the_model_saw_them(tmp_path):
    _, snapshots = attached_run(tmp_path, conversations=True)
    rows = table(tmp_path / "runs", "SELECT * FROM samples WHERE step = 1 ORDER BY sample")
    assert all(text.startswith("user w") and text.endswith("assistant") for text in rows["prompt"])
    assert len(set(rows["prompt_id"])) == 2
    assert max(errors(tmp_path / "runs", snapshots, {1: 1, 3: 3}).values()) <= EXACT


def test_rloo_is_recorded_and_cannot_be_weighted(tmp_path):
    trained, snapshots = attached_run(
        tmp_path, kind="rloo", num_iterations=2, max_steps=4, learning_rate=3e-2, epsilon=0.02, logging_steps=1
    )
    assert max(errors(tmp_path / "runs", snapshots, {2: 1, 4: 3}).values()) <= EXACT
    logs = {row["step"]: row for row in trained.state.log_history if "loss" in row}
    found = scalars(tmp_path / "runs", 4)
    assert found["reward"] == pytest.approx(logs[3]["reward"]) and found["entropy"] == pytest.approx(
        logs[3]["entropy"], rel=1e-5
    )
    for ours, theirs in (("loss", "loss"), ("grad_norm", "grad_norm")):
        assert found[ours] == pytest.approx((logs[3][theirs] + logs[4][theirs]) / 2, rel=2e-4, abs=2e-6), ours
    assert "kl" not in found and found["clip_share_low"] + found["clip_share_high"] > 0
    with pytest.raises(rlvr_error(), match=r"^weighting 'ict' cannot act: RLOOTrainer has one advantage"):
        rlvr_monitor.attach(trainer(tmp_path, kind="rloo"), store=tmp_path / "runs", run="weighted", weighting="ict")


def rlvr_error() -> type[Exception]:
    from monitor.errors import MonitorError

    return MonitorError


def test_tokens_of_tools_are_left_out(tmp_path):
    trained, generate = trainer(tmp_path), GRPOTrainer._generate
    given: list[list[list[int]]] = []

    def with_tools(prompts):
        found = list(generate(trained, prompts))
        masks = [[int(position % 3 != 1) for position in range(len(ids))] for ids in found[1]]
        given.append(masks)
        found[2] = masks
        return tuple(found)

    trained._generate, snapshots = with_tools, Snapshots()
    trained.add_callback(snapshots)
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", weighting="ict:keep=0.5,warmup_steps=0")
    trained.train()
    assert events(tmp_path / "runs", "attach_error") == []
    for step, masks in enumerate(given, 1):
        rows = table(tmp_path / "runs", f"SELECT sample, position, weight FROM tokens WHERE step = {step} ORDER BY ALL")
        expected = [(i, t) for i, mask in enumerate(masks) for t, kept in enumerate(mask) if kept]
        assert list(zip(rows["sample"].tolist(), rows["position"].tolist(), strict=True)) == expected
        for sample, mask in enumerate(masks):  # half of the tokens that the policy itself wrote
            assert rows["weight"][rows["sample"] == sample].sum() == -(-sum(mask) // 2)


def test_truncated_rollouts_that_the_trainer_leaves_out_have_no_tokens(tmp_path):
    attached_run(tmp_path, mask_truncated_completions=True, weighting="ict:warmup_steps=0", loss_type="grpo")
    rows = table(
        tmp_path / "runs",
        "SELECT s.truncated, s.n_tokens, count(t.position) AS n FROM samples s LEFT JOIN tokens t USING (step, sample) "
        "GROUP BY s.step, s.sample, s.truncated, s.n_tokens",
    )
    assert rows["truncated"].any()
    assert all(n == (0 if cut else long) for cut, long, n in zip(*rows.values(), strict=True))


@pytest.mark.parametrize("weighting", [None, "ict:keep=0.3,warmup_steps=0"])
def test_log_probabilities_of_vllm_are_compared(tmp_path, weighting):
    """TRL's path of a vLLM that samples with the policy's own less 0.25 nat; one it could not score."""
    trained, generate, snapshots = trainer(tmp_path), GRPOTrainer._generate, Snapshots()

    def as_with_vllm(prompts):
        trained.use_vllm = False
        found = list(generate(trained, prompts))
        trained.use_vllm = True
        found[4] = []
        for prompt, ids in zip(found[0], found[1], strict=True):
            with torch.no_grad():
                logits = trained.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            own = torch.log_softmax(logits, -1)[range(len(ids)), ids]
            found[4].append([*(own - 0.25).tolist()])
        found[4][0][0] = None
        return tuple(found)

    trained.vllm_importance_sampling_correction, trained.vllm_importance_sampling_mode = True, "token_truncate"
    trained.vllm_importance_sampling_clip_min, trained.vllm_importance_sampling_clip_max = None, 2.0
    trained._generate = as_with_vllm
    trained.add_callback(snapshots)
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", weighting=weighting)
    trained.train()
    assert events(tmp_path / "runs", "attach_error") == []
    assert max(errors(tmp_path / "runs", snapshots, {1: 1, 3: 3}).values()) <= EXACT
    found, log = scalars(tmp_path / "runs", 2), log_of(trained)[2]
    assert found["sampler_mismatch"] == pytest.approx(0.25, abs=1e-5) and found["sampler_mismatch_nonfinite"] == 1
    assert found["sampler_mismatch"] == pytest.approx(log["sampling/sampling_logp_difference/mean"], abs=1e-5)
    assert found["sampler_mismatch_k3"] == pytest.approx(np.exp(0.25) - 1.25, abs=1e-4)
    assert found.get("perf/extra_forward_s", 0.0) == 0.0  # TRL makes a pass for the correction, which is read


def test_evaluations_give_the_share_of_correct_rollouts(tmp_path):
    trained = trainer(
        tmp_path, eval_prompts=[f"w{i} w5" for i in range(4, 12)], eval_strategy="steps", eval_steps=2,
        per_device_eval_batch_size=8, num_generations_eval=2,
    )  # fmt: skip
    rewards: list[float] = []
    watched = trained.reward_funcs[0]

    def kept(**columns):
        found = watched(**columns)
        if not trained.model.training:
            rewards.extend(found)
        return found

    trained.reward_funcs[0] = kept
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", correct_at=0.5)
    trained.train()
    assert events(tmp_path / "runs", "attach_error") == []
    right = np.array(rewards).reshape(2, 8, 2) >= 0.5  # after step 2 and at the end: two rollouts of eight prompts
    for step, of_step in zip((2, 3), right, strict=True):
        found = scalars(tmp_path / "runs", step)
        assert found["eval/heldout/pass@1"] == pytest.approx(of_step.mean()) and 0 < of_step.mean() < 1
        assert found["eval/heldout/pass@2"] == pytest.approx(of_step.any(1).mean())
        assert "entropy" in found


def log_of(trained: Any) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in trained.state.log_history if "reward" in row}


def test_what_fails_is_an_event_and_training_goes_on_with_the_trainers_own_log(tmp_path, monkeypatch):
    from monitor.integrations.trl import rollouts

    real, calls = rollouts.record_of, []

    def failing(step, *args):
        calls.append(step)
        if step == 2:
            raise RuntimeError("no memory left")
        return real(step, *args)

    monkeypatch.setattr(rollouts, "record_of", failing)
    trained = trainer(tmp_path, max_steps=4)
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", weighting="ict:warmup_steps=0")
    trained.train()
    assert trained.state.global_step == 4 and calls == [1, 2]
    assert events(tmp_path / "runs", "attach_error") == [
        "RuntimeError: no memory left. From here on only the scalars of TRL's own log are recorded. Its weighting no "
        "longer acts: every token has weight 1."
    ]
    assert set(table(tmp_path / "runs", "SELECT step FROM tokens")["step"]) == {1}
    for step, log in log_of(trained).items():
        assert scalars(tmp_path / "runs", step)["reward"] == pytest.approx(log["reward"], rel=1e-5)
    last = scalars(tmp_path / "runs", 4)
    assert last["response_length"] == log_of(trained)[4]["completions/mean_length"] and "deviation" not in last


class OtherInside(GRPOTrainer):
    """A TRL whose scoring has other parameters."""

    def _get_per_token_logps_and_entropies(self, model, batch, width, **kwargs):  # type: ignore[override]
        raise AssertionError("not called here")


def test_a_trl_with_another_inside_gives_its_scalars(tmp_path, monkeypatch):
    lacking = "_get_per_token_logps_and_entropies(input_ids, attention_mask, logits_to_keep, batch_size)"
    trained = trainer(tmp_path)
    score = GRPOTrainer._get_per_token_logps_and_entropies
    trained.__class__ = OtherInside
    trained._get_per_token_logps_and_entropies = lambda *args, **kwargs: score(trained, *args, **kwargs)
    with pytest.raises(rlvr_error(), match=r"^weighting 'ict' cannot act: TRL .* has no _get_per_token.* as expected"):
        rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", weighting="ict")
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine")
    trained.train()
    (event,) = events(tmp_path / "runs", "attach_error")
    assert f"has no {lacking} as expected. From here on only the scalars of TRL's own log" in event
    assert [scalars(tmp_path / "runs", step)["entropy"] for step in (1, 2, 3)] == [
        pytest.approx(log["entropy"]) for log in log_of(trained).values()
    ]


def test_an_error_of_the_trainer_is_its_own_and_ends_the_run_as_failed(tmp_path):
    def broken(completions, trainer_state, **columns):
        if trainer_state.global_step == 2:
            raise KeyError("the reward's own fault")
        return [0.0] * len(completions)

    trained = trainer(tmp_path, reward=broken)
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine")
    with pytest.raises(KeyError, match="the reward's own fault"):
        trained.train()
    with rlvr_monitor.open_store(tmp_path / "runs") as store:
        assert store.run("mine").status == "failed"
    assert events(tmp_path / "runs", "attach_error") == [] and "entropy" in scalars(tmp_path / "runs", 2)


def test_a_resumed_training_opens_the_next_attempt(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    first = trainer(tmp_path, **settings)
    rlvr_monitor.attach(first, store=tmp_path / "runs", run="mine")
    first.train()
    again = trainer(tmp_path, **settings)
    rlvr_monitor.attach(again, store=tmp_path / "runs", run="mine")
    again.train(resume_from_checkpoint=str(tmp_path / "trl" / "checkpoint-2"))
    rows = table(tmp_path / "runs", "SELECT step, max(attempt) AS attempt FROM steps GROUP BY step ORDER BY step")
    assert rows["step"].tolist() == [1, 2, 3] and rows["attempt"].tolist() == [1, 1, 2]
    assert events(tmp_path / "runs", "attach_error") == []
    taken = trainer(tmp_path)
    rlvr_monitor.attach(taken, store=tmp_path / "runs", run="mine")
    with pytest.raises(rlvr_error(), match="mine"):  # before anything is trained
        taken.train()
    assert taken.state.global_step == 0


def test_attach_refuses_what_it_cannot_watch(tmp_path):
    with pytest.raises(rlvr_error(), match=r"^attach was given a dict, expected a trl\.GRPOTrainer or"):
        rlvr_monitor.attach({}, store=tmp_path, run="mine")
    trained = trainer(tmp_path)
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine")
    with pytest.raises(rlvr_error(), match=r"^This trainer is attached already\."):
        rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine")


NOTHING_TO_LEARN = """
[rules.no_learning_signal]
for_rows = 1
recent_rows = 2
none_rows = 2
"""


def guarded(tmp_path: Any, actions: str, **settings: Any) -> Any:
    """A run whose groups teach nothing up to step 3: the alert fires at step 2 and ends at step 4."""
    (tmp_path / "alerts.toml").write_text(NOTHING_TO_LEARN + actions)

    def late(completion_ids, trainer_state, **columns):
        return [0.0] * len(completion_ids) if trainer_state.global_step < 3 else low_words(completion_ids)

    trained = trainer(tmp_path, reward=late, max_steps=6, lr_scheduler_type="linear", **settings)
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", guard=tmp_path / "alerts.toml")
    trained.train()
    assert events(tmp_path / "runs", "attach_error") == events(tmp_path / "runs", "action_error") == []
    return trained


def test_an_alert_lowers_the_learning_rate_of_the_schedule_until_it_ends(tmp_path):
    trained = guarded(tmp_path, "[[actions]]\ndo = 'lower_lr'\nfactor = 2\nuntil = 'resolved'\n")
    rates = [log["learning_rate"] for log in log_of(trained).values()]
    assert rates == pytest.approx([1e-3 * (1 - s / 6) * (0.5 if s in (2, 3) else 1.0) for s in range(6)])
    assert [scalars(tmp_path / "runs", step)["lr"] for step in range(1, 7)] == pytest.approx(rates)
    assert events(tmp_path / "runs", "action") == [
        "lower_lr for no_learning_signal (warning): learning rate 0.0006667 -> 0.0003333 until it ends."
    ]
    assert events(tmp_path / "runs", "action_undone") == [
        "lower_lr ended with no_learning_signal: learning rate 0.0001667 -> 0.0003333."
    ]
    found = table(tmp_path / "runs", "SELECT rule, state, step FROM alerts ORDER BY step")
    rows = [row for row in zip(*found.values(), strict=True) if row[0] == "no_learning_signal"]
    assert rows == [("no_learning_signal", "firing", 2), ("no_learning_signal", "resolved", 4)]


def test_an_alert_stops_the_training_after_a_checkpoint(tmp_path):
    trained = guarded(tmp_path, "[[actions]]\ndo = 'stop'\n")
    assert trained.state.global_step == 2
    assert (tmp_path / "trl" / "checkpoint-2").is_dir()
    with rlvr_monitor.open_store(tmp_path / "runs") as store:
        assert store.run("mine").status == "stopped"
    (event,) = events(tmp_path / "runs", "action")
    assert event.startswith("stop for no_learning_signal (warning): 100% of the groups teach nothing")


def test_guard_saves_a_checkpoint_and_divides_the_learning_rate_by_three(tmp_path):
    trained = trainer(tmp_path, reward=lambda completions, **_: [0.0] * len(completions), max_steps=19)
    rlvr_monitor.attach(trained, store=tmp_path / "runs", run="mine", guard=True)
    trained.train()
    fired = int(table(tmp_path / "runs", "SELECT min(step) AS s FROM alerts WHERE severity = 'warning'")["s"][0])
    assert 2 < fired < 19 and [path.name for path in (tmp_path / "trl").glob("checkpoint-*")] == [f"checkpoint-{fired}"]
    rates = [log["learning_rate"] for log in log_of(trained).values()]
    assert rates == pytest.approx([1e-3] * fired + [1e-3 / 3] * (19 - fired))
    assert [text.split(" ")[0] for text in events(tmp_path / "runs", "action")] == ["checkpoint", "lower_lr"]


def test_actions_that_this_trainer_cannot_take_are_refused(tmp_path):
    (tmp_path / "alerts.toml").write_text("[[actions]]\ndo = 'stop'\n[[actions]]\ndo = 'go_back'\n")
    with pytest.raises(
        rlvr_error(), match=r"actions 2, go_back: a TRL trainer cannot take it\. Possible are checkpoint"
    ):
        rlvr_monitor.attach(trainer(tmp_path), store=tmp_path / "runs", run="mine", guard=str(tmp_path / "alerts.toml"))
