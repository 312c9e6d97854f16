"""Figures of scalar series: lines, reward beside pass@k, pass@1 against distinct answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dashboard.escape import plotly
from dashboard.figures.marks import add_alerts
from dashboard.figures.theme import Theme, clip_steps, compact, faded, figure, label, number_format
from monitor.queries.frames import Frame
from monitor.queries.series import Series
from monitor.stats.entropy_law import fit_entropy_law

BAND_STEPS = 200  # at which a band is computed: it costs 500 means and their order at each
MOST_MARKED = 60  # points of a curve that are marked one by one: more would be a rope
LAW_R2 = 0.3  # share of the variance below which the entropy-reward law is not drawn


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """One series of a line chart. `faint`: a pale line behind the others (a single seed). `points`: mark each value.

    live: the name under which its newer points come (`components.chart.send_new_points`), "" for none. share: what a
    newer value counts in the line, whose last value counts the rest; below 1 in an exponential mean.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    dash: str = "solid"
    faint: bool = False
    points: bool = False
    group: str = ""
    live: str = ""
    share: float = 1.0


def lines(
    theme: Theme,
    key: str,
    series: Sequence[Line],
    *,
    title: str = "",
    alerts: Frame | None = None,
    log: bool = False,
    zero: bool = False,
    height: int = 260,
) -> go.Figure:
    """Lines of one metric over steps, with the `alerts` of a run. Labels, unit and help come from METRICS."""
    name, unit, help_text = label(key)
    fig = figure(theme, title or name, unit=unit, help=help_text, height=height)
    fig.add_traces([_trace(line, unit) for line in series])
    fig.layout.yaxis = _value_axis(unit, log)
    if zero and not log:
        fig.layout.yaxis.rangemode = "tozero"
    clip_steps(fig, *(line.x for line in series))
    shown = [line for line in series if not line.faint]
    fig.layout.showlegend = len(shown) > 1
    if alerts is not None:
        add_alerts(fig, alerts, _last_step(series), theme)
    return fig


def _trace(line: Line, unit: str) -> go.Scatter:
    colour = faded(line.colour, 0.35) if line.faint else line.colour
    return go.Scatter(
        x=compact(line.x),
        y=compact(line.y),
        name=plotly(line.name),
        mode="lines+markers" if len(line.x) == 1 or (line.points and len(line.x) <= MOST_MARKED) else "lines",
        line={"color": colour, "width": 1 if line.faint else 1.8, "dash": line.dash},
        marker={"size": 7, "color": line.colour},
        showlegend=not line.faint,
        legendgroup=line.group or line.name,
        hoverinfo="skip" if line.faint else None,
        hovertemplate=None if line.faint else f"%{{y:{number_format(unit)}}}",
        meta={"live": line.live, "share": line.share} if line.live else None,
    )


def _value_axis(unit: str, log: bool) -> dict[str, Any]:
    kind = "log" if log else "linear"
    axis = {"type": kind, "uirevision": kind, "title": {"text": "" if unit in ("", "share") else unit}}
    return axis | ({"tickformat": ".3~%", "rangemode": "nonnegative"} if unit == "share" else {})


def _last_step(series: Sequence[Line]) -> float:
    ends = [float(line.x[-1]) for line in series if len(line.x)]
    return max(ends, default=0.0)


def arm_lines(name: str, key: str, runs: Mapping[str, Series], colour: str) -> list[Line]:
    """One series of the runs of an arm. Several runs are drawn faint, behind their mean."""
    members = [
        Line(
            name if len(runs) == 1 else run,
            *series,
            colour,
            points=key.startswith("eval/"),
            faint=len(runs) > 1,
            group=name,
        )
        for run, series in runs.items()
    ]
    members = [member for member in members if len(member.x)]
    return [*members, mean_line(name, members, colour)] if len(members) > 1 else members


def mean_line(name: str, members: Sequence[Line], colour: str) -> Line:
    """Mean over several runs' series, each run counting once, at the steps that all of them have."""
    common = _common_steps(members)
    values = [member.y[np.isin(member.x, common)] for member in members]
    mean = np.mean(values, axis=0) if len(common) else np.zeros(0)
    return Line(f"{name}, mean of {len(members)}", common, mean, colour, group=name)


def _common_steps(members: Sequence[Line]) -> np.ndarray:
    common = members[0].x
    for member in members[1:]:
        if not np.array_equal(common, member.x):
            common = np.intersect1d(common, member.x)
    return common


def seed_band(theme: Theme, members: Sequence[Line], colour: str, seed: int = 0) -> list[go.Scatter]:
    """Bootstrap 95 % band of the mean over runs, at up to BAND_STEPS of the steps that all of them have.

    Empty for fewer than three runs, which say too little for a band.
    """
    common = _common_steps(members)
    if len(common) > BAND_STEPS:
        common = common[np.linspace(0, len(common) - 1, BAND_STEPS).round().astype(int)]
    if len(members) < 3 or not len(common):
        return []
    values = np.stack([member.y[np.isin(member.x, common)] for member in members])
    picks = np.random.default_rng(seed).integers(0, len(members), (500, len(members)))
    means = values[picks].mean(1)
    percentile = np.nanpercentile if np.isnan(means).any() else np.percentile  # the former goes step by step
    low, high = percentile(means, [2.5, 97.5], axis=0)
    edge = {"width": 0, "color": colour}
    return [
        go.Scatter(x=common, y=low, mode="lines", line=edge, showlegend=False, hoverinfo="skip"),
        go.Scatter(
            x=common,
            y=high,
            mode="lines",
            line=edge,
            fill="tonexty",
            fillcolor=faded(colour, 0.15),
            showlegend=False,
            hoverinfo="skip",
        ),
    ]


def smoothed(line: Line, over: int) -> list[Line]:
    """[the line], or with `over` steps > 0 its exponential mean, the values themselves pale before it.

    mean_t = mean_(t-1) + a (y_t - mean_(t-1)), a = 2 / (over + 1), from mean_0 = y_0. Missing values keep the mean.
    """
    if not over or line.points or len(line.x) < 3:
        return [line]
    share, told = 2.0 / (over + 1), f"{line.name}, mean of {over} steps"

    def step(mean: float, value: float) -> float:
        if math.isnan(value):
            return mean
        return value if math.isnan(mean) else mean + share * (value - mean)

    mean = np.array(list(accumulate(line.y.tolist(), step)))
    return [replace(line, faint=True, group=told), replace(line, name=told, y=mean, group=told, share=share)]


def is_flat(values: np.ndarray) -> bool:
    """Whether a series never moves, but for rounding errors: such a one is told and not drawn."""
    finite = values[np.isfinite(values)]
    return len(finite) > 1 and float(np.ptp(finite)) <= 1e-6 * max(1.0, float(np.abs(finite).max()))


def reward_and_pass(
    theme: Theme,
    reward: Sequence[Line],
    passes: Sequence[Line],
    *,
    alerts: Frame | None = None,
    height: int = 280,
) -> go.Figure:
    """Training reward with held-out pass@k. If pass@1 rises while pass@k falls, diversity is being lost."""
    _, _, help_text = label("reward")
    fig = figure(
        theme,
        "Reward and pass@k",
        height=height,
        help=f"{help_text} Points are evaluations. If pass@1 rises while pass@k falls, diversity is being lost.",
    )
    fig.add_traces([*(_trace(line, "") for line in reward), *(_trace(line, "share") for line in passes)])
    clip_steps(fig, *(line.x for line in (*reward, *passes)))
    fig.layout.showlegend = bool(passes)
    if alerts is not None:
        add_alerts(fig, alerts, _last_step([*reward, *passes]), theme)
    return fig


def entropy_against_reward(
    theme: Theme,
    steps: np.ndarray,
    entropy: np.ndarray,
    reward: np.ndarray,
    colour: str,
    *,
    law: bool,
    height: int = 280,
) -> go.Figure:
    """The run's path through entropy (x) and reward (y); with `law` the fitted R = -a exp(H) + b and its ceiling.

    law is False where something changed the entropy from outside: the law holds only while the settings stay the same.
    """
    fig = figure(
        theme,
        "Reward against entropy",
        x="entropy, nats",
        height=height,
        help="Each point is a step, the newest is large. The curve is R = -a exp(H) + b (arXiv 2505.22617), fitted to "
        "all of them; its value at H = 0 is the reward that this run can reach by spending all of its entropy. "
        "It is left out where an action or an entropy bonus changed the entropy.",
    )
    size = np.full(len(steps), 5.0)
    size[-1:] = 12.0
    fig.add_trace(
        go.Scatter(
            x=entropy, y=reward, mode="markers", name="steps", customdata=steps,
            marker={"size": size, "color": faded(colour, 0.6)},
            hovertemplate="step %{customdata}: entropy %{x:.3~g}, reward %{y:.3~g}<extra></extra>",
        )
    )  # fmt: skip
    keep = np.isfinite(entropy) & np.isfinite(reward)
    fitted = fit_entropy_law(entropy[keep], reward[keep]) if law and len(np.unique(entropy[keep])) > 3 else None
    if fitted is not None and fitted.r2 >= LAW_R2:
        x = np.linspace(0.0, float(entropy[keep].max()), 60)
        name = f"law, r² {fitted.r2:.2f}, ceiling {fitted.ceiling:.2f}"
        line = {"color": theme.second, "width": 1.8}
        fig.add_trace(
            go.Scatter(x=x, y=fitted.b - fitted.a * np.exp(x), mode="lines", name=name, line=line, hoverinfo="skip")
        )
    elif fitted is not None:
        fig.data[0].name = f"steps; the law does not fit, r² {fitted.r2:.2f}"
    fig.layout.hovermode, fig.layout.showlegend = "closest", True
    fig.layout.xaxis.rangemode = "tozero"
    fig.layout.yaxis.title = {"text": "reward"}
    return fig


def pass_against_distinct(theme: Theme, paths: Sequence[Line], *, height: int = 320) -> go.Figure:
    """Held-out pass@1 (x) against distinct correct answers (y), one path for each run.

    A path that goes right and down gains accuracy by losing diversity.
    """
    fig = figure(
        theme,
        "pass@1 against distinct answers",
        unit="",
        x="pass@1, held-out",
        height=height,
        help="Each point is one evaluation. A path that goes right and down gains accuracy by losing diversity.",
    )
    for path in paths:
        size = np.full(len(path.x), 6.0)
        size[-1:] = 11.0  # the newest evaluation
        faint = path.faint
        fig.add_trace(
            go.Scatter(
                x=path.x,
                y=path.y,
                name=plotly(path.name),
                mode="lines" if faint else "lines+markers",
                line={"color": faded(path.colour, 0.3) if faint else path.colour, "width": 1 if faint else 1.5},
                marker={"size": size, "color": path.colour},
                showlegend=not faint,
                legendgroup=path.group or path.name,
                hoverinfo="skip" if faint else None,
                hovertemplate=None if faint else "pass@1 %{x:.1%}, distinct %{y:.3~g}",
            )
        )
    fig.layout.hovermode, fig.layout.showlegend = "closest", True
    fig.layout.xaxis.tickformat = ".3~%"
    fig.layout.yaxis.title = {"text": "distinct correct answers"}
    return fig
