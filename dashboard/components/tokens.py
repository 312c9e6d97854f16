"""Token text coloured by a value, as plain HTML. Tokens are escaped, hovering shows values, whitespace is visible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup, escape

from dashboard.escape import html
from dashboard.figures.theme import Theme, label
from monitor.queries.frames import Frame

LEVELS = 8
COLOUR_BY = ("entropy", "deviation", "weight")
_MARKS = str.maketrans({"\n": "⏎\n", "\t": "⇥\t", "\r": "␍"})


@dataclass(frozen=True, slots=True)
class TokenScale:
    """How values become colours: a value's level is the number of `borders` that it reaches."""

    key: str
    borders: np.ndarray  # [LEVELS - 1], ascending

    def levels(self, values: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.borders, values, side="right")


def token_scale(key: str) -> TokenScale:
    """Fixed borders, so that colours mean the same in every sample, step and run."""
    borders = {
        "entropy": np.array([0.01, 0.05, 0.15, 0.4, 0.8, 1.4, 2.2]),
        "deviation": np.array([1e-4, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.35]),
        "weight": np.array([1e-6, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]),
    }
    return TokenScale(key, borders[key])


def _mix(low: str, high: str, share: float) -> str:
    pairs = zip((low[1:3], low[3:5], low[5:7]), (high[1:3], high[3:5], high[5:7]), strict=True)
    return "#" + "".join(f"{round(int(a, 16) * (1 - share) + int(b, 16) * share):02x}" for a, b in pairs)


def _luminance(colour: str) -> float:
    def linear(part: str) -> float:
        value = int(part, 16) / 255
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(colour[i : i + 2]) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def token_css(theme: Theme) -> Markup:
    """One CSS class for each level. Its text is dark or light, whichever contrasts more."""
    end = theme.accent
    rules = []
    for level in range(LEVELS):
        back = _mix(theme.paper, end, level / (LEVELS - 1))
        front = "#ffffff" if _luminance(back) < 0.18 else "#000000"
        rules.append(
            f".rlvr-t{level}{{background:{back};color:{front}}}" if level else f".rlvr-t0{{color:{theme.text}}}"
        )
    return Markup(  # noqa: S704 - colours of our own theme
        "<style>.rlvr-tokens{white-space:pre-wrap;overflow-wrap:anywhere;font-family:var(--st-code-font,monospace);"
        "font-size:0.9rem;line-height:1.75}.rlvr-tokens span{border-radius:3px;padding:1px 0;"
        f"box-shadow:inset -1px 0 {theme.paper}}}"
        f".rlvr-tokens .rlvr-ws{{opacity:.45}}.rlvr-tokens span:hover{{outline:1.5px solid {theme.second}}}"
        ".rlvr-legend{display:flex;flex-wrap:wrap;gap:4px 10px;align-items:center;font-size:.8rem;margin-bottom:.4rem}"
        ".rlvr-legend i{display:inline-block;width:1.1rem;height:.8rem;border-radius:3px;margin-right:.3rem;"
        f"border:1px solid {theme.grid};vertical-align:-1px}}" + "".join(rules) + "</style>"
    )


def legend_html(scale: TokenScale, weights: np.ndarray | None = None) -> Markup:
    """Colour key with the range of values of each level. weights: those on the page; if all are 0 or 1 it has two."""
    name, unit, _ = label(scale.key)
    edges = [f"{border:g}" for border in scale.borders]
    texts = [f"< {edges[0]}", *(f"{a}–{b}" for a, b in pairwise(edges)), f"≥ {edges[-1]}"]
    if scale.key == "weight":
        texts[:2] = "0", f"above 0, below {edges[1]}"
    told = dict(enumerate(texts))
    if weights is not None and np.isin(weights, (0.0, 1.0)).all():
        told = {0: "0, left out", int(scale.levels(np.ones(1))[0]): "1, counts"}
    items = Markup().join(html('<span><i class="rlvr-t{}"></i>{}</span>', level, text) for level, text in told.items())
    unit_text = f", {unit}" if unit else ""
    return html('<div class="rlvr-legend"><b>{}{}</b>{}</div>', name, unit_text, items)


def tokens_html(texts: Sequence[str], tokens: Frame, scale: TokenScale) -> Markup:
    """The response as coloured spans. texts: one string for each row of `tokens`; missing ones show the token id."""
    levels = scale.levels(tokens[scale.key])
    spans = []
    for i, level in enumerate(levels):
        text = texts[i] if i < len(texts) else f"<{tokens['token_id'][i]}>"
        spans.append(f'<span class="rlvr-t{level}" title="{escape(_title(tokens, i, text))}">{_visible(text)}</span>')
    return Markup(f'<div class="rlvr-tokens">{"".join(spans)}</div>')  # noqa: S704 - of escaped parts, in one go


def _visible(text: str) -> str:
    if text and not text.strip():
        text = text.replace(" ", "·")
    return escape(text.translate(_MARKS)) or "∅"


def _title(tokens: Frame, i: int, text: str) -> str:
    return (
        f"{text!r} at {tokens['position'][i]}\n"
        f"p {np.exp(tokens['logprob'][i]):.4f}\n"
        f"entropy {tokens['entropy'][i]:.4f} nats (Renyi-2 {tokens['renyi2'][i]:.4f})\n"
        f"deviation {tokens['deviation'][i]:.4f} nats, {tokens['alive'][i]} alive\n"
        f"weight {tokens['weight'][i]:.4g}"
    )
