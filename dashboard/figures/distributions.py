"""Figures of distributions over steps: quantile fan, heatmap, difference, selected against all, joint counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from dashboard.figures.marks import add_alerts
from dashboard.figures.theme import Theme, clip_steps, compact, faded, figure, label, scale
from monitor.metrics import inner_edges
from monitor.queries.frames import Frame

FAN = ("p5", "p95", "p25", "p75", "p99", "p50", "mean")  # the curves of a fan, as they are drawn
SHADES = 255  # steps of the colour of a map, so that a cell takes one byte


def entropy_fan(
    theme: Theme,
    fan: Frame,
    colour: str,
    *,
    alerts: Frame | None = None,
    log: bool = False,
    live: str = "",
    height: int = 340,
) -> go.Figure:
    """Quantiles of token entropy over steps (p5-p95 pale, p25-p75 darker, median dashed, p99 dotted) and their mean.

    On a linear axis p99 is hidden until its legend entry is clicked, because it would press everything else flat. live:
    the newer points of a quantile come as LIVE/QUANTILE, "" for none.
    """
    _, unit, help_text = label("entropy")
    fig = figure(theme, "Entropy of tokens, quantiles", unit=unit, help=help_text, height=height)
    x = compact(fan["step"])
    bounded = bounded_fan(fan, log=log)
    p99 = _curve("p99", x, bounded["p99"], faded(colour, 0.55), width=1.0, dash="dot")
    if not log:
        p99.visible = "legendonly"
    fig.add_traces(
        [
            *_band("p5", "p95", x, bounded, faded(colour, 0.14)),
            *_band("p25", "p75", x, bounded, faded(colour, 0.26)),
            p99,
            _curve("median", x, bounded["p50"], colour, width=1.2, dash="dash"),
            _curve("mean", x, bounded["mean"], colour),
        ]
    )
    if live:
        for trace, name in zip(fig.data, FAN, strict=True):
            trace.meta = {"live": f"{live}/{name}", "share": 1.0}
    kind = "log" if log else "linear"
    fig.layout.yaxis = {"type": kind, "title": {"text": unit}, "uirevision": kind}
    if not log:
        fig.layout.yaxis.rangemode = "tozero"
    fig.layout.legend = {"font": {"size": 11}, "itemwidth": 30, "entrywidth": 0}
    clip_steps(fig, x)
    if alerts is not None:
        add_alerts(fig, alerts, float(x[-1]) if len(x) else 0.0, theme)
    return fig


def bounded_fan(fan: Frame, *, log: bool) -> Frame:
    """The quantiles as they are drawn: on a log axis, which cannot show 0, from 1e-5 on."""
    return {name: compact(np.maximum(values, 1e-5 if log else 0.0)) for name, values in fan.items()}


def _curve(
    name: str, x: np.ndarray, y: np.ndarray, colour: str, *, width: float = 2.2, dash: str = "solid"
) -> go.Scatter:
    line = {"color": colour, "width": width, "dash": dash}
    return go.Scatter(x=x, y=y, mode="lines", name=name, line=line, hovertemplate="%{y:.3~g}")


def _band(low: str, high: str, x: np.ndarray, fan: Frame, fill: str) -> list[go.Scatter]:
    """Two invisible curves with the area between them filled. Together they have one legend entry."""
    shared = {"x": x, "mode": "lines", "line": {"width": 0}, "legendgroup": low}
    return [
        go.Scatter(y=fan[low], name=low, showlegend=False, hovertemplate="%{y:.3~g}", **shared),
        go.Scatter(
            y=fan[high],
            name=f"{low}–{high}",
            fill="tonexty",
            fillcolor=fill,
            hovertemplate=f"%{{y:.3~g}}<extra>{high}</extra>",
            **shared,
        ),
    ]


def cell_borders(edges_id: str) -> np.ndarray:
    """Finite borders [cells + 1] for drawing. The open outer cells get the width (ratio) of their neighbours."""
    inner = inner_edges(edges_id).astype(np.float64)
    return np.concatenate([[inner[0] ** 2 / inner[1]], inner, [inner[-1] ** 2 / inner[-2]]])


def _step_borders(step: np.ndarray, last_step: np.ndarray | None = None) -> np.ndarray:
    last = step[-1] if last_step is None else last_step[-1]
    return np.append(step.astype(np.float64), float(last) + 1.0) - 0.5


def histogram_map(theme: Theme, matrix: Frame, key: str, *, height: int = 300) -> go.Figure:
    """Counts over steps on the metric's fixed logarithmic cells. The colour is log1p(count), in SHADES steps."""
    name, unit, help_text = label(key)
    fig = figure(theme, f"{name} of tokens", unit=unit, help=help_text, height=height, cells=key)
    if not len(matrix["step"]):
        return fig
    borders = cell_borders(str(matrix["edges_id"][0]))
    counts = matrix["counts"].T
    top = float(np.log1p(counts.max()))
    ticks = np.array([0, *10 ** np.arange(0, 10)])
    ticks = ticks[np.log1p(ticks) <= top]
    fig.add_trace(
        go.Heatmap(
            x=_step_borders(matrix["step"], matrix["last_step"]),
            y=borders,
            z=np.round(np.log1p(counts) * (SHADES / max(top, 1e-9))).astype(np.uint8),
            customdata=counts.astype(np.min_scalar_type(int(counts.max()))),
            zmin=0.0,
            zmax=SHADES,
            colorscale=scale(theme.sequential),
            hovertemplate="step %{x:.0f}, " + name.lower() + " %{y:.2~g}: %{customdata} tokens<extra></extra>",
            colorbar={
                "title": {"text": "tokens", "side": "right", "font": {"size": 11}},
                "thickness": 10,
                "outlinewidth": 0,
                "tickvals": np.log1p(ticks) * (SHADES / max(top, 1e-9)),
                "ticktext": [f"{tick:,}" for tick in ticks],
                "x": 1.01,
                "tickfont": {"size": 10, "color": theme.muted},
            },
        )
    )
    fig.layout.hovermode, fig.layout.yaxis = "closest", _log_cells(borders, unit)
    return fig


def _log_cells(borders: np.ndarray, unit: str) -> dict:
    """A log axis over the cells. Its first tick says that the lowest cell reaches down to 0."""
    low = float(np.ceil(np.log10(borders[1] * 1.0001)))
    powers = 10.0 ** np.arange(low, np.log10(borders[-1]) + 1e-9)
    texts = [f"{power:g}" if power >= 0.01 else f"10<sup>{round(np.log10(power))}</sup>" for power in powers]
    first = float(np.sqrt(borders[0] * borders[1]))
    return {
        "type": "log",
        "title": {"text": unit},
        "tickvals": [first, *powers],
        "ticktext": ["~0", *texts],
        "range": [np.log10(borders[0]), np.log10(borders[-1])],
        "showgrid": False,
    }


def difference_map(theme: Theme, gap: Frame, key: str, names: tuple[str, str], *, height: int = 320) -> go.Figure:
    """Share of tokens in each cell, the second arm's minus the first's. 0 is the middle of a diverging scale."""
    label_text, unit, _ = label(key)
    title = f"{label_text}: {names[1]} minus {names[0]}"
    fig = figure(
        theme,
        title,
        unit=unit,
        height=height,
        help=f"Difference of the share of tokens in each cell. Blue: {names[1]} has more tokens there.",
    )
    if not len(gap["step"]):
        return fig
    borders = cell_borders("nats96" if key != "deviation" else "deviation96")
    percent = 100.0 * gap["difference"].T
    limit = float(np.percentile(np.abs(percent), 99.5)) or 1.0
    fig.add_trace(
        go.Heatmap(
            x=_step_borders(gap["step"]),
            y=borders,
            z=percent.astype(np.float32),
            zmin=-limit,
            zmax=limit,
            zmid=0.0,
            colorscale=scale(theme.diverging),
            hovertemplate="step %{x:.0f}, " + label_text.lower() + " %{y:.2~g}: %{z:+.2f} pp<extra></extra>",
            colorbar={
                "title": {"text": "percentage points", "side": "right", "font": {"size": 11}},
                "thickness": 10,
                "outlinewidth": 0,
                "x": 1.01,
                "tickfont": {"size": 10, "color": theme.muted},
            },
        )
    )
    fig.layout.hovermode, fig.layout.yaxis = "closest", _log_cells(borders, unit)
    return fig


def selected_against_all(
    theme: Theme, every: Frame, selected: Frame, colour: str, *, key: str = "entropy", height: int = 300
) -> go.Figure:
    """Distribution of a metric over all tokens and over those with weight > 0, pooled over the given steps."""
    return _cell_shares(
        theme,
        key,
        f"{label(key)[0]}, selected against all",
        "Share of tokens in each cell over the newest steps: the tokens that the weighting picks, and all tokens.",
        [(every, "all tokens", theme.uniform), (selected, "selected (weight > 0)", colour)],
        height,
    )


def step_against_step(
    theme: Theme, earlier: Frame, newest: Frame, *, key: str = "entropy", height: int = 300
) -> go.Figure:
    """Distribution of a metric over the tokens of two steps; frames as `monitor.queries.distributions` give them."""
    first, last = (f"step {rows['step'][-1]:.0f}" for rows in (earlier, newest))
    fig = _cell_shares(
        theme,
        key,
        f"{label(key)[0]}, {last} against {first}",
        "Share of the tokens in each cell. Click a cell to read its tokens. Click a step in a chart above and pin it "
        "to see another one here.",
        [(earlier, first, theme.uniform), (newest, last, theme.accent)],
        height,
        cells=key,
    )
    for trace, rows in zip(fig.data, (earlier, newest), strict=False):
        trace.meta = {"step": int(rows["step"][-1])}
    fig.layout.yaxis = {"type": "log", "tickformat": ".3~%", "dtick": 1}  # most tokens lie in the lowest cell
    return fig


def _cell_shares(
    theme: Theme,
    key: str,
    title: str,
    help_text: str,
    curves: Sequence[tuple[Frame, str, str]],
    height: int,
    cells: str = "",
) -> go.Figure:
    """Share of tokens in each cell of a metric. curves: rows of counts, pooled, with their name and colour."""
    unit = label(key)[1]
    fig = figure(theme, title, unit=unit, x=unit, height=height, help=help_text, cells=cells)
    borders = cell_borders("nats96" if key != "deviation" else "deviation96")
    for rows, name, line in curves:
        total = rows["counts"].sum() if len(rows["step"]) else 0
        if total:
            fig.add_trace(
                go.Scatter(
                    x=np.sqrt(borders[:-1] * borders[1:]),
                    y=rows["counts"].sum(0) / total,
                    name=name,
                    mode="lines",
                    line={"color": line, "width": 1.6, "shape": "hvh"},
                    fill="tozeroy",
                    fillcolor=faded(line, 0.16),
                    hovertemplate="%{y:.2%}",
                )
            )
    fig.layout.xaxis = _log_cells(borders, unit) | {"hoverformat": ".2~g"}
    fig.layout.yaxis = {"tickformat": ".3~%", "rangemode": "tozero", "title": {"text": "share of tokens"}}
    return fig


def joint_map(theme: Theme, counts: np.ndarray, key: str = "entropy*deviation", *, height: int = 320) -> go.Figure:
    """Joint counts of entropy and deviation: which entropy the deviating tokens have."""
    title, _, help_text = label(key)
    fig = figure(theme, title, unit="", x="entropy, nats", height=height, help=help_text)
    if not counts.size:
        return fig
    across, up = cell_borders("nats24"), cell_borders("deviation24")
    top = float(np.log1p(counts.max()))
    fig.add_trace(
        go.Heatmap(
            x=across,
            y=up,
            z=np.log1p(counts.T).astype(np.float32),
            customdata=counts.T.astype(np.int32),
            zmin=0.0,
            zmax=top,
            colorscale=scale(theme.sequential),
            showscale=False,
            hovertemplate="entropy %{x:.2~g}, deviation %{y:.2~g}: %{customdata} tokens<extra></extra>",
        )
    )
    fig.layout.hovermode = "closest"
    fig.layout.xaxis, fig.layout.yaxis = _log_cells(across, "entropy, nats"), _log_cells(up, "deviation, nats")
    return fig
