"""The live chart: a Streamlit component around Plotly.react, because st.plotly_chart loses the zoom on every update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import plotly.graph_objects as go
import streamlit as st

_HERE = Path(__file__).parent
_HTML = (
    '<div class="rlvr-chart"><div class="rlvr-head"><span class="rlvr-title"></span><span class="rlvr-unit"></span>'
    '<span class="rlvr-help" role="note" hidden>?</span><button class="rlvr-newer" type="button" hidden></button></div>'
    '<div class="rlvr-plot" role="figure"></div></div>'
)


@cache
def _component() -> Callable:
    return st.components.v2.component(
        "rlvr_chart",
        html=_HTML,
        css=(_HERE / "chart.css").read_text(),
        js=(_HERE / "chart.js").read_text(),
        isolate_styles=False,
    )


@dataclass(frozen=True, slots=True)
class Pick:
    """What a reader did on a chart.

    what: "tokens" or "pin", chosen in the menu of a clicked step, which is the value; or "zoom", whose value is the
    range of x as FROM-TO, FROM- up to the newest, or "" for all of it.
    """

    what: str
    value: str


def live_chart(fig: go.Figure, *, key: str, group: str = "", menu: bool = False, zoom: str = "") -> Pick | None:
    """Draws a figure and returns what a reader just did on it; with `menu`, a click opens a menu of its step.

    Charts of equal `group` zoom together along x; `zoom` is the range that a page begins with, as in `Pick`. A chart
    with the same `key` keeps its node, zoom and selection over all updates. The figure is sent as text, which the
    browser parses only once the chart is on the screen.
    """
    title = fig.layout.title
    data = {
        "figure": fig.to_json(),
        "title": title.text or "",
        "unit": title.subtitle.text or "",
        "help": (fig.layout.meta or {}).get("help", ""),
        "height": fig.layout.height,
        "group": group,
        "menu": menu,
        "zoom": zoom,
    }
    result = _component()(key=key, data=data, on_pick_change=lambda: None)
    done = getattr(result, "pick", None)
    return Pick(str(done["what"]), str(done["value"])) if done else None
