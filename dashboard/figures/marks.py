"""Marks on a chart. Alerts: a line and a mark where one fires or gets worse, shade while it does, a ring at its end.

Actions: a dotted line and a diamond where the trainer acted on an alert or took a change back.
Milestones: small signs at the foot of the chart, for what is neither good nor bad.
"""

from __future__ import annotations

import textwrap
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go

from dashboard.escape import plotly
from dashboard.figures.theme import Theme, faded
from monitor.alerts.outlook import Outlook
from monitor.queries.frames import Frame, n_rows
from monitor.records import SEVERITY_RANK

MARKS_AXIS = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True, "type": "linear"}
MILESTONES = {  # what -> its sign in Plotly, the same as a character, and its height in the chart
    "evaluation": ("line-ns-open", "|", 0.025),
    "checkpoint": ("square-open", "□", 0.03),
    "resume": ("triangle-right", "▶", 0.09),
}
MOST_MILESTONES = 60  # of one kind that a chart has room for: more of them would be a rope
UPRIGHT = {"y0": 0.0, "y1": 1.0, "yref": "paper"}  # from the bottom to the top of the chart


def add_alerts(fig: go.Figure, alerts: Frame, last_step: float, theme: Theme) -> go.Figure:
    """Draws `monitor.queries.alerts.alert_transitions` of one run onto `fig`.

    Each transition has its own colour, and its mark tells its own numbers: where an alert turns critical, the shade
    changes its colour.
    """
    if not n_rows(alerts):
        return fig
    fig.layout.yaxis2 = MARKS_AXIS
    firing = np.flatnonzero(alerts["state"] == "firing")
    shapes = [
        {"type": "rect", "x0": first, "x1": last, "layer": "below", "line": {"width": 0},
         "fillcolor": faded(_colour(severity, theme), 0.12)} | UPRIGHT
        for first, last, severity in _shades(alerts, firing, last_step)
    ]  # fmt: skip
    shapes += [
        {"type": "line", "x0": float(alerts["step"][i]), "x1": float(alerts["step"][i]),
         "line": {"color": _colour(alerts["severity"][i], theme), "width": 1.5}} | UPRIGHT
        for i in firing
    ]  # fmt: skip
    fig.layout.shapes = shapes
    _add_marks(fig, alerts, theme)
    return fig


def add_actions(fig: go.Figure, actions: Frame, theme: Theme) -> go.Figure:
    """Draws `monitor.queries.alerts.actions` of one run onto `fig`."""
    if not n_rows(actions):
        return fig
    fig.layout.yaxis2 = MARKS_AXIS
    steps = actions["step"].astype(float)
    line = {"color": theme.muted, "width": 1.5, "dash": "dot"}
    fig.layout.shapes = [
        *(fig.layout.shapes or ()),
        *({"type": "line", "x0": step, "x1": step, "line": line} | UPRIGHT for step in dict.fromkeys(steps)),
    ]
    texts = ["<br>".join(plotly(line) for line in textwrap.wrap(str(text), 64)) for text in actions["message"]]
    together = [float(np.sum(steps[:i] == step)) for i, step in enumerate(steps)]  # of one step: below each other
    fig.add_trace(
        go.Scatter(
            x=steps, y=0.88 - 0.09 * np.array(together), yaxis="y2", mode="markers", name="action", showlegend=False,
            marker={"symbol": "diamond", "size": 10, "color": theme.text},
            customdata=texts, hovertemplate="<b>action after step %{x}</b><br>%{customdata}<extra></extra>",
        )
    )  # fmt: skip
    return fig


def milestones_shown(milestones: Frame) -> list[str]:
    """The kinds of milestones that a chart has room for."""
    counts = {what: int(np.sum(milestones["what"] == what)) for what in MILESTONES}
    return [what for what, n in counts.items() if 0 < n <= MOST_MILESTONES]


def add_milestones(fig: go.Figure, milestones: Frame, theme: Theme) -> go.Figure:
    """Draws milestones (step, what, message) onto `fig`, those of the kinds that it has room for."""
    for what in milestones_shown(milestones):
        colour, (symbol, _, height) = theme.muted, MILESTONES[what]
        these = milestones["what"] == what
        steps = milestones["step"][these].astype(float)
        texts = ["<br>".join(map(plotly, textwrap.wrap(str(text), 64))) for text in milestones["message"][these]]
        fig.layout.yaxis2 = MARKS_AXIS
        fig.add_trace(
            go.Scatter(
                x=steps, y=np.full(len(steps), height), yaxis="y2", mode="markers", name=what, showlegend=False,
                marker={"symbol": symbol, "size": 8, "color": colour, "line": {"width": 1.5, "color": colour}},
                customdata=texts, hovertemplate=f"<b>{what} at step %{{x}}</b><br>%{{customdata}}<extra></extra>",
            )
        )  # fmt: skip
    return fig


def add_outlook(fig: go.Figure, theme: Theme, ahead: Outlook, last_step: float, planned: float) -> go.Figure:
    """Draws the baseline and the floor of a series, and the cone of its way there, up to the `planned` last step.

    The cone is the line through the logarithms of the last rows with the 95 % interval of its slope. planned <= the
    last step: no cone, because nothing more comes.
    """
    fig.layout.shapes = [
        *(fig.layout.shapes or ()),
        *(
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "layer": "below",
             "line": {"color": theme.muted, "width": 1, "dash": dash}}
            for y, dash in ((ahead.baseline, "dash"), (ahead.floor, "dot"))
        ),
    ]  # fmt: skip
    told = (f"baseline {ahead.baseline:.3g}", f"floor {ahead.floor:.2g}")
    fig.layout.annotations = [
        *(fig.layout.annotations or ()),
        *(
            {"xref": "paper", "x": 1, "y": np.log10(y) if fig.layout.yaxis.type == "log" else y, "text": text,
             "showarrow": False, "xanchor": "right", "yanchor": "bottom", "font": {"size": 10, "color": theme.muted}}
            for y, text in zip((ahead.baseline, ahead.floor), told, strict=True)
        ),
    ]  # fmt: skip
    end = min(planned, last_step + min(ahead.steps_left, max(20.0, 0.25 * last_step)))
    if ahead.direction == "falling" and end > last_step:
        x = np.linspace(last_step, end, 12)
        low, middle, high = (
            ahead.level * np.exp((ahead.slope + z * ahead.error) * (x - last_step)) for z in (-1.96, 0.0, 1.96)
        )
        shared = {"x": x, "mode": "lines", "showlegend": False, "hoverinfo": "skip"}
        fig.add_traces(
            [
                go.Scatter(y=low, line={"width": 0}, **shared),
                go.Scatter(y=high, line={"width": 0}, fill="tonexty", fillcolor=faded(theme.muted, 0.2), **shared),
                go.Scatter(y=middle, line={"width": 1.5, "dash": "dot", "color": theme.muted}, **shared),
            ]
        )
        fig.layout.xaxis.autorangeoptions.clipmax = float(end) + 0.5
    return fig


def _shades(alerts: Frame, firing: np.ndarray, last_step: float) -> list[tuple[float, float, str]]:
    """(from, to, severity) wherever something fires: of alerts that fire together the worst, so that none adds up."""
    ends = np.where(np.isnan(alerts["until"]), last_step, alerts["until"])
    spans = [(float(alerts["step"][i]), float(ends[i]), str(alerts["severity"][i])) for i in firing]
    found = []
    for first, last in pairwise(sorted({edge for span in spans for edge in span[:2]})):
        there = [severity for begin, end, severity in spans if begin <= first and last <= end]
        if there:
            found.append((first, last, max(there, key=lambda severity: SEVERITY_RANK.get(severity, 0))))
    return found


def _colour(severity: str, theme: Theme) -> str:
    return theme.severity.get(str(severity), theme.muted)


def _add_marks(fig: go.Figure, alerts: Frame, theme: Theme) -> None:
    colours = np.array([_colour(severity, theme) for severity in alerts["severity"]], object)
    texts = np.array([alert_text(alerts, i) for i in range(n_rows(alerts))], object)
    firing, first = alerts["state"] == "firing", alerts["step"] == alerts["first_step"]
    marks = (
        (firing & first, "triangle-down", "fires"),
        (firing & ~first, "triangle-down", "gets worse"),
        (alerts["state"] == "resolved", "circle-open", "resolved"),
    )
    for which, symbol, what in marks:
        if which.any():
            x, colour = alerts["step"][which].astype(float), list(colours[which])
            fig.add_trace(
                go.Scatter(
                    x=x, y=np.full(len(x), 0.97), yaxis="y2", mode="markers", name=f"alert {what}", showlegend=False,
                    marker={"symbol": symbol, "size": 10, "color": colour, "line": {"width": 2, "color": colour}},
                    customdata=texts[which],
                    hovertemplate=f"<b>{what} at step %{{x}}</b> %{{customdata}}<extra></extra>",
                )
            )  # fmt: skip


def alert_text(alerts: Frame, i: int) -> str:
    """Hover text of one transition, wrapped and escaped. What to do stands in the list of alerts: there is no room."""
    lines = [f"{plotly(alerts['rule'][i])} ({plotly(alerts['severity'][i])})", alert_numbers(alerts, i)]
    lines += [plotly(line) for line in textwrap.wrap(str(alerts["message"][i]), 64)]
    return "<br>".join(line for line in lines if line)


def alert_numbers(alerts: Frame, i: int) -> str:
    """'value 0.2, threshold 0.3': what one transition measured. Its message says of what, and in which unit."""
    told = {name: float(alerts[name][i]) for name in ("value", "baseline", "threshold")}
    return ", ".join(f"{name} {number:.4g}" for name, number in told.items() if np.isfinite(number))
