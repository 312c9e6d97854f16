"""Token text: escaped, coloured by fixed scales, readable on every colour."""

from __future__ import annotations

import base64
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from dashboard.components.chart import BLOCK, Packed, chart_code, packed
from dashboard.components.tokens import (
    COLOUR_BY,
    LEVELS,
    _luminance,
    _mix,
    legend_html,
    token_css,
    token_scale,
    tokens_html,
)
from dashboard.figures.lines import Line, lines
from dashboard.figures.theme import DARK, LIGHT


def frame(n: int, **columns):
    base = {"position": np.arange(n), "token_id": np.arange(n), "logprob": np.full(n, -0.5), "entropy": np.zeros(n),
            "renyi2": np.zeros(n), "deviation": np.zeros(n), "alive": np.full(n, 8), "weight": np.ones(n)}  # fmt: skip
    return base | columns


def text_of(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


@pytest.mark.parametrize(
    "text", ["<script>x</script>", "<img src=x onerror='x'>", '" onmouseover="x', "</span></div>", "&lt;"]
)
def test_tokens_are_text_whatever_they_hold(text: str) -> None:
    markup = tokens_html([text], frame(1), token_scale("entropy"))
    seen = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: seen.append((tag, [name for name, _ in attributes]))  # type: ignore[method-assign]
    parser.feed(markup)
    assert seen == [("div", ["class"]), ("span", ["class", "title"])]
    assert text_of(markup) == text


def test_whitespace_is_made_visible() -> None:
    texts = ["\n", "  ", "\t", "a b", ""]
    assert text_of(tokens_html(texts, frame(5), token_scale("entropy"))) == "⏎\n··⇥\ta b∅"


def test_levels_follow_the_values() -> None:
    values = np.array([0.0, 0.02, 0.6, 5.0])
    markup = tokens_html(["a", "b", "c", "d"], frame(4, entropy=values), token_scale("entropy"))
    assert re.findall(r'class="rlvr-t(\d)"', markup) == ["0", "1", "4", "7"]
    weights = tokens_html(["a", "b"], frame(2, weight=np.array([0.0, 1.0])), token_scale("weight"))
    assert re.findall(r'class="rlvr-t(\d)"', weights) == ["0", "5"]


def test_hover_tells_the_values() -> None:
    markup = tokens_html(["a"], frame(1, entropy=np.array([1.25]), weight=np.array([0.5])), token_scale("entropy"))
    title = html.unescape(re.search(r'title="([^"]*)"', markup)[1])
    assert "entropy 1.2500 nats" in title and "weight 0.5" in title and "8 alive" in title and "p 0.6065" in title


def test_missing_texts_show_the_token_id() -> None:
    assert text_of(tokens_html([], frame(2), token_scale("entropy"))) == "<0><1>"


@pytest.mark.parametrize("key", COLOUR_BY)
def test_the_legend_names_every_level(key: str) -> None:
    markup = legend_html(token_scale(key))
    assert len(token_scale(key).borders) == LEVELS - 1
    assert [f"rlvr-t{level}" in markup for level in range(LEVELS)] == [True] * LEVELS


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_contrasts_with_its_colour(theme) -> None:
    """At least 4.5:1 (WCAG AA) on every level."""
    colours = re.findall(r"background:(#\w{6});color:(#\w{6})", token_css(theme))
    assert len(colours) == LEVELS - 1  # the lowest has none: the page's own
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


def test_charts_that_are_no_curves_are_sent_whole() -> None:
    fig = lines(LIGHT, "entropy", [Line("a", np.arange(200), np.arange(200) / 7, "#123456")])
    assert packed(fig).old == "" and packed(fig, split=True).old
    fig.data[0].customdata = np.arange(200)  # of which the parts would not fit together
    assert packed(fig, split=True).old == ""


def test_the_legend_of_weights_says_what_they_do() -> None:
    scale = token_scale("weight")
    assert "above 0, below 0.25" in text_of(legend_html(scale)) and "1e-06" not in text_of(legend_html(scale))
    two = legend_html(scale, np.array([0.0, 1.0, 1.0]))
    assert re.findall(r'rlvr-t(\d)"></i>([^<]*)', two) == [("0", "0, left out"), ("5", "1, counts")]
    assert len(re.findall("<i ", legend_html(scale, np.array([0.0, 0.5])))) == LEVELS


def test_the_script_of_the_charts_is_whole() -> None:
    code = chart_code()
    assert "__CSS__" not in code and ".rlvr-menu" in code and "window.rlvrChart = function" in code
    assert '"light": {' in code or '"light":{' in code
