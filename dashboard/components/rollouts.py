"""Rollouts token by token, and lists of tokens in their contexts: two Streamlit components that draw in the browser."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from dashboard.components.chart import sent_numbers
from dashboard.figures.theme import Theme, label
from monitor.queries.frames import Frame, n_rows, select

_HERE = Path(__file__).parent
LEVELS = 8
COLOUR_BY = ("entropy", "deviation", "weight", "surprisal")
BORDERS = {  # fixed, so that colours mean the same in every rollout, step and run
    "entropy": (0.01, 0.05, 0.15, 0.4, 0.8, 1.4, 2.2),
    "deviation": (1e-4, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.35),
    "weight": (1e-6, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    "surprisal": (0.01, 0.05, 0.15, 0.4, 0.8, 1.4, 2.2),
}
SENT = {
    "position": "i4",
    "alive": "i4",
    "logprob": "f4",
    "entropy": "f4",
    "renyi2": "f4",
    "deviation": "f4",
    "weight": "f4",
}


def level(key: str, value: float) -> int:
    """The level of a value: the number of borders that it reaches."""
    return int(np.searchsorted(BORDERS[key], value, side="right"))


def _mix(low: str, high: str, share: float) -> str:
    pairs = zip((low[1:3], low[3:5], low[5:7]), (high[1:3], high[3:5], high[5:7]), strict=True)
    return "#" + "".join(f"{round(int(a, 16) * (1 - share) + int(b, 16) * share):02x}" for a, b in pairs)


def _luminance(colour: str) -> float:
    def linear(part: str) -> float:
        value = int(part, 16) / 255
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(colour[i : i + 2]) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def level_colours(theme: Theme) -> list[tuple[str, str]]:
    """(background, text) of each level: text dark or light, whichever contrasts more, and of the lowest the page's."""
    backs = [_mix(theme.paper, theme.accent, number / (LEVELS - 1)) for number in range(LEVELS)]
    fronts = [theme.text, *("#ffffff" if _luminance(back) < 0.18 else "#000000" for back in backs[1:])]
    return list(zip(backs, fronts, strict=True))


def legend(key: str, weights: np.ndarray | None = None) -> list[tuple[int, str]]:
    """(level, range of its values) of each level. weights: those on the page; if all are 0 or 1 the legend has two."""
    if weights is not None and np.isin(weights, (0.0, 1.0)).all():
        return [(0, "0, left out"), (level("weight", 1.0), "1, counts")]
    edges = [f"{border:g}" for border in BORDERS[key]]
    texts = [f"< {edges[0]}", *(f"{a}–{b}" for a, b in pairwise(edges)), f"≥ {edges[-1]}"]
    if key == "weight":
        texts[:2] = "0", f"above 0, below {edges[1]}"
    return list(enumerate(texts))


@dataclass(frozen=True, slots=True)
class Lit:
    """Tokens to underline: those whose value of `key` is at least `low` and below `high`; an infinite bound is open."""

    key: str
    low: float
    high: float


def sent_rollouts(rows: Frame, tokens: Frame) -> dict[str, Any]:
    """Rollouts as the browser gets them: what is said of each, its token texts, and the values of all tokens in a row.

    rows: of `monitor.queries.rollouts.samples_of_step`, in the order to show; tokens: theirs, by sample and position. A
    token without a text is shown as its id. What the run did not record, nan in these frames, is not sent.
    """
    about, order = list[dict[str, Any]](), list[np.ndarray]()
    for i in range(n_rows(rows)):
        places = np.flatnonzero(tokens["sample"] == rows["sample"][i]) if n_rows(tokens) else np.empty(0, np.int64)
        texts = [str(text) for text in rows["token_texts"][i]]
        ids = zip(tokens["position"][places], tokens["token_id"][places], strict=True) if len(places) else ()
        about.append(
            {
                "sample": int(rows["sample"][i]),
                "correct": _known_bool(rows["correct"][i]),
                "truncated": _known_bool(rows["truncated"][i]),
                "figures": _figures(rows, i, select(tokens, places) if len(places) else {}),
                "texts": [texts[n] if n < len(texts) else f"<{token}>" for n, token in ids],
                "kept": len(places),
                "completion": "" if len(places) else str(rows["completion"][i]),
            }
        )
        order.append(places)
    every = np.concatenate(order) if order else np.empty(0, np.int64)
    recorded = [key for key in SENT if len(every) and np.isfinite(tokens[key].astype(float)).any()]
    values = {key: sent_numbers(tokens[key][every].astype(SENT[key])) for key in recorded}
    text = json.dumps([about, values])
    return {"id": hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), "rollouts": about, "values": values}


def _figures(rows: Frame, i: int, tokens: Frame) -> str:
    told = (("reward", "reward {:.3g}"), ("advantage", "advantage {:+.3g}"), ("n_tokens", "{:.0f} tokens"))
    parts = [text.format(rows[key][i]) for key, text in told if np.isfinite(float(rows[key][i]))]
    if n_rows(tokens):
        known = {key: tokens[key][np.isfinite(tokens[key].astype(float))] for key in ("entropy", "deviation", "weight")}
        means = [
            f"{label(key)[0].lower()} {known[key].mean():.3f}" for key in ("entropy", "deviation") if len(known[key])
        ]
        parts += [f"mean {' and '.join(means)} nats"] if means else []
        parts += [f"{np.mean(known['weight'] > 0):.0%} selected"] if len(known["weight"]) else []
    return " · ".join(parts)


def _known_bool(value: Any) -> bool | None:
    """A boolean of a frame; None where it is nan."""
    return bool(value) if np.isfinite(float(value)) else None


@cache
def _component(name: str) -> Callable[..., Any]:
    root = "rlvr-rollouts" if name == "rollouts" else "rlvr-found"
    return st.components.v2.component(
        f"rlvr_{name}", html=f'<div class="{root}"></div>', css=(_HERE / "rollouts.css").read_text(),
        js=(_HERE / f"{name}.js").read_text(), isolate_styles=False,
    )  # fmt: skip


def show_rollouts(
    sent: Mapping[str, Any], colour_by: str, theme: Theme, *, lit: Lit | None = None, at: str = ""
) -> None:
    """Draws the rollouts of `sent_rollouts`, coloured by `colour_by`; the token at SAMPLE:POSITION has the focus."""
    weights = None
    if colour_by == "weight" and "weight" in sent["values"]:
        weights = np.frombuffer(base64.b64decode(sent["values"]["weight"]["bdata"]), np.float32)
    name, unit, _ = label(colour_by)
    data = {
        **sent,
        "colour": colour_by,
        "title": f"{name}, {unit}" if unit else name,
        "legend": legend(colour_by, weights),
        "borders": BORDERS[colour_by],
        "colours": level_colours(theme),
        "accent": theme.accent,
        "faint": theme.grid,
        "mark": theme.second,
        "good": theme.good,
        "warning": theme.severity["warning"],
        "lit": None if lit is None else {"key": lit.key, "low": _bound(lit.low), "high": _bound(lit.high)},
        "at": at,
    }
    _component("rollouts")(key="rollouts", data=data)


def _bound(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Place:
    """A token of a step: its rollout and its position there."""

    sample: int
    position: int


def show_found(rows: Sequence[Mapping[str, Any]]) -> Place | None:
    """Draws tokens in their contexts; returns the one that a reader just opened.

    rows: each with sample, position, where, before, text, after, value, the last five as texts.
    """
    result = _component("found")(key="found", data={"rows": list(rows)}, on_open_change=lambda: None)
    done = getattr(result, "open", None)
    return Place(int(done["sample"]), int(done["position"])) if done else None
