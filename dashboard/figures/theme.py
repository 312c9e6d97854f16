"""Colours, template and labels that every figure shares, in a light and a dark version.

Colours are those of the Okabe-Ito set, which colour-blind readers can tell apart, and two more for a seventh and eighth
weighting. Uniform weighting is always neutral grey and a weighted run has the accent colour, in every chart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import plotly.graph_objects as go

from monitor.metrics import metric

FONT = '"Source Sans", "Source Sans 3", "Source Sans Pro", system-ui, sans-serif'


@dataclass(frozen=True, slots=True, eq=False)
class Theme:
    """One colour scheme. `wheel`: colours for several weightings at once. `sequential`: from the background on."""

    name: str
    paper: str
    text: str
    muted: str
    grid: str
    uniform: str
    accent: str
    second: str
    good: str
    severity: dict[str, str]
    wheel: tuple[str, ...]
    sequential: tuple[str, ...]
    diverging: tuple[str, ...]


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    text="#262b33",
    muted="#6a7280",
    grid="#eceef1",
    uniform="#8a919c",
    accent="#0072b2",
    second="#c2571a",
    good="#2e7d4f",
    severity={"info": "#56789a", "warning": "#c98a00", "critical": "#c2410c"},
    wheel=("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#d55e00", "#56b4e9", "#7a4fbf", "#7d6608"),
    sequential=("#ffffff", "#dbe9f5", "#a6cbe5", "#5ba3d0", "#1f6cae", "#08306b"),
    diverging=("#8f4a06", "#d98a3d", "#f3cfa5", "#f7f7f7", "#a9cfe8", "#3d8fc6", "#0a4a80"),
)
DARK = Theme(
    name="dark",
    paper="#0e1117",
    text="#e6e9ee",
    muted="#9aa3b0",
    grid="#262b35",
    uniform="#98a0ac",
    accent="#56b4e9",
    second="#f0955c",
    good="#57b884",
    severity={"info": "#8fb0d0", "warning": "#f0b429", "critical": "#ff7a45"},
    wheel=("#56b4e9", "#2fc79a", "#e3a0c6", "#f0b429", "#ff7a45", "#8fb0ff", "#b79cf5", "#c7b84a"),
    sequential=("#0e1117", "#12304d", "#1a5486", "#2f86c4", "#7dbde8", "#e4f2fc"),
    diverging=("#ffb066", "#c9742a", "#6b3f1a", "#1b1f27", "#1b4a6e", "#2f86c4", "#9ad1f5"),
)
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}


@cache
def template(theme: Theme) -> go.layout.Template:
    """The Plotly template of a theme: transparent paper, quiet grid, one font.

    Figures do not hold it, because it would be copied into each of them and sent with each: the browser has it.
    """
    axis = {
        "gridcolor": theme.grid,
        "linecolor": theme.grid,
        "zeroline": False,
        "automargin": True,
        "title": {"font": {"size": 12, "color": theme.muted}, "standoff": 6},
        "tickfont": {"size": 11, "color": theme.muted},
        "exponentformat": "power",
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 12, "color": theme.text},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": list(theme.wheel),
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {
                "bgcolor": theme.paper,
                "bordercolor": theme.grid,
                "font": {"color": theme.text, "size": 12, "family": FONT},
                "align": "left",
                "namelength": -1,
            },
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1.02,
                "yanchor": "bottom",
                "bgcolor": "rgba(0,0,0,0)",
                "font": {"size": 12, "color": theme.text},
            },
            "meta": {"paper": theme.paper},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": theme.muted, "activecolor": theme.accent},
        }
    )


def figure(
    theme: Theme, title: str, *, unit: str = "", x: str = "step", height: int = 280, help: str = "", cells: str = ""
) -> go.Figure:
    """An empty figure in our style: a title above with unit and help text, and one hover label for all lines.

    cells: the metric over whose histogram cells it goes; each trace over cells of one step has the step as its `meta`.
    """
    return go.Figure(  # one construction: every later update_layout costs some 5 ms
        layout={
            "title": {"text": title, "subtitle": {"text": unit}, "x": 0, "xanchor": "left", "font": {"size": 14}},
            "meta": {"help": help, "theme": theme.name, "cells": cells},
            "height": height,
            "margin": {"l": 8, "r": 12, "t": 34, "b": 8},
            "hovermode": "x unified",
            "uirevision": "keep",
            "xaxis": {"title": {"text": x}},
            "hoverdistance": 40,
        }
    )


def clip_steps(fig: go.Figure, *steps: np.ndarray) -> None:
    """Ends the x axis at the data, so that charts below each other line up, whatever padding their marks need."""
    drawn = [x for x in steps if len(x)]
    if drawn:
        low, high = min(float(x[0]) for x in drawn), max(float(x[-1]) for x in drawn)
        fig.layout.xaxis.autorangeoptions = {"clipmin": low - 0.5, "clipmax": high + 0.5 + 0.01 * (high - low)}


def label(key: str) -> tuple[str, str, str]:
    """(label, unit, help) of a recorded key; an unknown key is its own label."""
    try:
        found = metric(key)
    except ValueError:
        return key, "", ""
    return found.label, found.unit, found.help


def number_format(unit: str) -> str:
    """The d3 format for values of a unit."""
    return ".1%" if unit == "share" else ".4~g"


def scale(colours: Sequence[str]) -> list[list[float | str]]:
    """Evenly spaced Plotly colour scale."""
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def faded(colour: str, alpha: float) -> str:
    """'#rrggbb' as rgba with the given opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def arm_colours(weightings: Sequence[str], theme: Theme) -> dict[str, str]:
    """{weighting: colour}: uniform is grey, the first other one the accent, the rest from the wheel, random last."""
    others = sorted((kind for kind in dict.fromkeys(weightings) if kind != "uniform"), key="random".__eq__)
    wheel = {kind: theme.wheel[i % len(theme.wheel)] for i, kind in enumerate(others)}
    return wheel | {"uniform": theme.uniform}


def compact(values: np.ndarray) -> np.ndarray:
    """Values as a figure sends them: whole numbers as int32, others as float32. A chart has 3 digits, these have 7."""
    if values.dtype.kind in "iu":
        return values.astype(np.int32) if not len(values) or np.abs(values).max() < 2**31 else values
    return values.astype(np.float32) if values.dtype.kind == "f" else values
