"""The live chart: a Streamlit component around Plotly.react, because st.plotly_chart loses the zoom on every update."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import plotly.graph_objects as go
import streamlit as st

_HERE = Path(__file__).parent
_HTML = (
    '<div class="rlvr-chart"><div class="rlvr-head"><span class="rlvr-title"></span><span class="rlvr-unit"></span>'
    '<span class="rlvr-help" role="note" hidden>?</span></div><div class="rlvr-plot" role="img"></div></div>'
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


def live_chart(fig: go.Figure, *, key: str, group: str = "", pick: bool = False) -> int | None:
    """Draws a figure; returns the step that was just clicked, if `pick`.

    Charts of equal `group` zoom together along x. A chart with the same `key` keeps its node, zoom and selection over
    all updates. The figure is sent as text, which the browser parses only once the chart is on the screen.
    """
    title = fig.layout.title
    data = {
        "figure": fig.to_json(),
        "title": title.text or "",
        "unit": title.subtitle.text or "",
        "help": (fig.layout.meta or {}).get("help", ""),
        "height": fig.layout.height,
        "group": group,
        "pick": pick,
    }
    callbacks = {"on_pick_change": lambda: None} if pick else {}
    result = _component()(key=key, data=data, **callbacks)
    clicked = getattr(result, "pick", None) if pick else None
    return int(clicked) if clicked is not None else None
