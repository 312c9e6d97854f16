"""What components send: rollouts with fixed colours that can be read on, and charts in two parts."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from dashboard.components.chart import BLOCK, Packed, chart_code, new_points_text, packed
from dashboard.components.rollouts import (
    BORDERS,
    COLOUR_BY,
    LEVELS,
    _luminance,
    _mix,
    legend,
    level,
    level_colours,
    sent_rollouts,
)
from dashboard.figures.lines import Line, lines, smoothed
from dashboard.figures.theme import DARK, LIGHT


def frame(n: int, **columns):
    base = {"position": np.arange(n), "token_id": np.arange(n), "logprob": np.full(n, -0.5), "entropy": np.zeros(n),
            "renyi2": np.zeros(n), "deviation": np.zeros(n), "alive": np.full(n, 8), "weight": np.ones(n)}  # fmt: skip
    return base | columns


def rows(*texts: list[str], **columns):
    n = len(texts)
    base = {"rank": np.zeros(n, int), "sample": np.arange(n), "correct": np.ones(n, bool), "reward": np.ones(n),
            "truncated": np.zeros(n, bool), "advantage": np.full(n, 0.5), "completion": np.array(["x"] * n, object),
            "n_tokens": np.array([len(one) for one in texts]),
            "token_texts": np.array([*texts, None], object)[:-1]}  # fmt: skip
    return base | columns


def numbers(packed: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"])


def test_rollouts_are_sent_in_the_order_shown_with_the_values_of_their_own_tokens() -> None:
    tokens = frame(5, sample=np.array([3, 3, 7, 7, 7]), position=np.array([0, 1, 0, 1, 2]),
                   entropy=np.arange(5) / 10, weight=np.array([0.0, 1.0, 1.0, 1.0, 1.0]))  # fmt: skip
    sent = sent_rollouts(rows(["a", "b", "c"], ["d", "e"], ["f"], sample=np.array([7, 3, 5])), tokens)
    assert [one["sample"] for one in sent["rollouts"]] == [7, 3, 5]
    assert [one["kept"] for one in sent["rollouts"]] == [3, 2, 0]
    assert [one["texts"] for one in sent["rollouts"]] == [["a", "b", "c"], ["d", "e"], []]
    np.testing.assert_allclose(numbers(sent["values"]["entropy"]), [0.2, 0.3, 0.4, 0.0, 0.1], rtol=1e-6)
    assert numbers(sent["values"]["position"]).tolist() == [0, 1, 2, 0, 1]
    # mean entropy (0 + .1) / 2 = .05; one of two tokens has a weight
    assert sent["rollouts"][1]["figures"] == (
        "reward 1 · advantage +0.5 · 2 tokens · mean entropy 0.050 and deviation 0.000 nats · 50% selected"
    )
    assert [one["completion"] for one in sent["rollouts"]] == ["", "", "x"]  # its text stands for the tokens not kept


def test_a_token_is_shown_by_the_text_at_its_position_or_by_its_id() -> None:
    tokens = frame(3, sample=np.zeros(3, int), position=np.array([1, 2, 5]), token_id=np.array([11, 12, 15]))
    assert sent_rollouts(rows(["a", "b", "c"]), tokens)["rollouts"][0]["texts"] == ["b", "c", "<15>"]


def test_what_is_sent_is_named_by_its_content() -> None:
    one, other = (sent_rollouts(rows([text]), frame(1, sample=np.zeros(1, int))) for text in "ab")
    assert one["id"] != other["id"]
    assert one["id"] == sent_rollouts(rows(["a"]), frame(1, sample=np.zeros(1, int)))["id"]


def test_levels_follow_the_values() -> None:
    assert [level("entropy", value) for value in (0.0, 0.02, 0.6, 5.0)] == [0, 1, 4, 7]
    assert [level("weight", value) for value in (0.0, 1.0)] == [0, 5]


@pytest.mark.parametrize("key", COLOUR_BY)
def test_the_legend_names_every_level(key: str) -> None:
    assert len(BORDERS[key]) == LEVELS - 1 and [number for number, _ in legend(key)] == list(range(LEVELS))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_contrasts_with_its_colour(theme) -> None:
    """At least 4.5:1 (WCAG AA) on every level."""
    colours = level_colours(theme)
    assert len(colours) == LEVELS and colours[0] == (theme.paper, theme.text)
    for back, front in colours:
        high, low = sorted((_luminance(back), _luminance(front)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (back, front)


def test_mixing_ends_at_the_ends() -> None:
    assert _mix("#000000", "#ffffff", 0.0) == "#000000" and _mix("#000000", "#ff8000", 1.0) == "#ff8000"


def test_the_older_points_of_a_curve_are_sent_apart_and_stay_the_same() -> None:
    def joined(n: int) -> tuple[Packed, np.ndarray, np.ndarray]:
        steps = np.arange(1, n + 1)
        values = np.sin(steps)
        values[10] = np.nan
        sent = packed(lines(LIGHT, "entropy", [Line("a", steps, values, "#123456")]), split=True)
        parts = [*(json.loads(sent.old) if sent.old else [{}]), *json.loads(sent.figure)["data"]]
        x, y = (np.concatenate([decoded(part[axis]) for part in parts if axis in part]) for axis in ("x", "y"))
        np.testing.assert_array_equal(x, steps)
        np.testing.assert_allclose(y, values, rtol=1e-6)
        return sent, x, y

    def decoded(sent: dict[str, str]) -> np.ndarray:
        return np.frombuffer(base64.b64decode(sent["bdata"]), sent["dtype"])

    assert BLOCK == 48
    assert joined(48)[0].old == "" and joined(48)[0].old_id == ""
    first, later, newer = joined(100)[0], joined(144)[0], joined(145)[0]  # cut at 96, 96 and 144 points
    assert first.old == later.old and first.old_id == later.old_id and first.figure != later.figure
    assert newer.old_id not in (later.old_id, "")
    assert "template" not in json.loads(first.figure)["layout"] and first.theme == "light"


def test_newest_points_are_sent_with_their_steps_once() -> None:
    steps, odd = np.array([7, 8], np.int32), np.array([8], np.int32)
    sent = json.loads(
        new_points_text(
            {
                "run/entropy": (steps, np.float32([0.5, np.nan])),
                "run/reward": (steps, np.float32([1, 2])),
                "run/eval/heldout/pass@1": (odd, np.float32([0.25])),
            }
        )
    )
    assert [numbers(x).tolist() for x in sent["x"]] == [[7, 8], [8]]
    curves = {name: (place, numbers(y)) for name, (place, y) in sent["curves"].items()}
    assert {name: place for name, (place, _) in curves.items()} == {
        "run/entropy": 0,
        "run/reward": 0,
        "run/eval/heldout/pass@1": 1,
    }
    np.testing.assert_array_equal(curves["run/entropy"][1], np.float32([0.5, np.nan]))
    assert curves["run/eval/heldout/pass@1"][1].tolist() == [0.25]


def test_a_curve_names_what_it_grows_by() -> None:
    line = Line("a", np.arange(3), np.ones(3), "#123456", live="run/entropy")
    assert packed(lines(LIGHT, "entropy", [line])).live == ("run/entropy",)
    both = packed(lines(LIGHT, "entropy", smoothed(line, 5)))
    # both the values and their mean, of which a new value is a third: 2 / (5 + 1)
    assert both.live == ("run/entropy",) * 2
    assert [trace["meta"]["share"] for trace in json.loads(both.figure)["data"]] == [1.0, pytest.approx(1 / 3)]
    assert packed(lines(LIGHT, "entropy", [Line("a", np.arange(3), np.ones(3), "#123456")])).live == ()


def test_charts_that_are_no_curves_are_sent_whole() -> None:
    fig = lines(LIGHT, "entropy", [Line("a", np.arange(200), np.arange(200) / 7, "#123456")])
    assert packed(fig).old == "" and packed(fig, split=True).old
    fig.data[0].customdata = np.arange(200)  # of which the parts would not fit together
    assert packed(fig, split=True).old == ""


def test_the_legend_of_weights_says_what_they_do() -> None:
    assert legend("weight")[:2] == [(0, "0"), (1, "above 0, below 0.25")]
    assert legend("weight", np.array([0.0, 1.0, 1.0])) == [(0, "0, left out"), (5, "1, counts")]
    assert len(legend("weight", np.array([0.0, 0.5]))) == LEVELS


def test_the_script_of_the_charts_is_whole() -> None:
    code = chart_code()
    assert "__CSS__" not in code and ".rlvr-menu" in code and "window.rlvrChart = function" in code
    assert '"light": {' in code or '"light":{' in code
