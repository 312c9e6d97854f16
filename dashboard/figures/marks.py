"""Alerts on a chart: a line at the first breach, a shaded span while the alert fires, a mark where it resolved."""

from __future__ import annotations

import textwrap

import numpy as np
import plotly.graph_objects as go

from dashboard.escape import plotly
from dashboard.figures.theme import Theme, faded
from monitor.queries.frames import Frame, n_rows


def add_alerts(fig: go.Figure, spans: Frame, last_step: float, theme: Theme, *, shade: bool = True) -> go.Figure:
    """Draws `monitor.queries.alerts.alert_spans` of one run onto `fig`. Hovering shows rule, value and baseline.

    Without `shade` the span is a bar along the top. Heatmaps need that, so that no cell changes its colour.
    """
    if not n_rows(spans):
        return fig
    fig.layout.yaxis2 = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True, "type": "linear"}
    shapes = []
    for i in range(n_rows(spans)):
        colour = theme.severity.get(str(spans["severity"][i]), theme.muted)
        first, end = float(spans["first_step"][i]), float(spans["end_step"][i])
        until = max(last_step, first) if np.isnan(end) else end
        bottom, top, alpha = (0.0, 1.0, 0.10) if shade else (1.0, 1.03, 0.7)
        shapes += [
            {"type": "rect", "x0": first, "x1": until, "y0": bottom, "y1": top, "yref": "paper", "layer": "below",
             "line": {"width": 0}, "fillcolor": faded(colour, alpha)},
            {"type": "line", "x0": first, "x1": first, "y0": 0.0, "y1": 1.0, "yref": "paper",
             "line": {"color": colour, "width": 1.5}},
        ]  # fmt: skip
    fig.layout.shapes = shapes
    _add_marks(fig, spans, theme)
    return fig


def _add_marks(fig: go.Figure, spans: Frame, theme: Theme) -> None:
    colours = np.array([theme.severity.get(str(s), theme.muted) for s in spans["severity"]], object)
    texts = np.array([alert_text(spans, i) for i in range(n_rows(spans))], object)
    resolved = ~np.isnan(spans["end_step"])
    marks = (
        (spans["first_step"].astype(float), texts, colours, "triangle-down", "fires"),
        (spans["end_step"][resolved], texts[resolved], colours[resolved], "circle-open", "resolved"),
    )
    for x, hover, colour, symbol, what in marks:
        if len(x):
            fig.add_trace(
                go.Scatter(
                    x=x, y=np.full(len(x), 0.97), yaxis="y2", mode="markers", name=f"alert {what}", showlegend=False,
                    marker={"symbol": symbol, "size": 10, "color": list(colour),
                            "line": {"width": 2, "color": list(colour)}},
                    customdata=hover, hovertemplate=f"<b>{what}</b> %{{customdata}}<extra></extra>",
                )
            )  # fmt: skip


def alert_text(spans: Frame, i: int) -> str:
    """Hover text of one alert, wrapped and escaped."""
    value, baseline = float(spans["value"][i]), float(spans["baseline"][i])
    lines = [f"{plotly(spans['rule'][i])} ({plotly(spans['severity'][i])})"]
    if not np.isnan(value):
        lines.append(f"value {value:.4g}" + ("" if np.isnan(baseline) else f", baseline {baseline:.4g}"))
    for text in (str(spans["message"][i]), str(spans["action"][i])):
        lines += [plotly(line) for line in textwrap.wrap(text, 64)]
    return "<br>".join(lines)
