"""Differences to the baseline with their intervals: one row for each arm, one chart for each figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from dashboard.escape import plotly
from dashboard.figures.theme import Theme, figure, number_format
from monitor.stats.comparison import figure_label


def difference_intervals(
    theme: Theme,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    colours: Mapping[str, str],
) -> go.Figure:
    """Mean difference to the baseline (dot) with its bootstrap 95 % interval (bar), one line for each arm, 0 marked.

    rows: rows of monitor.stats.comparison with a difference, of one figure and one moment, in the order to show.
    """
    label, unit = figure_label(name)
    fig = figure(theme, label, unit=unit, x="", height=48 + 30 * len(rows), help=label)
    for row in rows:
        arm = plotly(row["arm"])
        mean, low, high = row["difference"], row["low"], row["high"]
        bar = {"type": "data", "symmetric": False, "array": [0 if high is None else high - mean],
               "arrayminus": [0 if low is None else mean - low], "thickness": 2, "width": 5}  # fmt: skip
        p = "" if row["p"] is None else f"<br>p {row['p']:.2g}, of {row['pairs']} pairs"
        fig.add_trace(
            go.Scatter(
                x=[mean], y=[arm], error_x=bar, mode="markers", name=arm, showlegend=False,
                marker={"size": 10, "color": colours[row["arm"]]},
                hovertemplate=f"%{{x:{number_format(unit)}}}{p}<extra>%{{y}}</extra>",
            )
        )  # fmt: skip
    fig.add_vline(x=0, line={"color": theme.muted, "width": 1, "dash": "dot"})
    fig.layout.hovermode = "closest"
    fig.layout.xaxis.tickformat = ".3~%" if unit == "share" else ".3~g"
    fig.layout.yaxis = {"autorange": "reversed", "type": "category"}
    return fig
