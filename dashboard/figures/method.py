"""Figures of the method: the elbow of the deviations, predicted against true change, entropy along the response."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from dashboard.figures.distributions import cell_borders
from dashboard.figures.theme import Theme, faded, figure
from monitor.queries.frames import Frame


def elbow_curve(counts: np.ndarray, edges_id: str = "deviation96") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(share of tokens, deviation, share of all deviation) of the tokens from the most deviating on, by cells.

    A cell's tokens count with the geometric mean of its borders, those of the lowest cell with 0. Empty cells are left
    out; the curves begin at no token. counts: int [cells] of the deviation, of at least one token.
    """
    borders = cell_borders(edges_id)
    middle = np.sqrt(borders[:-1] * borders[1:])
    middle[0] = 0.0
    order = np.flatnonzero(counts)[::-1]
    share = np.cumsum([0, *counts[order]]) / counts.sum()
    held = np.cumsum([0, *(counts[order] * middle[order])])
    return share, middle[[order[0], *order]], held / held[-1] if held[-1] > 0 else held


def elbow(theme: Theme, counts: np.ndarray, kept: float, colour: str, *, height: int = 300) -> go.Figure:
    """The sorted deviations, the share of all deviation that they hold, and the share of tokens that is kept."""
    share, deviation, held = elbow_curve(counts)
    fig = figure(
        theme, "Sorted deviations", unit="nats", x="share of tokens, the most deviating first", height=height,
        help="Deviation of the tokens from the most deviating on, of the newest steps, and how much of all deviation "
        "the tokens up to there hold.",
    )  # fmt: skip
    fig.add_trace(
        go.Scatter(x=share, y=deviation, name="deviation", mode="lines", hovertemplate="%{y:.3~g} nats",
                   line={"color": colour, "width": 2, "shape": "vh"})
    )  # fmt: skip
    fig.add_trace(
        go.Scatter(x=share, y=held, name="share of all deviation", mode="lines", yaxis="y2", hovertemplate="%{y:.1%}",
                   line={"color": theme.second, "width": 1.8, "dash": "dot"})
    )  # fmt: skip
    if np.isfinite(kept) and 0 < kept < 1:
        holds = float(np.interp(kept, share, held))
        fig.add_vline(x=kept, line={"color": theme.muted, "width": 1.5, "dash": "dash"})
        fig.add_annotation(
            x=kept, y=1, yref="paper", xanchor="left", yanchor="top", showarrow=False, font={"size": 11},
            text=f" kept {kept:.0%} of the tokens, {holds:.0%} of the deviation",
        )  # fmt: skip
    fig.layout.xaxis.update(tickformat=".0%", range=[0, 1])
    fig.layout.yaxis = {"title": {"text": "nats"}, "range": [0, 1.05 * float(deviation.max(initial=1e-3))]}
    fig.layout.yaxis2 = {"overlaying": "y", "side": "right", "tickformat": ".0%", "showgrid": False, "range": [0, 1.05],
                         "tick0": 0, "dtick": 0.2}  # fmt: skip
    return fig


def predicted_against_true(
    theme: Theme, steps: np.ndarray, predicted: np.ndarray, true: np.ndarray, colour: str, *, height: int = 300
) -> go.Figure:
    """The probe's predicted change of H2 (x) against the true one (y), a point for each step; the line is equality."""
    r = pearson(predicted, true)
    error = float(np.mean(np.abs(predicted - true))) if len(steps) else float("nan")
    fig = figure(
        theme, "Change of H2: predicted and true", unit=f"r {r:.2f}, mean error {error:.2g} nats", x="predicted, nats",
        height=height, help="Each point is a probed step. On the line the first order predicts the change exactly.",
    )  # fmt: skip
    fig.add_trace(
        go.Scatter(x=predicted, y=true, mode="markers", name="probed steps", customdata=steps,
                   marker={"size": 6, "color": faded(colour, 0.65)},
                   hovertemplate="step %{customdata}: predicted %{x:.3~g}, true %{y:.3~g}<extra></extra>")
    )  # fmt: skip
    ends = [float(min(predicted.min(), true.min())), float(max(predicted.max(), true.max()))]
    line = {"color": theme.muted, "width": 1.2, "dash": "dash"}
    fig.add_trace(go.Scatter(x=ends, y=ends, mode="lines", name="equal", line=line, hoverinfo="skip"))
    fig.layout.hovermode = "closest"
    fig.layout.yaxis.title = {"text": "true, nats"}
    return fig


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r; nan of fewer than three points or where one side never moves."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def along_response(theme: Theme, profile: Frame, step: int, colour: str, *, height: int = 300) -> go.Figure:
    """Mean entropy in each tenth of the responses of one step, apart for correct and incorrect ones.

    profile: of `monitor.queries.rollouts.profile_of_step`.
    """
    fig = figure(
        theme, f"Entropy along the response, step {step}", unit="nats", x="tenth of the response", height=height,
        help="Mean entropy of the tokens in each tenth of their response, from its beginning to its end.",
    )  # fmt: skip
    for correct, name, line in ((True, "correct", colour), (False, "incorrect", theme.second)):
        mine = profile["correct"].astype(bool) == correct
        if mine.any():
            fig.add_trace(
                go.Scatter(
                    x=profile["tenth"][mine] + 1, y=profile["entropy"][mine], customdata=profile["n"][mine], name=name,
                    mode="lines+markers", line={"color": line, "width": 1.8}, marker={"size": 6},
                    hovertemplate="%{y:.3~g}, %{customdata} tokens",
                )
            )  # fmt: skip
    fig.layout.xaxis.update(tick0=1, dtick=1, range=[0.7, 10.3])
    fig.layout.yaxis = {"title": {"text": "nats"}, "rangemode": "tozero"}
    fig.layout.showlegend = True
    return fig
