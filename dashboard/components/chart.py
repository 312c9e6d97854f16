"""The live chart: a Streamlit component around Plotly.react, because st.plotly_chart loses the zoom on every update."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import streamlit as st
from plotly.io.json import to_json_plotly

from dashboard.figures.theme import THEMES, template

_HERE = Path(__file__).parent
_LOADER = """// Loads the script of the charts once.
await (window.rlvrChartCode ??= new Promise((resolve, reject) => {
  const script = document.createElement("script");
  script.src = "/app/static/chart.js?v=__VERSION__";
  script.onload = resolve;
  script.onerror = () => reject(new Error(`${script.src} is not served: start the dashboard with "rlvr dashboard".`));
  document.head.appendChild(script);
}));
export default window.rlvrChart;
"""
BLOCK = 48  # points by which the older part of a curve grows
_HTML = (
    '<div class="rlvr-chart"><div class="rlvr-head"><span class="rlvr-title"></span><span class="rlvr-unit"></span>'
    '<span class="rlvr-help" role="note" hidden>?</span><button class="rlvr-newer" type="button" hidden></button></div>'
    '<div class="rlvr-plot" role="figure"></div></div>'
)


@cache
def chart_code() -> str:
    """The script of all charts, which dashboard.serve serves: Streamlit would send it again with each update."""
    styles = {name: template(theme).to_plotly_json() for name, theme in THEMES.items()}
    code = (_HERE / "chart.js").read_text().replace("__CSS__", json.dumps((_HERE / "chart.css").read_text()))
    return f"(() => {{\nconst TEMPLATES = {to_json_plotly(styles)};\n{code}\n}})();\n"


@cache
def _component() -> Callable:
    version = hashlib.sha1(chart_code().encode(), usedforsecurity=False).hexdigest()[:12]  # no browser keeps an old one
    return st.components.v2.component(
        "rlvr_chart", html=_HTML, js=_LOADER.replace("__VERSION__", version), isolate_styles=False
    )


@cache
def _old_points() -> Callable:
    return st.components.v2.component("rlvr_old_points", js=(_HERE / "old_points.js").read_text())


@cache
def _new_points() -> Callable:
    return st.components.v2.component("rlvr_new_points", js=(_HERE / "new_points.js").read_text())


@dataclass(frozen=True, slots=True)
class Packed:
    """A figure as it is sent: its JSON without what the page shows around it.

    old: of each trace the points that stay as they are while the run grows, as JSON, "" for none. They are sent apart
    (`send_old_points`), because Streamlit does not send again what the browser has. old_id: their hash. cells: the
    metric over whose cells the figure goes, "" for none: a click on a cell leads to its tokens. live: the names under
    which newer points of its curves come (`send_new_points`).
    """

    figure: str
    title: str
    unit: str
    help: str
    theme: str
    height: int
    cells: str
    old: str = ""
    old_id: str = ""
    live: tuple[str, ...] = ()


def packed(fig: go.Figure, *, split: bool = False) -> Packed:
    """A figure ready to be sent; with `split`, the older points of long curves apart from it."""
    title, meta = fig.layout.title, fig.layout.meta or {}
    spec = fig.to_plotly_json()  # whose arrays are as Plotly reads them: their type and their bytes in base64
    spec["layout"].pop("template", None)  # the browser has ours
    old = [_take_old(trace, spec["data"][i]) if split else {} for i, trace in enumerate(fig.data)]
    text = json.dumps(old) if any(old) else ""
    name = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() if text else ""
    live = tuple(trace.meta["live"] for trace in fig.data if trace.meta and "live" in trace.meta)
    return Packed(
        to_json_plotly(spec), title.text or "", title.subtitle.text or "", meta.get("help", ""),
        meta.get("theme", "light"), int(fig.layout.height), meta.get("cells", ""), text, name, live,
    )  # fmt: skip


def _take_old(trace: Any, sent: dict[str, Any]) -> dict[str, Any]:
    """Takes the older points out of a trace as it is sent, a whole number of blocks of them; {} where it has few."""
    if not isinstance(trace, go.Scatter) or trace.customdata is not None or "bdata" not in (sent.get("x") or ()):
        return {}
    cut = (len(trace.x) - 1) // BLOCK * BLOCK
    if cut <= 0:
        return {}
    old = {axis: sent_numbers(trace[axis][:cut]) for axis in ("x", "y")}
    sent |= {axis: sent_numbers(trace[axis][cut:]) for axis in ("x", "y")}
    return old


def sent_numbers(values: np.ndarray) -> dict[str, str]:
    """An array as the browser gets it: its type, and its bytes in base64."""
    return {"dtype": values.dtype.str[1:], "bdata": base64.b64encode(values.tobytes()).decode()}


def send_old_points(charts: Mapping[str, Packed], *, key: str) -> None:
    """Sends the older points of charts {their key: chart}, for which the charts wait in the browser."""
    old = {name: {"id": chart.old_id, "traces": chart.old} for name, chart in charts.items() if chart.old}
    if old:
        _old_points()(key=key, data=old)


def send_new_points(points: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Sends the newest points {name: (x, y)} of curves; each chart on the screen grows by those that it lacks.

    So a step costs the browser and the server its own points, and the figures are made anew only now and then.
    """
    with st.container(key="unseen-points"):
        _new_points()(key="new-points", data={"points": new_points_text(points)})


def new_points_text(points: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """{"x": [numbers], "curves": {name: [place of its x, its y]}}: most curves have the same x, which is sent once."""
    places = dict[str, int]()
    curves = {
        name: [places.setdefault(json.dumps(sent_numbers(x)), len(places)), sent_numbers(y)]
        for name, (x, y) in points.items()
    }
    return json.dumps({"x": [json.loads(x) for x in places], "curves": curves})


@dataclass(frozen=True, slots=True)
class Pick:
    """What a reader did on a chart.

    what: "tokens" or "pin", chosen in the menu of a clicked step, which is the value; "cell", chosen in the menu of a
    clicked cell of a histogram, whose value is STEP:METRIC:CELL; "zoom", whose value is the range
    of x as FROM-TO, FROM- up to the newest, or "" for all of it; or "visible": the sections on the screen, by "|".
    """

    what: str
    value: str


def live_chart(
    fig: Packed,
    *,
    key: str,
    group: str = "",
    menu: bool = False,
    zoom: str = "",
    section: str = "",
    shown: str = "",
    on_pick: Callable[[Pick], None] = lambda pick: None,
) -> Pick | None:
    """Draws a figure and returns what a reader just did on it; with `menu`, a click opens a menu of its step.

    Charts of equal `group` zoom together along x; `zoom` is the range that a page begins with, as in `Pick`. A chart
    with the same `key` keeps its node, zoom and selection over all updates. The figure is sent as text, which the
    browser parses only once the chart is on the screen. A chart of a `section` tells which sections are on the screen
    when these are others than `shown`. on_pick hears of it before the page is made.
    """
    data = asdict(fig) | {"key": key, "group": group, "menu": menu, "zoom": zoom, "section": section, "shown": shown}
    del data["old"], data["live"]

    def tell() -> None:  # also after the reader has left the page, whose state is then gone
        if pick := _pick(st.session_state.get(key)):
            on_pick(pick)

    return _pick(_component()(key=key, data=data, on_pick_change=tell))


def _pick(result: Any) -> Pick | None:
    done = getattr(result, "pick", None)
    return Pick(str(done["what"]), str(done["value"])) if done else None
