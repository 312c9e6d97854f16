"""Figures over what a run had spent: response tokens or hours of training, in the place of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dashboard.figures.theme import compact

STEP = "step"
SPENT = {"tokens": "response tokens", "hours": "hours of training"}  # what curves can stand over beside steps
FORMATS = {"tokens": ".3~s", "hours": ".3~g"}


def spent_axis(what: str) -> dict[str, Any]:
    """The x axis of a figure over `what`, a key of SPENT."""
    return {"title": {"text": SPENT[what]}, "tickformat": FORMATS[what], "hoverformat": FORMATS[what]}


def stand_over(fig: go.Figure, what: str, spent: Callable[[np.ndarray], np.ndarray]) -> go.Figure:
    """Moves all of a figure over steps to what the run had spent after each of them.

    what: a key of SPENT. spent: {steps int64 [n]: what was spent after each, [n]}, which never falls. A mark goes on
    telling its step. The borders of a map, which lie half a step after a step, move to what was spent after that one.
    """

    def moved(x: Any) -> np.ndarray:
        return spent(np.floor(np.asarray(x, np.float64)).astype(np.int64))

    for trace in fig.data:
        told = trace.hovertemplate or ""
        if isinstance(trace, go.Heatmap):
            trace.hovertemplate = told.replace("step %{x:.0f}", f"%{{x:{FORMATS[what]}}} {SPENT[what]}")
        elif "step %{x}" in told:
            trace.text = [f"{step:.0f}" for step in trace.x]
            trace.hovertemplate = told.replace("step %{x}", "step %{text}")
        trace.x = compact(moved(trace.x))
    for shape in fig.layout.shapes:
        if shape.xref != "paper":
            shape.x0, shape.x1 = (float(value) for value in moved([shape.x0, shape.x1]))
    fig.layout.xaxis.update(spent_axis(what))
    drawn = [trace.x for trace in fig.data if len(trace.x)]
    if fig.layout.xaxis.autorangeoptions.clipmax is not None and drawn:
        low, high = min(float(x[0]) for x in drawn), max(float(x[-1]) for x in drawn)
        fig.layout.xaxis.autorangeoptions = {"clipmin": low, "clipmax": high + 0.01 * (high - low)}
    return fig
