"""`rlvr train` end to end on the built-in policy: what is recorded, reproducibility, signals, failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rounding import rounding, summed_terms
from safetensors.torch import load_file
from transformers import AutoConfig

from monitor.store.reader import open_store
from monitor.store.runs import get_run
from trainer.commands.train import main
from trainer.policy.sources import BUILTIN
from trainer.runtime.checkpoint import checkpoints_of

SMALL = (
    "--threads 1 --rollout.prompts 4 --rollout.group-size 4 --eval.prompts 2 --eval.samples 4 "
    "--weighting.warmup-steps 1"
).split()


def run(store: Path, *options: str) -> int:
    return main([*SMALL, "--store", str(store), *options])


def rows(store: Path, query: str) -> list[tuple]:
    with open_store(store) as opened:
        return [tuple(row) for row in opened.sql(query).rows]


def scalars(store: Path, name: str) -> list[tuple]:
    query = f"SELECT step, name, value FROM steps WHERE run = '{name}' AND name NOT LIKE 'perf/%' ORDER BY step, name"
    return rows(store, query)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("train") / "store"
    for kind, name in (("ict", "a"), ("ict", "b"), ("uniform", "u")):
        options = ["--weighting.kind", kind, "--run", name, "--steps", "3", "--eval.every", "3", "--comparison", "t"]
        assert run(store, *options) == 0
    return store


def test_every_sampled_token_is_recorded_with_its_text(trained):
    total = "SELECT sum(value) FROM steps WHERE run = 'a' AND name = 'tokens'"
    assert rows(trained, "SELECT count(*) FROM tokens WHERE run = 'a'") == [(int(rows(trained, total)[0][0]),)]
    mismatched = """SELECT count(*) FROM samples WHERE run = 'a'
        AND (array_to_string(token_texts, '') NOT IN (completion, completion || ';') OR len(token_texts) != n_tokens)"""
    assert rows(trained, mismatched) == [(0,)]
    per_sample = """SELECT count(*) FROM samples s JOIN (
        SELECT step, sample, count(*) AS n FROM tokens WHERE run = 'a' GROUP BY step, sample) t
        USING (step, sample) WHERE s.run = 'a' AND s.n_tokens = t.n"""
    assert rows(trained, per_sample) == [(3 * 16,)]


def test_the_recorded_signals_hold_together(trained):
    """Scalars, histograms and raw tokens are three views of the same values."""
    for step in (1, 2, 3):
        token = rows(
            trained, f"SELECT avg(entropy), avg(deviation), count(*) FROM tokens WHERE run='a' AND step={step}"
        )
        histogram = rows(
            trained,
            "SELECT sum / n, n FROM histograms WHERE run = 'a' AND split = 'all' "
            "AND metric IN ('entropy', 'deviation') "
            f"AND step = {step} ORDER BY metric DESC",
        )
        assert [h[0] for h in histogram] == pytest.approx(token[0][:2], rel=1e-6)
        assert {h[1] for h in histogram} == {token[0][2]}
    # weight 1 everywhere in the warm-up step, then ceil(0.1 T) of each response
    assert rows(trained, "SELECT min(weight) FROM tokens WHERE run = 'a' AND step = 1") == [(1.0,)]
    off = """SELECT count(*) FROM (SELECT sum(weight) AS kept, count(*) AS n, max(deviation) AS u FROM tokens
        WHERE run = 'a' AND step = 2 GROUP BY sample) WHERE u > 0 AND kept != ceil(n * 0.1 - 1e-9)"""
    assert rows(trained, off) == [(0,)]


def test_a_cpu_run_is_bit_reproducible(trained):
    a, b = scalars(trained, "a"), scalars(trained, "b")
    assert len(a) > 60 and a == b
    query = "SELECT token_id, logprob, deviation, weight FROM tokens WHERE run = '{}' ORDER BY step, sample, position"
    assert rows(trained, query.format("a")) == rows(trained, query.format("b"))


def test_arms_of_a_comparison_start_from_the_same_policy_and_prompts(trained):
    """Evaluation before the first step, and the first rollouts, are those of the same policy and generator."""
    first = "SELECT name, value FROM steps WHERE run = '{}' AND step = 0 AND name NOT LIKE 'perf/%' ORDER BY name"
    assert rows(trained, first.format("a")) == rows(trained, first.format("u"))
    texts = "SELECT prompt, completion FROM samples WHERE run = '{}' AND step = 1 ORDER BY sample"
    assert rows(trained, texts.format("a")) == rows(trained, texts.format("u"))


def test_metadata_holds_configuration_commit_packages_and_hardware(trained):
    info = json.loads((trained / "runs" / "a" / "run.json").read_text())
    given = info["config"]["weighting"]
    assert given == {"kind": "ict", "keep": 0.1, "warmup_steps": 1, "normalise": "selected"}
    assert info["environment"]["packages"]["torch"].startswith("2.")
    assert info["environment"]["device"] and info["environment"]["python"] == sys.version.split()[0]


def test_the_final_policy_is_a_normal_hugging_face_folder(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained / "policies" / "a"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("57:")["input_ids"]) == "57:"
    assert sum(p.numel() for p in model.parameters()) > 5e5


def test_a_taken_name_is_refused_before_anything_is_written(trained, capsys):
    assert run(trained, "--run", "a", "--steps", "1") == 2
    assert "'a'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rollout.prompts", "99"], "rollout.prompts is 99 but the task's train split has 65 prompts"),
        (["--rollout.max-new-tokens", "79"], "the model's context is 80 tokens"),
        (["--task", "chian"], "Did you mean 'chain'?"),
        (["--model", "bultin"], "Did you mean 'builtin'?"),
        (["--reward", "json:dumpz"], "dump"),
    ],
)
def test_bad_input_is_refused_before_work_starts(tmp_path, capsys, options, message):
    assert run(tmp_path / "store", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "store" / "runs").exists()


@pytest.mark.parametrize("split", ["train", "heldout", "ood"])
def test_a_prompt_too_long_for_the_context_is_refused_in_any_split_before_work_starts(tmp_path, capsys, split):
    splits = ("train", "train", "heldout", "ood")
    rows = [{"prompt": f"{n}:\\boxed", "answer": n, "split": s} for n, s in enumerate(splits)]
    rows.append({"prompt": "7" * 70 + ":\\boxed", "answer": 1, "split": split})
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--task", f"jsonl:{tmp_path / 'p.jsonl'}", "--rollout.prompts", "2", "--rollout.max-new-tokens", "20"]
    assert run(tmp_path / "store", *options) == 2
    told = capsys.readouterr().err
    assert f"Prompt 'line-5' of split '{split}' has 77 tokens and rollout.max_new_tokens is 20" in told
    assert "context is 80 tokens" in told
    assert not (tmp_path / "store" / "runs").exists()


def test_a_store_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "store").write_text("")
    assert run(tmp_path / "store", "--steps", "1") == 2
    assert str(tmp_path / "store") in capsys.readouterr().err


def test_a_reward_function_that_raises_fails_the_run_and_keeps_what_was_recorded(tmp_path, monkeypatch, capsys):
    module = tmp_path / "myrewards.py"
    module.write_text(
        "calls = 0\n"
        "def f(prompts, completions, completion_ids, **columns):\n"
        "    global calls\n    calls += 1\n"
        "    if calls > 2:\n        raise RuntimeError('verifier is down')\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    store = tmp_path / "store"
    assert run(store, "--reward", "myrewards:f", "--eval.every", "0", "--run", "r", "--steps", "9") == 1
    assert "verifier is down" in capsys.readouterr().err
    assert rows(store, "SELECT max(step) FROM steps WHERE run = 'r' AND name = 'reward'") == [(2,)]
    assert json.loads((store / "runs" / "r" / "heartbeat-r000-a001.json").read_text())["status"] == "failed"
    assert rows(store, "SELECT count(*) FROM events WHERE kind = 'failed' AND message LIKE '%verifier%'") == [(1,)]


def test_a_diverged_run_stops_at_a_named_step_and_keeps_the_rest(tmp_path, capsys):
    store = tmp_path / "store"
    options = ["--optim.lr", "1e18", "--eval.every", "0", "--run", "boom", "--steps", "9", "--optim.weight-decay", "0"]
    assert run(store, *options) == 1
    told = capsys.readouterr().err
    assert "Run boom failed. Step" in told and "not finite" in told
    last = rows(store, "SELECT max(step) FROM steps WHERE run = 'boom' AND name = 'reward'")[0][0]
    assert last >= 1 and f"Step {last + 1}:" in told


def test_truncation_of_every_completion_is_an_event(tmp_path, capsys):
    store = tmp_path / "store"
    assert run(store, "--rollout.max-new-tokens", "3", "--eval.every", "0", "--run", "t", "--steps", "1") == 0
    assert "every completion was truncated. Raise rollout.max_new_tokens" in capsys.readouterr().err
    assert rows(store, "SELECT step FROM events WHERE kind = 'truncated'") == [(1,)]


@pytest.mark.parametrize("actuator", ["coefficient", "temperature"])
def test_entropy_control_moves_its_value_and_the_whole_step_follows(tmp_path, actuator):
    """Sampler, signals and loss of a step share one temperature: they agree on each token to rounding."""
    store = tmp_path / "store"
    options = ["--loss.entropy-target", "9", "--loss.entropy-actuator", actuator, "--loss.temperature-step", "0.1"]
    assert run(store, *options, "--eval.every", "0", "--run", "c", "--steps", "3", "--loss.entropy-step", "0.001") == 0

    def series(name):
        query = f"SELECT value FROM steps WHERE run = 'c' AND name = '{name}' ORDER BY step"
        return [value for (value,) in rows(store, query)]

    # far below the target: exp(0.1 * error) a step with error (9 - H) / 9, or 0.001 a step
    factors = np.exp(0.1 * (1 - np.array(series("entropy")) / 9))
    moving = {"temperature": [1.0, factors[0], factors[0] * factors[1]], "coefficient": [0.0, 0.001, 0.002]}
    assert series("temperature") == pytest.approx(moving[actuator] if actuator == "temperature" else [1.0] * 3)
    assert series("entropy_coef") == pytest.approx(moving[actuator] if actuator == "coefficient" else [0.0] * 3)
    terms = summed_terms(AutoConfig.from_pretrained(BUILTIN["builtin"]), 80)
    allowed = rounding(torch.float32, terms, scale=10)  # |ln p| is below 10
    assert max(series("sampler_mismatch")) < allowed and max(series("log_ratio_abs")) < allowed < 1e-3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_flushes_marks_the_run_stopped_and_saves(tmp_path, number):
    store = tmp_path / "store"
    command = [sys.executable, "-m", "monitor.cli", "train", *SMALL, "--store", str(store), "--run", "s"]
    process = subprocess.Popen([*command, "--steps", "5000", "--eval.every", "0"], stderr=subprocess.PIPE, text=True)
    beat = store / "runs" / "s" / "heartbeat-r000-a001.json"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (
        beat.exists() and (json.loads(beat.read_text())["acknowledged"] or 0) > 1
    ):
        time.sleep(0.1)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number, told
    assert "stopped" in told and (store / "policies" / "s" / "model.safetensors").exists()
    final = json.loads(beat.read_text())
    last = rows(store, "SELECT max(step) FROM steps WHERE run = 's' AND name = 'reward'")[0][0]
    assert final["status"] == "stopped" and final["acknowledged"] == last >= 2
    assert np.array(rows(store, "SELECT DISTINCT step FROM tokens WHERE run = 's'")).size == last


CHILD = Path(__file__).with_name("stops_child.py")


@pytest.mark.parametrize(
    ("where", "call", "number"),
    [("optimizer", 2, signal.SIGTERM), ("sampling", 3, signal.SIGINT), ("evaluation", 2, signal.SIGINT)],
)
def test_what_a_signal_leaves_is_the_policy_of_a_whole_step(tmp_path, where, call, number):
    """Sent in the middle of step 2's optimizer, of step 3's sampling, of the evaluation after step 2."""
    store = tmp_path / "store"
    options = [*SMALL, "--store", str(store), "--run", "s", "--steps", "9", "--checkpoint.every", "1"]
    evaluate = ["--eval.every", "2", "--eval.splits", "heldout"] if where == "evaluation" else ["--eval.every", "0"]
    command = [sys.executable, str(CHILD), where, str(call), str(tmp_path), *options, *evaluate]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "there").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    if where == "optimizer":
        (tmp_path / "on").touch()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Go on with: rlvr train --resume s" in told, told
    folder = store / "checkpoints" / "s"
    assert [path.name for path in checkpoints_of(folder)] == ["step-00000001", "step-00000002"]
    trained = load_file(folder / "step-00000002" / "parameters.safetensors")
    saved = load_file(store / "policies" / "s" / "model.safetensors")
    assert len(trained) > 30 and all(torch.equal(saved[name], value) for name, value in trained.items())
    assert rows(store, "SELECT DISTINCT step FROM steps WHERE name = 'reward' ORDER BY 1") == [(1,), (2,)]
    judged = rows(store, "SELECT DISTINCT step FROM steps WHERE name LIKE 'eval/%'")
    assert judged == ([(0,)] if where == "evaluation" else [])  # the one that was cut short is left out
    assert get_run(store, "s").status == "stopped"


def test_without_arguments_it_names_the_run_after_weighting_and_seed(tmp_path):
    for _ in range(2):
        assert run(tmp_path / "store", "--steps", "1", "--eval.every", "0", "--seed", "4") == 0
    assert {path.name for path in (tmp_path / "store" / "runs").iterdir()} == {"_seed", "ict-s4", "ict-s4-2"}
    assert os.path.exists(tmp_path / "store" / "policies" / "ict-s4-2" / "config.json")


def test_several_rewards_train_on_their_sum_and_are_recorded_apart(tmp_path, monkeypatch):
    (tmp_path / "brief_reward.py").write_text(
        "def brief(prompts, completions, completion_ids, **columns):\n"
        "    return [-float(len(ids)) for ids in completion_ids]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    store = tmp_path / "store"
    options = ["--run", "sum", "--steps", "2", "--weighting.kind", "uniform", "--eval.every", "2"]
    assert run(store, *options, "--reward", "task,brief_reward:brief=0.01") == 0
    means = "SELECT step, max(value) FILTER (name = 'reward'), max(value) FILTER (name = 'reward/task'), "
    means += "max(value) FILTER (name = 'reward/brief'), max(value) FILTER (name = 'correct_share'), "
    means += "max(value) FILTER (name = 'response_length') FROM steps WHERE step > 0 GROUP BY step ORDER BY step"
    for _, total, own, brief, correct, length in rows(store, means):
        assert total == pytest.approx(own + 0.01 * brief, abs=1e-5)
        assert own == pytest.approx(correct)  # the first says what is correct
        assert brief == pytest.approx(-length)
    samples = rows(store, "SELECT reward, correct, n_tokens FROM samples")
    assert all(reward == pytest.approx(float(correct) - 0.01 * n, abs=1e-5) for reward, correct, n in samples)
    evaluated = rows(store, "SELECT value FROM steps WHERE name = 'eval/heldout/pass@1' AND step = 2")
    assert evaluated and 0 < evaluated[0][0] <= 1  # a length penalty makes no answer wrong
