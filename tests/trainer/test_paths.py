"""The task of paths: its rules by hand, its splits against a search of the test's own, and its base policy."""

from __future__ import annotations

import json
from collections import Counter, deque
from itertools import pairwise

import pytest

from trainer.base_models.make_base import RECIPES, build_texts, with_unrelated_prompts
from trainer.commands.eval import main
from trainer.tasks import SPLITS, make_task
from trainer.tasks.paths import GRID, cells_of, written_moves

TASK = make_task("paths")


@pytest.mark.parametrize(
    ("start", "goal", "completion", "right"),
    [  # rows 0 and 1 of the map: "........" and ".##..#.."; row 2: "......#."
        ("13", "52", "22224;", True),  # 23 33 43 53 52
        ("13", "52", " 22224\n", True),  # without ";", white space around
        ("00", "07", "6666666;", True),
        ("00", "02", "22668648;", False),  # 10 20 21 22, then 12 is a wall
        ("00", "02", "6;", False),  # ends at 01
        ("00", "02", "666;", False),  # goes past it
        ("00", "02", "666822;", False),  # 8 leaves the grid upwards
        ("07", "00", "6;", False),  # 6 leaves it to the right: "08" is no cell
        ("70", "72", "2;", False),
        ("70", "72", "4;", False),  # "7-1" is none either
        ("10", "12", "66;", False),  # 11 is a wall, and so is the goal
        ("00", "01", "6466;", False),  # 00 again
        ("03", "13", "6248;", False),  # 04 14 13 03: the start counts as entered
        ("03", "13", "624;", True),
        ("00", "00", ";", False),  # no moves
        ("00", "01", "6;;", False),
        ("00", "01", "6;6", False),
        ("00", "01", "6 ;", False),
        ("00", "01", "5;", False),
        ("00", "01", "\u0666;", False),  # an Arabic six is a digit, but no move
        ("00", "01", "00,01:6;", False),
        ("00", "01", "", False),
        ("17", "36", "8444444422226668;", False),  # 07 06 .. 00 10 20 30 40 41: a wall
    ],
)
def test_paths_by_hand(start, goal, completion, right):
    assert TASK.reward([""], [completion], [[]], start=[start], goal=[goal]) == [float(right)]


def test_sixteen_moves_are_allowed_and_seventeen_are_not():
    # from 00 along row 0 to 07, down to 37, left to 33: 7 + 3 + 4 moves; 23 and 24 make 16, 25 makes 17
    sixteen = "6666666" + "222" + "4444" + "86"
    assert cells_of("00", sixteen)[-4:] == ["34", "33", "23", "24"]
    assert cells_of("00", sixteen + "6")[-1] == "25"
    completions = [sixteen + ";", sixteen + "6;"]
    assert TASK.reward(["", ""], completions, [[], []], start=["00"] * 2, goal=["24", "25"]) == [1.0, 0.0]
    assert (written_moves(sixteen), written_moves(sixteen + "6")) == (sixteen, None)


def test_the_form_of_a_right_path_is_the_path():
    prompt = next(p for p in TASK.prompts("train") if p.text == "00,31:")
    # 10 20 30 31; 10 20 21 31; 01 is no way down
    forms = [TASK.canonical(prompt, text) for text in ("2226;", "2226", "2262;", "6;", "22262;", "words")]
    assert forms == ["2226", "2226", "2262", None, None, None]


def shortest(start: str) -> dict[str, list[str]]:
    """{cell: all shortest paths to it, as cells}, breadth first over the map itself."""
    found = {start: [start]}
    queue = deque([start])
    while queue:
        cell = queue.popleft()
        for row, col in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            r, c = int(cell[0]) + row, int(cell[1]) + col
            if not (0 <= r < 8 and 0 <= c < 8) or GRID[r][c] == "#":
                continue
            paths = [path + f" {r}{c}" for path in found[cell]]
            if f"{r}{c}" not in found:
                queue.append(f"{r}{c}")
                found[f"{r}{c}"] = paths
            elif len(found[f"{r}{c}"][0]) == len(paths[0]):
                found[f"{r}{c}"] += paths
    return found


def test_splits_are_as_the_docstring_says_and_every_prompt_has_a_right_answer():
    moves = {(-1, 0): "8", (1, 0): "2", (0, -1): "4", (0, 1): "6"}
    pairs = Counter()
    for split in SPLITS:
        for prompt in TASK.prompts(split):
            start, goal = prompt.columns["start"], prompt.columns["goal"]
            assert (prompt.id, prompt.text, prompt.split) == (f"{start}-{goal}", f"{start},{goal}:", split)
            pairs[frozenset((start, goal))] += 1
            paths = shortest(start)[goal]
            cells = paths[0].split()
            if split == "ood":
                assert 10 <= len(cells) - 1 <= 16
            else:
                assert 4 <= len(cells) - 1 <= 8 and (len(paths) >= 7) == (split == "multipath")
            steps = [(int(b[0]) - int(a[0]), int(b[1]) - int(a[1])) for a, b in pairwise(cells)]
            answer = "".join(moves[step] for step in steps) + ";"
            assert TASK.reward([prompt.text], [answer], [[]], start=[start], goal=[goal]) == [1.0]
    assert set(pairs.values()) == {1}  # no pair twice, in no split, in neither direction
    sizes = {split: len(TASK.prompts(split)) for split in SPLITS}
    assert sizes == {"train": 626, "heldout": 64, "ood": 64, "multipath": 58}


def test_the_order_is_fixed_and_mixed():
    first = {split: [p.text for p in TASK.prompts(split)[:2]] for split in SPLITS}
    assert first == {
        "train": ["00,31:", "10,62:"], "heldout": ["44,27:", "03,72:"], "ood": ["27,40:", "06,51:"],
        "multipath": ["22,65:", "76,23:"],
    }  # fmt: skip
    # of each split the mean distance of the first 24 is near that of all: the order says nothing about it
    for split in SPLITS:
        lengths = [len(shortest(p.columns["start"])[p.columns["goal"]][0].split()) - 1 for p in TASK.prompts(split)]
        assert abs(sum(lengths[:24]) / 24 - sum(lengths) / len(lengths)) < 0.6


def test_the_texts_of_the_base_policy_are_right_answers_until_their_prompts_are_replaced():
    recipe = RECIPES["paths"]
    texts = build_texts(recipe, 1000, seed=0)
    changed = with_unrelated_prompts(recipe, texts, seed=0)

    def right(texts):
        prompts, answers = zip(*(text.split(":") for text in texts), strict=True)
        columns = {"start": [p[:2] for p in prompts], "goal": [p[3:] for p in prompts]}
        return TASK.reward(list(prompts), list(answers), [[]] * len(texts), **columns)

    assert right(texts) == [1.0] * 1000 and max(map(len, texts)) == 6 + 16 + 1  # "13,52:", 16 moves, ";"
    # 40 % get another goal, which is theirs again one time in 50: 1 - .4 * 49/50 = .608, standard error .015
    assert abs(sum(right(changed)) / 1000 - 0.608) < 0.05
    assert [text[:3] + text[5:] for text in changed] == [text[:3] + text[5:] for text in texts]


def test_the_base_policy_half_knows_the_task(capsys):
    options = ["--task", "paths", "--split", "heldout", "multipath", "--prompts", "16", "--k", "1", "16", "--json"]
    assert main(["builtin-paths", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["max_new_tokens"] == 74  # the context of 80 less a prompt of 6: longer than any right answer
    means = {
        split: {name: figure["mean"] for name, figure in figures.items() if name in ("pass@1", "pass@16", "distinct")}
        for split, figures in found["splits"].items()
    }
    heldout, multipath = means["heldout"], means["multipath"]
    # all 64 and 58 prompts: pass@1 .32 and .34, pass@16 1 and 1, distinct 3.1 and 4.5
    assert 0.2 < heldout["pass@1"] < 0.45 and heldout["pass@16"] > 0.9
    assert multipath["pass@16"] > 0.9 and multipath["distinct"] > 3
