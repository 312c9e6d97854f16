"""Presets by name, the problem files they ask for, and the shaped reward of one of them."""

from __future__ import annotations

import json

import datasets
import pytest

from trainer.commands.fetch import main
from trainer.commands.train import HELP, PRESETS, parse_config
from trainer.config import ConfigError
from trainer.errors import ModelError
from trainer.rewards.builtin import close_to_answer
from trainer.tasks import make_task
from trainer.tasks.public_sets import DATASETS, fetch_dataset, problem_rows


@pytest.mark.parametrize("name", [path.stem for path in PRESETS.glob("*.toml")])
def test_every_preset_is_a_configuration_by_name_and_options_win(name):
    config = parse_config([name, "--steps", "3"])
    assert config.steps == 3 and config == parse_config([str(PRESETS / f"{name}.toml"), "--steps", "3"])
    assert name in HELP
    assert config.task.startswith(("chain", "paths", "reasoning_gym:", "jsonl:"))


def test_the_papers_settings():
    for name, length in (("paper-gsm8k", 512), ("paper-math", 2048)):
        c = parse_config([name])
        assert (c.rollout.prompts, c.rollout.group_size, c.rollout.temperature) == (16, 8, 0.6)
        assert (c.rollout.max_new_tokens, c.optim.lr, c.optim.epochs, c.optim.grad_clip) == (length, 1e-6, 2, 1.0)
        assert (c.loss.kl_coef, c.loss.entropy_coef, c.loss.clip_low, c.loss.clip_high) == (0.001, 0.001, 0.2, 0.2)
        assert (c.weighting.kind, c.weighting.keep, c.weighting.normalise) == ("ict", 0.1, "selected")


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"No preset 'paper-gsm8'\. Did you mean 'paper-gsm8k'\? Known presets: demo,"
    ):
        parse_config(["paper-gsm8"])


def served(monkeypatch, rows):
    """datasets.load_dataset as if the hub held `rows` of each split; returns what it was asked for."""
    asked = []

    def load(repo, configuration, *, split):
        asked.append((repo, configuration, split))
        return datasets.Dataset.from_list([{key: value.format(split) for key, value in row.items()} for row in rows])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_problems_become_rows_of_a_jsonl_task_without_a_second_instruction(tmp_path, monkeypatch):
    asked = served(monkeypatch, [{"question": "How many? {}", "answer": "12*100=<<12*100=1200>>1200\n#### 1,200"}])
    monkeypatch.chdir(tmp_path)
    assert main(["gsm8k"]) == 0 and main(["gsm8k"]) == 2  # the second time the file is there
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    task = make_task("jsonl:gsm8k.jsonl")
    (train,), (heldout,) = task.prompts("train"), task.prompts("heldout")
    ending = " Please reason step by step, and put your final answer within \\boxed{}."
    assert (train.text, train.columns["answer"]) == ("How many? train" + ending, "1200")
    assert heldout.columns["answer"] == "1200" and task.system_prompt is None
    right = task.reward([train.text], ["12 * 100 is $\\boxed{1200}$"], [[]], answer=["1200"])
    assert right == [1.0]


def test_answers_of_math_stay_as_they_are_and_negative_numbers_negative():
    (row,) = problem_rows(DATASETS["math"], "test", [{"problem": "P", "answer": "\\frac{1}{2}, 4"}])
    assert (row["answer"], row["split"]) == ("\\frac{1}{2}, 4", "heldout")
    (row,) = problem_rows(DATASETS["gsm8k"], "train", [{"question": "P", "answer": "1 - 4\n#### -3"}])
    assert (row["answer"], row["split"]) == ("-3", "train")


def test_without_a_network_it_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ModelError, match=r"Cannot download openai/gsm8k .*: ConnectionError\. This needs a network"):
        fetch_dataset(DATASETS["gsm8k"], tmp_path / "gsm8k.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_problem_file_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"Run `rlvr fetch math` to get it"):
        make_task(f"jsonl:{tmp_path / 'math.jsonl'}")


def test_the_shaped_reward_by_hand():
    texts = ["about 15", "20", "20.0 or 19", "none", "-3 so 60"]
    # 0.5 * (1 - 5/20); equal; the last number counts: 0.5 * (1 - 1/20); no number; 40 off is more than 20
    assert close_to_answer([], texts, [], answer=["20"] * 5) == [0.375, 1.0, 0.475, 0.0, 0.0]
    assert close_to_answer([], ["3"], [], answer=["x"]) == [0.0]


def local_set(folder):
    """A data set as a folder of files, which is loaded as one of the hub is."""
    folder.mkdir()
    for split, rows in {"train": [("2+3?", 5), ("1+1?", 2)], "test": [("4+4?", "so 8\n#### 8")]}.items():
        lines = [json.dumps({"question": question, "solution": str(solution)}) for question, solution in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_any_data_set_becomes_problems_by_its_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = local_set(tmp_path / "sums")
    assert main([str(source), "--problem", "question", "--answer", "solution", "--ask", " Answer in <answer>."]) == 0
    assert "3 problems are in sums.jsonl" in capsys.readouterr().out
    task = make_task("jsonl:sums.jsonl")
    assert [(p.text, p.columns["answer"]) for p in task.prompts("train")] == [
        ("2+3? Answer in <answer>.", "5"), ("1+1? Answer in <answer>.", "2")
    ]  # fmt: skip
    assert [p.columns["answer"] for p in task.prompts("heldout")] == ["8"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--problem", "question"], "needs both --problem and --answer"),
        (
            ["--problem", "questions", "--answer", "solution"],
            "no column 'questions' in its split 'train'. Did you mean",
        ),
        (["--problem", "question", "--answer", "solution", "--splits", "train"], "expected SPLIT OF THE SET="),
        (["--problem", "question", "--answer", "solution", "--splits", "train=dev"], "Ours are train, heldout, ood"),
    ],
)
def test_columns_and_splits_that_do_not_exist_are_named(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(local_set(tmp_path / "sums")), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "sums.jsonl").exists()


OWN_TASK = """
from trainer.tasks import Prompt
class Twice:
    name, correct_at, has_forms, system_prompt = "twice", 1.0, False, None
    def prompts(self, split):
        return [Prompt(str(n), f"{n}:", split, {"n": n}) for n in range(40, 50)] if split == "train" else []
    def reward(self, prompts, completions, completion_ids, n):
        return [float(text.strip().endswith(str(2 * k))) for text, k in zip(completions, n)]
    def gives_answer(self, completion):
        return True
    def canonical(self, prompt, completion):
        return None
class Half:
    name = "half"
class Empty(Twice):
    def prompts(self, split):
        return []
"""


def test_a_task_of_one_s_own_is_named_like_a_reward(tmp_path, monkeypatch):
    (tmp_path / "own_task.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    task = make_task("own_task:Twice")
    assert task.name == "twice" and task.reward(["4:"], ["it is 8"], [[1]], n=[4]) == [1.0]
    with pytest.raises(
        ValueError, match=r"makes a Half without canonical, correct_at, gives_answer, has_forms, prompts"
    ):
        make_task("own_task:Half")
    with pytest.raises(ValueError, match=r"has no prompts of split 'train'"):
        make_task("own_task:Empty")
    with pytest.raises(ValueError, match=r"has no function 'Twise'\. Did you mean 'Twice'"):
        make_task("own_task:Twise")
    with pytest.raises(ValueError, match=r"cannot be imported.*Did you mean 'reasoning_gym'"):
        make_task("reasoning_gim:sums")


def test_a_task_of_one_s_own_is_trained_on(tmp_path, monkeypatch):
    from trainer.commands.train import main as train

    (tmp_path / "own_task.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = "--threads 1 --rollout.prompts 2 --rollout.group-size 2 --steps 1 --eval.every 0 --run own".split()
    assert train(["--task", "own_task:Twice", "--store", str(tmp_path / "store"), *options]) == 0
