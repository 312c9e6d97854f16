"""Which column is which: keys of METRICS, the aliases of other trainers, and what --map says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from monitor.commands.check import main
from monitor.errors import MonitorError
from monitor.integrations.aliases import ALIASES, match, shortened
from monitor.integrations.files.series import read_series
from monitor.metrics import metric


def named(*columns: str, **chosen: str) -> dict[str, str]:
    """The mapping of these columns and a step."""
    return match("x.csv", {name: name for name in ("step", *columns)}, chosen)


def test_every_alias_names_a_key() -> None:
    for trainer, rows in ALIASES.items():
        columns = [alias.column for alias in rows]
        assert len(set(columns)) == len(columns), trainer
        for alias in rows:
            metric(alias.key.format(split="heldout", k=4))
            column, beside = alias.column.format(split="openai/gsm8k", k=4, n=8), [alias.beside] * bool(alias.beside)
            assert named(column, *beside)[alias.key.format(split="openai_gsm8k", k=4)] == column


def test_the_columns_of_each_trainer() -> None:
    verl = named("actor/entropy", "critic/score/mean", "critic/rewards/mean", "actor/pg_clipfrac", "actor/ppo_kl")
    assert verl == {"step": "step", "reward": "critic/score/mean", "entropy": "actor/entropy"}
    trl = named("train/entropy", "train/completions/mean_length", "train/rewards/accuracy/mean", "eval/entropy")
    assert trl == {"step": "step", "response_length": "train/completions/mean_length", "entropy": "train/entropy"}
    evaluations = named("val-core/openai/gsm8k/acc/mean@8", "val-core/openai/gsm8k/acc/best@8/mean", "eval/aime/pass@4")
    assert evaluations == {
        "step": "step",
        "eval/aime/pass@4": "eval/aime/pass@4",
        "eval/openai_gsm8k/pass@1": "val-core/openai/gsm8k/acc/mean@8",
        "eval/openai_gsm8k/pass@8": "val-core/openai/gsm8k/acc/best@8/mean",
    }


def test_tails_are_never_guessed() -> None:
    assert named("loss/entropy_bonus", "my/entropy", "eval_reward", "rewards/format/mean", "mean_reward") == {
        "step": "step"
    }
    assert named("train/entropy_loss") == {"step": "step"}  # stable-baselines3 logs the negative under this name
    beside = named("train/entropy_loss", "train/ppo_clip_ratio")
    assert beside == {"step": "step", "entropy": "train/entropy_loss"}


def test_the_key_itself_wins_and_other_pairs_are_an_error() -> None:
    assert named("actor/entropy", "entropy")["entropy"] == "entropy"
    assert named("train/reward", "reward", "critic/score/mean")["reward"] == "reward"
    expected = r"^'x.csv': entropy could be 'actor/entropy' or 'train/entropy'\. Choose one: --map 'entropy=actor/entro"
    with pytest.raises(MonitorError, match=expected):
        named("actor/entropy", "train/entropy")
    assert named("actor/entropy", "train/entropy", entropy="train/entropy")["entropy"] == "train/entropy"


def test_the_step_is_the_trainers_own_count() -> None:
    assert match("x", {"_step": "_step", "train/global_step": "train/global_step"}, {})["step"] == "train/global_step"
    assert match("x", {"Step": "Step", "_step": "_step"}, {})["step"] == "Step"
    assert match("x", {"epoch": "epoch", "it": "it"}, {"step": "it"}) == {"step": "it"}
    with pytest.raises(MonitorError, match=r"^'x' has no column of the step\. .* Its columns: epoch\. .*--map step="):
        match("x", {"epoch": "epoch"}, {})


def test_map_goes_before_what_was_found() -> None:
    assert named("entropy", "mine", entropy="mine") == {"step": "step", "entropy": "mine"}
    # a column that was given away is not used for its own key as well
    assert named("entropy", renyi2="entropy") == {"step": "step", "renyi2": "entropy"}
    with pytest.raises(MonitorError, match=r"^--map: Unknown metric 'entropi'\. Did you mean 'entropy'\?"):
        named("a", entropi="a")
    with pytest.raises(MonitorError, match=r"--map entropy=my/eb: 'x.csv' has no column 'my/eb'\. Did you mean 'my/e'"):
        named("my/e", entropy="my/eb")


def test_the_command_prints_the_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("it,actor/entropy,score,loss/entropy_bonus\n" + "".join(f"{i},0.5,1,2\n" for i in range(40)))
    assert main([str(path), "--json", "--map", "step=it, reward=score"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report.pop("verdict")["health"] == "healthy"
    assert report == {
        "alerts": [],
        "mapping": {"step": "it", "reward": "score", "entropy": "actor/entropy"},
        "unmapped": ["loss/entropy_bonus"],
    }
    assert err.splitlines() == [
        "rlvr check: uses step <- it, reward <- score, entropy <- actor/entropy",
        "rlvr check: does not know loss/entropy_bonus",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("entropy", "--map has 'entropy', expected key=column"),
        ("entropy=", "--map has 'entropy=', expected key=column"),
        ("entropy=a,entropy=b", "--map names entropy twice: a and b."),
        ("speed=a", "--map: Unknown metric 'speed'."),
        ("entropy=c", "--map entropy=c: "),
    ],
)
def test_a_wrong_map_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text("step,a,b\n0,1,2\n")
    assert main([str(path), "--map", text]) == 2
    assert expected in capsys.readouterr().err


def test_long_lists_are_cut() -> None:
    assert shortened([]) == ""
    # "aaaa, bbbb" takes 4 + 2 + 4 = 10 characters, a third name would take 16
    assert shortened(["aaaa", "bbbb", "cccc", "dddd"], width=10) == "aaaa, bbbb and 2 more"


def test_rows_of_one_step_are_put_together(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows: list[dict[str, float]] = [
        {"step": 1, "entropy": 0.5, "epoch": 0.1},
        {"step": 1, "eval/heldout/pass@1": 0.25},
        {"step": 2, "entropy": 0.4},
        {"lr": 1.0},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + '\n{"step": 3, "entr')
    series = read_series(str(path))
    assert series.columns == {
        "step": [1, 2],
        "entropy": [0.5, 0.4],
        "lr": [None, None],
        "eval/heldout/pass@1": [0.25, None],
    }
    assert series.unmapped == ("epoch",)
    assert series.notes == (
        f"{path}: the last line is not complete and is left out.",
        f"{path}: 1 rows have no step and are left out.",
    )
