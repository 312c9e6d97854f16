"""`rlvr eval`: figures per prompt by hand; a run, a model and wrong use."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from trainer.commands.eval import main, split_figures
from trainer.commands.train import main as train
from trainer.evaluate import SplitOutcome


def outcome(n_correct: list[int], distinct: list[int] | None = None) -> SplitOutcome:
    found = np.array(distinct) if distinct else None
    return SplitOutcome(4, np.array(n_correct), found, np.arange(len(n_correct), dtype=float))


def test_figures_are_means_over_prompts_with_an_interval_over_prompts():
    found = split_figures(outcome([0, 4, 1], [0, 2, 1]), [1, 2])
    assert found["prompts"] == 3 and found["solved"] == pytest.approx(2 / 3)
    assert found["pass@1"]["mean"] == pytest.approx((0 + 1 + 0.25) / 3)
    assert found["pass@2"]["mean"] == pytest.approx((0 + 1 + (1 - math.comb(3, 2) / math.comb(4, 2))) / 3)
    assert found["distinct"]["mean"] == 1.0 and found["response_length"]["mean"] == 1.0
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


def test_a_jsonl_task_of_ones_own_and_the_table(store, tmp_path, capsys):
    rows = [{"prompt": f"{n}: \\boxed", "answer": n} for n in (57, 24)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = f"jsonl:{tmp_path / 'p.jsonl'}"
    assert main(["builtin", "--task", task, "--samples", "2", "--k", "1", "--max-new-tokens", "8"]) == 0
    told = capsys.readouterr().out
    assert "at most 8 tokens" in told and "heldout" in told and "ood" not in told and "95 % bootstrap" in told


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
