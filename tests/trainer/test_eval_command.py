"""`rlvr eval`: figures per prompt by hand; a run, a model and wrong use."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from trainer.commands.eval import main, split_figures
from trainer.commands.train import main as train
from trainer.evaluate import SplitOutcome


def outcome(n_correct: list[int], distinct: list[int] | None = None) -> SplitOutcome:
    found = np.array(distinct) if distinct else None
    numbers = np.arange(len(n_correct), dtype=float)
    return SplitOutcome(4, np.array(n_correct), found, numbers, numbers / 4)


def test_figures_are_means_over_prompts_with_an_interval_over_prompts():
    found = split_figures(outcome([0, 4, 1], [0, 2, 1]), [1, 2])
    assert found["prompts"] == 3 and found["solved"] == pytest.approx(2 / 3)
    assert found["pass@1"]["mean"] == pytest.approx((0 + 1 + 0.25) / 3)
    assert found["pass@2"]["mean"] == pytest.approx((0 + 1 + (1 - math.comb(3, 2) / math.comb(4, 2))) / 3)
    assert found["distinct"]["mean"] == 1.0 and found["response_length"]["mean"] == 1.0
    assert found["truncated"]["mean"] == pytest.approx((0 + 1 / 4 + 2 / 4) / 3)
    # 27 resamples of 0, 1, 1/4: all 0 with chance 1/27 = 3.7 %, so the interval reaches from 0 to 1
    assert (found["pass@1"]["low"], found["pass@1"]["high"]) == (0.0, 1.0)


def test_two_prompts_have_no_interval_and_a_task_without_forms_no_distinct():
    found = split_figures(outcome([1, 2]), [1])
    assert found["pass@1"] == {"mean": 0.375, "low": None, "high": None} and "distinct" not in found


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "store"
    options = "--steps 1 --rollout.prompts 2 --rollout.group-size 2 --eval.every 0 --run r --rollout.temperature 0.7"
    assert train([*options.split(), "--store", str(path)]) == 0
    return path


def test_a_run_is_evaluated_as_it_was_trained_and_the_result_is_kept(store, capsys):
    options = ["r", "--store", str(store), "--prompts", "3", "--samples", "4", "--k", "1", "4", "--json"]
    assert main([*options, "--split", "heldout", "multipath"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["temperature"] == 0.7 and told["task"] == "chain" and set(told["splits"]) == {"heldout", "multipath"}
    heldout = told["splits"]["heldout"]
    assert heldout["prompts"] == 3 and heldout["pass@1"]["mean"] <= heldout["pass@4"]["mean"] == heldout["solved"]
    assert main([*options, "--split", "ood"]) == 0
    kept = json.loads((store / "evals" / "r.json").read_text())
    assert [set(each["splits"]) for each in kept] == [{"heldout", "multipath"}, {"ood"}]
    assert kept[0]["splits"] == told["splits"]


def test_equal_seeds_draw_alike_also_in_portions(store, capsys):
    """The final policy's folder is a model like any other; max_new_tokens is the default's here."""
    folder = str(store / "policies" / "r")
    options = [folder, "--store", str(store), "--prompts", "2", "--samples", "2", "--k", "1", "--json", "--seed", "5"]
    results = []
    for _ in range(2):
        assert main(options) == 0
        results.append(json.loads(capsys.readouterr().out)["splits"])
    assert results[0] == results[1]


def jsonl(folder: Path, *prompts: str) -> str:
    rows = [{"prompt": prompt, "answer": "no number"} for prompt in prompts]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"jsonl:{folder / 'p.jsonl'}"


def test_a_jsonl_task_of_ones_own_and_the_table(tmp_path, capsys):
    task = jsonl(tmp_path, "57: \\boxed", "24: \\boxed")
    assert main(["builtin", "--task", task, "--samples", "2", "--k", "1", "--max-new-tokens", "3"]) == 0
    told = capsys.readouterr().out
    assert "at most 3 tokens" in told and "heldout" in told and "ood" not in told and "95 % bootstrap" in told
    assert "100% of the samples of heldout were cut off at 3 tokens" in told  # no chain is that short


@pytest.mark.parametrize("name", ["r", "builtin"])
def test_another_task_than_the_runs_gets_the_length_that_the_context_leaves(store, tmp_path, capsys, name):
    task = jsonl(tmp_path, "57: \\boxed", "57+57: \\boxed")
    options = ["--task", task, "--samples", "2", "--k", "1", "--json", "--store", str(store)]
    assert main([name, *options]) == 0
    told = json.loads(capsys.readouterr().out)
    context = 80
    assert told["max_new_tokens"] == context - len("57+57: \\boxed")  # the built-in tokenizer's tokens are characters
    heldout = told["splits"]["heldout"]
    assert 0 <= heldout["truncated"]["mean"] <= 1 and heldout["truncated"]["low"] is None
    assert heldout["solved"] == 0 and "distinct" not in heldout  # nothing right, and no forms that could differ


def test_a_prompt_that_leaves_no_room_is_named_before_anything_is_sampled(tmp_path, capsys):
    task = jsonl(tmp_path, "57: \\boxed", "7" * 90 + "\\boxed")
    assert main(["builtin", "--task", task, "--samples", "2", "--k", "1"]) == 2
    assert "Prompt 'line-2' of split 'heldout' has 96 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [("model.safetensors", ""), ("config.json", "[1]"), ("config.json", "{"), ("tokenizer.json", "[1]")],
)
def test_a_damaged_policy_is_refused_in_one_line(store, tmp_path, capsys, name, text):
    shutil.copytree(store / "policies" / "r", tmp_path / "r")
    (tmp_path / "r" / name).write_text(text)
    assert main([str(tmp_path / "r"), "--samples", "2", "--k", "1"]) == 2
    assert capsys.readouterr().err.startswith("rlvr eval: ")


def test_a_run_that_does_not_say_how_it_was_sampled_is_refused(store, tmp_path, capsys):
    """Its run.json has lost the configuration: the defaults would be figures of another setting."""
    shutil.copytree(store, tmp_path / "store", symlinks=True)
    path = tmp_path / "store/runs/r/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": "lost"}))
    assert main(["r", "--store", str(tmp_path / "store")]) == 2
    assert "Run 'r' has no configuration of `rlvr train`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rr"], "No run 'rr' in store"),
        (["builtin", "--k", "9", "--samples", "4"], "pass@k needs k from 1 to the number of samples"),
        (["builtin", "--prompts", "0"], "--prompts is 0, expected at least 1"),
        (["builtin", "--task", "chian"], "Did you mean 'chain'?"),
        (["builtin", "--task", "reasoning_gym:gcd", "--split", "multipath"], "has no prompts of split multipath"),
    ],
)
def test_wrong_use(store, capsys, arguments, message):
    assert main([*arguments, "--store", str(store)]) == 2
    assert message in capsys.readouterr().err
