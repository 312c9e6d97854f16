"""The quick plot of a query's rows: one column against another, one line for each value of a third."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from dashboard.escape import plotly
from dashboard.figures.theme import Theme, figure
from monitor.queries.frames import Frame

MOST_POINTS = 5000  # in all; more are thinned evenly
MOST_LINES = 12


def numeric_columns(rows: Frame) -> list[str]:
    """Columns that can be an axis."""
    return [name for name, column in rows.items() if column.dtype.kind in "fiub"]


def text_columns(rows: Frame) -> list[str]:
    """Columns of texts, which can split the rows into lines."""
    return [
        name for name, column in rows.items()
        if column.dtype.kind == "O" and all(isinstance(value, str | None) for value in column[:100])
    ]  # fmt: skip


def query_plot(theme: Theme, rows: Frame, x: str, y: str, by: str = "", *, height: int = 340) -> tuple[go.Figure, str]:
    """(y over x as the query ordered its rows, what the picture leaves out; "" for nothing).

    by: a column of texts, one line for each of its first MOST_LINES values; "" for one line.
    """
    fig = figure(theme, f"{y} against {x}", x=plotly(x), height=height)
    fig.layout.yaxis.title = {"text": plotly(y)}
    fig.layout.hovermode = "closest"
    finite = np.isfinite(rows[x].astype(np.float64)) & np.isfinite(rows[y].astype(np.float64))
    every = max(1, -(-int(finite.sum()) // MOST_POINTS))
    kinds = list(dict.fromkeys(str(value) for value in rows[by][finite])) if by else [""]
    for number, kind in enumerate(kinds[:MOST_LINES]):
        mine = np.flatnonzero(finite & (rows[by].astype(str) == kind) if by else finite)[::every]
        fig.add_trace(
            go.Scatter(
                x=rows[x][mine].astype(np.float64), y=rows[y][mine].astype(np.float64), name=plotly(kind or y),
                mode="lines+markers" if len(mine) < 60 else "lines",
                line={"color": theme.wheel[number % len(theme.wheel)] if by else theme.accent, "width": 1.6,
                      "dash": "solid" if number < len(theme.wheel) else "dot"},
                hovertemplate="%{x:.6~g}, %{y:.4~g}",
            )
        )  # fmt: skip
    fig.layout.showlegend = bool(by)
    left = []
    if every > 1:
        left.append(f"one row in {every} is drawn")
    if len(kinds) > MOST_LINES:
        left.append(f"{len(kinds) - MOST_LINES} of {len(kinds)} lines are left out")
    if not finite.all():
        left.append(f"rows without a number are left out ({int((~finite).sum())})")
    return fig, ", ".join(left)
