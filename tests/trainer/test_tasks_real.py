"""The tasks on reasoning-gym and on JSON lines: splits, scores and errors."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from trainer.rewards.checking import checked_rewards
from trainer.tasks import make_task
from trainer.tasks.jsonl import JsonlTask
from trainer.tasks.reasoning_gym import HELDOUT, OOD, ReasoningGymTask, extract_answer


def score(task: Any, prompt: Any, *completions: str) -> list[float | None]:
    columns = {key: [value] * len(completions) for key, value in prompt.columns.items()}
    return task.reward([prompt.text] * len(completions), list(completions), [[0]] * len(completions), **columns)


def test_extract_answer() -> None:
    assert extract_answer("so <answer> 3 </answer> no, <answer>\n4\n</answer>") == "4"
    assert extract_answer("the answer is 3") is None
    assert extract_answer("<answer>3") is None and extract_answer("<answer> </answer>") is None


def test_reasoning_gym_splits_are_deterministic_and_disjoint() -> None:
    task = ReasoningGymTask("chain_sum", seed=3, size=200)
    again = make_task("reasoning_gym:chain_sum")
    train, heldout, ood = (task.prompts(split) for split in ("train", "heldout", "ood"))
    assert (len(train), len(heldout), len(ood)) == (200, HELDOUT, OOD)
    assert [p.text for p in train] == [p.text for p in ReasoningGymTask("chain_sum", 3, 200).prompts("train")]
    texts = [p.text for p in [*train, *heldout, *ood]]
    assert not {p.text for p in train} & {p.text for p in [*heldout, *ood]}
    assert len(set(texts[200:])) == HELDOUT + OOD
    assert task.prompts("multipath") == []
    assert len(again.prompts("train")) == 512 and again.prompts("train")[0].text != train[0].text
    terms = [p.text.count("+") + p.text.count(" - ") + 1 for p in ood]
    assert min(terms) == 7  # the default configuration ends at 6 terms
    assert "<answer>" in (task.system_prompt or "")


def test_a_small_dataset_gives_fewer_heldout_prompts_rather_than_known_ones() -> None:
    task = ReasoningGymTask("gcd", size=64)
    known = {p.text for p in task.prompts("train")}
    assert not known & {p.text for p in task.prompts("heldout")}
    assert {p.split for p in task.prompts("heldout")} == {"heldout"}


def test_reasoning_gym_rewards_are_zero_or_one_and_need_the_tag() -> None:
    task = ReasoningGymTask("chain_sum", size=4)
    prompt = task.prompts("train")[0]
    gold = prompt.columns["answer"]
    assert score(
        task,
        prompt,
        f"thinking <answer>{gold}</answer>",
        f"<answer>  {gold}\n</answer> trailing",
        f"<answer>0</answer> <answer>{gold}</answer>",
        f"<answer>{gold}</answer> <answer>0</answer>",
        gold,  # right, but not in the tag
        f"<answer>the answer is {gold}</answer>",  # the package would give part of the reward
        f"<answer>{gold}{gold}</answer>",
        "<answer></answer>",
        "",
    ) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert task.correct_at == 1.0
    assert task.canonical(prompt, f"<answer> {gold}\n</answer>") == gold
    assert task.canonical(prompt, "<answer>0.5</answer>") is None and task.canonical(prompt, gold) is None


def test_reward_knows_problems_of_splits_that_were_not_read_here() -> None:
    prompt = ReasoningGymTask("gcd").prompts("heldout")[5]
    fresh = ReasoningGymTask("gcd")
    assert score(fresh, prompt, f"<answer>{prompt.columns['answer']}</answer>", "<answer>x</answer>") == [1.0, 0.0]


@pytest.mark.parametrize("name", ["basic_arithmetic", "spell_backward", "simple_equations", "countdown", "acre"])
def test_own_answers_of_other_datasets_score_one(name: str) -> None:
    task = ReasoningGymTask(name, size=8)
    for prompt in task.prompts("train"):
        answer = prompt.columns["answer"]
        if name == "countdown":  # the answer is one of many: only valid expressions count
            answer = task._entries[prompt.id]["metadata"]["expression"]
        assert score(task, prompt, f"<answer>{answer}</answer>", "<answer>?!</answer>") == [1.0, 0.0], prompt
    assert (task._harder() is not None) == (name in ("simple_equations", "countdown"))  # others end at the defaults


def test_reasoning_gym_errors() -> None:
    with pytest.raises(ValueError, match=r"Unknown reasoning-gym dataset 'chain_sums'. Did you mean 'chain_sum'\?"):
        make_task("reasoning_gym:chain_sums")
    with pytest.raises(ValueError, match=r"'composite' cannot be made from its defaults"):
        ReasoningGymTask("composite")
    with pytest.raises(ValueError, match="size is 0"):
        ReasoningGymTask("gcd", size=0)
    with pytest.raises(ValueError, match="needs the column 'problem', got answer"):
        ReasoningGymTask("gcd").reward(["a"], ["b"], [[1]], answer=["1"])


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def test_jsonl_holds_out_the_last_tenth(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": f"{i}+1?", "answer": i + 1, "level": i} for i in range(30)])
    task = make_task(f"jsonl:{path}")
    assert [p.text for p in task.prompts("heldout")] == ["27+1?", "28+1?", "29+1?"]
    assert len(task.prompts("train")) == 27 and task.prompts("ood") == task.prompts("multipath") == []
    first = task.prompts("train")[0]
    assert (first.id, dict(first.columns)) == ("line-1", {"answer": "1", "level": 0})


def test_jsonl_named_splits(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2", "split": "ood"}]
    task = JsonlTask(write(tmp_path / "d.jsonl", rows))
    assert [p.text for p in task.prompts("train")] == ["a"] and [p.text for p in task.prompts("ood")] == ["b"]
    assert task.prompts("heldout") == []


SCORES = [
    ("1/2", "<answer>0.5</answer>", 1.0),
    ("1/2", "<answer>\\frac{1}{2}</answer>", 1.0),
    ("\\frac{1}{2}", "The result is $\\frac{2}{4}$.", 1.0),
    ("42", "so the answer is \\boxed{42}", 1.0),
    ("42", "first 42, then <answer>41</answer>", 0.0),
    ("42", "I do not know", 0.0),
    ("42", "", 0.0),
    ("x + 1", "<answer>1 + x</answer>", 1.0),
    ("x + 1", "<answer>1</answer>", 0.0),
    ("x + 1", "\\boxed{x - 1}", 0.0),
    ("72", "48 + 24 = 72\n#### 72", 1.0),
    ("1,000", "#### 1000", 1.0),
    ("\\sqrt{8}", "<answer>2\\sqrt{2}</answer>", 1.0),
    ("1,000", "<answer>1000</answer>", 1.0),
    ("Paris", "<answer> paris </answer>", 1.0),
    ("Paris", "<answer>London</answer>", 0.0),
    ("Paris", "I think \\boxed{Paris}", 1.0),
]


@pytest.mark.parametrize(("gold", "completion", "expected"), SCORES)
def test_jsonl_scores(tmp_path: Path, gold: str, completion: str, expected: float) -> None:
    task = JsonlTask(write(tmp_path / "d.jsonl", [{"prompt": "?", "answer": gold}]))
    assert score(task, task.prompts("train")[0], completion) == [expected]
    assert task.canonical(task.prompts("train")[0], completion) is None


def test_jsonl_scores_the_same_off_the_main_thread(tmp_path: Path) -> None:
    task = JsonlTask(write(tmp_path / "d.jsonl", [{"prompt": "?", "answer": "0"}]))
    results: list[Any] = []

    def work() -> None:
        golds, texts = [gold for gold, _, _ in SCORES], [text for _, text, _ in SCORES]
        results.extend(task.reward(["?"] * len(texts), texts, [[0]] * len(texts), answer=golds))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [expected for _, _, expected in SCORES]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no rows, expected one"),
        ("\n \n", "has no rows"),
        ('{"prompt": "a", "answer": 1}\n{"prompt": "b",\n', "line 2 is not JSON:"),
        ('\n{"prompt": "a"}\n', "line 2 has no answer. Its keys: prompt."),
        ('{"question": "a"}\n', "line 1 has no prompt and no answer. Its keys: question."),
        ("[1]\n", "line 1 is a list, expected an object"),
        ('{"prompt": [1], "answer": 1}\n', "line 1: prompt is '[1]', expected a text"),
        ('{"prompt": "a", "answer": [1]}\n', "line 1: answer is a list, expected a text or a number"),
        ('{"prompt": "a", "answer": " "}\n', "line 1: answer is ' ', expected a text or a number"),
        (
            '{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": 1, "completions": 1}\n',
            "line 2: key 'completions' would be a column for reward functions, which are given prompts, completions, "
            "completion_ids already. Rename the key in the file.",
        ),
        ('{"prompt": "a", "answer": 1, "split": "trian"}\n', "split is 'trian'. Did you mean 'train'?"),
        ('{"prompt": "a", "answer": 1, "split": "ood"}\n', "has no row of split 'train'"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        JsonlTask(str(path))
    assert expected in str(caught.value)


def test_jsonl_keys_may_be_called_like_our_own_parameters(tmp_path: Path) -> None:
    task = JsonlTask(write(tmp_path / "d.jsonl", [{"prompt": "?", "answer": 4, "function": "f", "self": 1}]))
    columns = {key: [value] for key, value in task.prompts("train")[0].columns.items()}
    assert columns == {"answer": ["4"], "function": ["f"], "self": [1]}
    reward = partial(checked_rewards, task.reward)
    assert reward(prompts=["?"], completions=["\\boxed{4}"], completion_ids=[[0]], **columns) == [1.0]


def test_jsonl_missing_file(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "a", "answer": 1}])
    with pytest.raises(ValueError, match=r"No file .*dta.jsonl'. Did you mean 'data.jsonl'\?"):
        make_task(f"jsonl:{tmp_path}/dta.jsonl")
