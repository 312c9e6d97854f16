"""Run: what is to be said of one run on the first screen, then every curve and distribution that it recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import streamlit as st

from dashboard import data
from dashboard.escape import markdown
from dashboard.figures import distributions
from dashboard.figures.lines import Line, entropy_against_reward, is_flat, lines, reward_and_pass, smoothed
from dashboard.figures.marks import add_actions, add_outlook
from dashboard.figures.theme import Theme, arm_colours, label
from dashboard.views import glance, shared
from monitor.alerts import RULES
from monitor.alerts.outlook import outlook
from monitor.queries.differences import setting
from monitor.queries.frames import Frame, n_rows, select
from monitor.queries.series import series_of
from monitor.store.tail import RunEntry

PASSES = ("eval/heldout/pass@1", "eval/heldout/pass@4")
TRAINED = ("entropy", "renyi2", "reward")
FIRST_HEIGHT, HEIGHT = 250, 240


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of series: the keys drawn in it, its title (none: made from the keys), and whether its axis is log."""

    keys: tuple[str, ...]
    title: str = ""
    log: bool = False


SECTIONS = {  # heading -> its charts of series
    "Answers": (
        Chart(("eval/heldout/distinct", "eval/multipath/distinct", "eval/ood/distinct"), "Distinct correct answers"),
        Chart(("eval/heldout/pass@1", "eval/multipath/pass@1", "eval/ood/pass@1"), "pass@1 by split"),
        Chart(("all_correct_share", "all_wrong_share", "zero_variance_share"), "Groups without a signal"),
        Chart(("same_answer_share", "duplicate_share", "repetition_share"), "Same answers, same texts, repetition"),
        Chart(("response_length",)),
        Chart(("truncated_share",)),
    ),
    "Where the entropy goes": (
        Chart(
            ("predicted_entropy_lowering_weighted", "predicted_entropy_raising_weighted", "predicted_entropy_lowering"),
            "Entropy flow: what the update takes and gives",
        ),
        Chart(("regime_h_share", "regime_h_share_positive", "regime_h_share_negative"), "Regime H by sign"),
        Chart(("selected_share", "selected_decided_share", "decided_share"), "Selected and decided tokens"),
        Chart(("effective_sample_share", "weight_mean"), "Effective sample share, mean weight"),
        Chart(("probe_predicted_change", "probe_true_change"), "Change of H2: predicted and true"),
        Chart(("entropy_coef",)),
        Chart(("budget_share",)),
        Chart(("temperature",)),
    ),
    "Update": (
        Chart(("kl", "log_ratio_abs")),
        Chart(("grad_norm",), log=True),
        Chart(("clip_share_low", "clip_share_high")),
        Chart(("sampler_mismatch_k3",)),
        Chart(("loss",)),
        Chart(("lr",)),
        Chart(("perf/step_s", "perf/rollout_s", "perf/update_s"), "Time of a step"),
    ),
}
CHARTS = tuple(chart for charts in SECTIONS.values() for chart in charts)
WHAT_NOW = {  # shared.no_steps -> what a reader can do
    "no steps yet": "They appear here by themselves as soon as the first one is written.",
    "no steps": "It ended before the first one was written.",
    "no steps that can be read": "Their files are damaged: rlvr store check names them.",
}
SMOOTHING = {"none": 0, "5 steps": 5, "20 steps": 20, "50 steps": 50}


def page() -> None:
    with st.container(horizontal=True, vertical_alignment="center", key="run-head"):
        entry = shared.pick_run(label_visibility="collapsed", width=320)
        if entry is None:
            return
        shared.status_badge(entry)
        st.caption(markdown("{}", shared.describe(entry)), width="stretch")
        with st.popover("View", icon=":material/tune:"):
            view = _view()
    shared.title("Run", entry.name)
    if not len(data.sample_steps(entry.name)) and not data.scalar_names([entry.name]):
        st.info(
            markdown("This run has {}. {}", shared.no_steps(entry), WHAT_NOW[shared.no_steps(entry)]),
            icon=":material/hourglass_empty:",
        )
        return
    drawing = Drawing(
        entry,
        shared.theme(),
        RunAlerts(data.transitions(entry.name), data.actions(entry.name), frozenset(data.scalar_names([entry.name]))),
        view,
    )
    window = data.window(entry.name, glance.KEYS)
    glance.show(entry, window)
    with shared.grid("first"):
        _entropy(drawing, window)
        _fan(drawing)
        _reward(drawing)
    glance.strip(entry, window)
    for heading in SECTIONS:
        _section(drawing, heading)
    _distributions(drawing)
    _events(entry)


@dataclass(frozen=True, slots=True)
class View:
    """How curves are drawn: a logarithmic axis of entropy, and over how many steps they are smoothed (0: not)."""

    log: bool
    smoothing: int


def _view() -> View:
    axis = shared.choose(st.segmented_control, "Entropy axis", "axis", ("linear", "log"), "linear", required=True)
    over = shared.choose(st.segmented_control, "Smoothing", "smooth", tuple(SMOOTHING), "none", required=True)
    st.caption("A smoothed curve is an exponential mean over that many steps; the values themselves stay pale behind.")
    return View(axis == "log", SMOOTHING[over])


@dataclass(frozen=True, slots=True)
class RunAlerts:
    """Which alerts stand on which chart: those of a rule on the chart of the series that it watches.

    Actions stand on all charts, because they change all series.
    """

    alerts: Frame
    actions: Frame
    recorded: frozenset[str]

    def on(self, *keys: str) -> Frame:
        """The alerts for a chart of `keys`; those whose series has no chart here stand on that of entropy."""
        charts = {"reward", *PASSES, *(key for chart in CHARTS for key in chart.keys)} & self.recorded
        watched = [RULES[rule].watches if rule in RULES else "" for rule in self.alerts["rule"]]
        return select(self.alerts, np.array([(key if key in charts else "entropy") in keys for key in watched], bool))


@dataclass(frozen=True, slots=True)
class Drawing:
    """What every chart of the page needs."""

    entry: RunEntry
    theme: Theme
    alerts: RunAlerts
    view: View

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def colour(self) -> str:
        kind = str(self.entry.info.get("weighting", "uniform"))
        return arm_colours([kind], self.theme)[kind]

    @property
    def colours(self) -> tuple[str, str, str]:
        """For the series of one chart."""
        return self.colour, self.theme.second, self.theme.wheel[1]

    def show(self, fig: go.Figure, key: str) -> None:
        shared.chart(add_actions(fig, self.alerts.actions, self.theme), f"{key}-{self.name}", run=self.name)

    def line(
        self, rows: Frame, key: str, colour: str, *, name: str = "", points: bool = False, dash: str = "solid"
    ) -> list[Line]:
        """The line of a series, with its raw values pale behind it where it is smoothed; [] of none."""
        steps, values = series_of(rows, self.name, key)
        line = Line(name or label(key)[0], steps, values, colour, points=points, dash=dash)
        return smoothed(line, self.view.smoothing) if len(steps) else []


def _entropy(drawing: Drawing, window) -> None:
    theme = drawing.theme
    rows = data.scalars([drawing.name], ("entropy", "renyi2", "entropy_selected"))
    steps, every = series_of(rows, drawing.name, "entropy")
    drawn = [*drawing.line(rows, "entropy", drawing.colour), *drawing.line(rows, "renyi2", theme.second)]
    selected = series_of(rows, drawing.name, "entropy_selected")[1]
    if len(selected) and not np.array_equal(selected, every):  # with equal weights they are one curve
        drawn += drawing.line(rows, "entropy_selected", theme.wheel[1], dash="dot")
    if not drawn:
        return
    fig = lines(
        theme,
        "entropy",
        drawn,
        title="Mean entropy",
        alerts=drawing.alerts.on("entropy"),
        log=drawing.view.log,
        height=FIRST_HEIGHT,
        zero=True,
    )
    found = outlook(window)
    if found is not None:
        planned = setting(drawing.entry.info, "config.steps", int)
        ahead = float(planned or np.inf) if drawing.entry.status == "running" else 0.0
        add_outlook(fig, theme, found, float(steps[-1]), ahead)
    drawing.show(fig, "entropy")


def _fan(drawing: Drawing) -> None:
    fan = data.fan(drawing.name)
    if len(fan["step"]):
        fig = distributions.entropy_fan(
            drawing.theme, fan, drawing.colour, alerts=drawing.alerts.on("entropy"), log=drawing.view.log,
            height=FIRST_HEIGHT,
        )  # fmt: skip
        drawing.show(fig, "fan")


def _reward(drawing: Drawing) -> None:
    theme = drawing.theme
    rows = data.scalars([drawing.name], ("reward", *PASSES))
    passes = [
        line
        for key, colour, dash in zip(PASSES, (theme.second, theme.wheel[1]), ("solid", "dot"), strict=True)
        for line in drawing.line(rows, key, colour, points=True, dash=dash)[-1:]
    ]
    reward = drawing.line(rows, "reward", drawing.colour)
    if reward or passes:
        on = drawing.alerts.on("reward", *PASSES, "same_answer_share")
        drawing.show(reward_and_pass(theme, reward, passes, alerts=on, height=FIRST_HEIGHT), "reward")


def _section(drawing: Drawing, heading: str) -> None:
    """The charts for which the run has recorded something; of series that never move, or equal another, one line."""
    charts = SECTIONS[heading]
    rows = data.scalars([drawing.name], tuple(key for chart in charts for key in chart.keys))
    quiet = list[str]()
    with st.container(key=f"section-{heading.replace(' ', '-')}"):
        head = st.empty()
        with shared.grid(heading.replace(" ", "-")):
            for chart in charts:
                keys, told = _moving(drawing, rows, chart)
                quiet += told
                if keys:
                    _series_chart(drawing, rows, chart, keys)
            if heading == "Where the entropy goes":
                _law(drawing)
        if quiet or set(rows["name"]):
            shared.small_heading(heading, place=head)
        if quiet:
            st.caption(markdown("Not drawn: {}.", "; ".join(quiet)))


def _moving(drawing: Drawing, rows: Frame, chart: Chart) -> tuple[list[str], list[str]]:
    """(the recorded keys of a chart that are worth a line, what is to be said of the others)."""
    drawn, told = list[str](), list[str]()
    values = {key: series_of(rows, drawing.name, key)[1] for key in chart.keys}
    for key in (key for key in chart.keys if len(values[key])):
        name, unit, _ = label(key)
        same = next((other for other in drawn if np.array_equal(values[other], values[key], equal_nan=True)), None)
        if same is not None:
            told.append(f"{name}, equal to {label(same)[0]}")
        elif is_flat(values[key]) and not n_rows(drawing.alerts.on(key)):
            told.append(f"{name}, {shared.number(float(values[key][-1]), unit)} in all steps")
        else:
            drawn.append(key)
    return drawn, told


def _series_chart(drawing: Drawing, rows: Frame, chart: Chart, keys: Sequence[str]) -> None:
    names = {key: label(key)[0] for key in keys}
    kinds = {name.rpartition(", ")[0] for name in names.values()}
    if chart.title and len(kinds) == 1 and "" not in kinds:  # "pass@1, heldout" under the title "pass@1 by split"
        names = {key: name.rpartition(", ")[2] for key, name in names.items()}
    drawn = [
        line
        for key, colour in zip(keys, drawing.colours, strict=False)
        for line in drawing.line(rows, key, colour, name=names[key], points=key.startswith(("eval/", "probe_")))
    ]
    title, alerts = chart.title or _joined(keys), drawing.alerts.on(*keys)
    drawing.show(
        lines(drawing.theme, keys[0], drawn, title=title, alerts=alerts, log=chart.log, height=HEIGHT), keys[0]
    )


def _law(drawing: Drawing) -> None:
    """Reward against entropy, with the law fitted to the steps after warm-up; without it where an action broke it."""
    rows = data.scalars([drawing.name], TRAINED)
    (steps, entropy), (seen, reward) = (series_of(rows, drawing.name, key) for key in ("entropy", "reward"))
    both, at, of = np.intersect1d(steps, seen, return_indices=True)
    if len(both) >= 10:
        fig = entropy_against_reward(
            drawing.theme, both, entropy[at], reward[of], drawing.colour, law=not _disturbed(drawing), height=HEIGHT
        )
        shared.chart(fig, f"law-{drawing.name}", group="")


def _disturbed(drawing: Drawing) -> bool:
    """Whether an action or a moving entropy control changed what the entropy does."""
    controls = ("entropy_coef", "budget_share", "temperature")
    rows = data.scalars([drawing.name], controls)
    moving = any(not is_flat(series_of(rows, drawing.name, key)[1]) for key in controls if key in set(rows["name"]))
    return moving or bool(n_rows(drawing.alerts.actions))


def _joined(keys: Sequence[str]) -> str:
    """'Clipped low, clipped high'; KL and the like keep their capitals."""
    first, *rest = (label(key)[0] for key in keys)
    return ", ".join([first, *(text if text[1:2].isupper() else text[0].lower() + text[1:] for text in rest)])


def _distributions(drawing: Drawing) -> None:
    """How entropy and deviation of single tokens are distributed: over all steps, at two of them, and together."""
    theme, name = drawing.theme, drawing.name
    maps = {key: data.counts(name, key) for key in ("entropy", "deviation")}
    if not any(len(matrix["step"]) for matrix in maps.values()):
        return
    shared.small_heading("Distributions of tokens")
    with shared.grid("distributions"):
        for key, matrix in maps.items():
            if len(matrix["step"]):
                drawing.show(distributions.histogram_map(theme, matrix, key, height=HEIGHT), f"{key}-map")
        _two_steps(drawing)
        every, selected = (data.newest_counts(name, "entropy", split) for split in ("all", "selected"))
        if len(every["step"]) and len(selected["step"]) and every["counts"].sum() != selected["counts"].sum():
            accent = drawing.colour if drawing.colour != theme.uniform else theme.accent
            fig = distributions.selected_against_all(theme, every, selected, accent, height=HEIGHT)
            shared.chart(fig, f"selected-{name}", group="")
        counts = data.joint(name)
        if counts.size:
            shared.chart(distributions.joint_map(theme, counts, height=HEIGHT), f"joint-{name}", group="")


def _two_steps(drawing: Drawing) -> None:
    """The entropy of the newest step's tokens beside that of the pinned step, which is the first one if none is."""
    newest = data.newest_counts(drawing.name, "entropy", "all", 1)
    pinned = data.counts_at(drawing.name, "entropy", shared.pinned_step(drawing.name))
    if len(newest["step"]) and len(pinned["step"]):
        fig = distributions.step_against_step(drawing.theme, pinned, newest, drawing.colour, height=HEIGHT)
        shared.chart(fig, f"two-steps-{drawing.name}", group="")


def _events(entry: RunEntry) -> None:
    happened = data.events([entry.name])
    if n_rows(happened):
        shared.small_heading("Events")
        table = {
            "step": happened["step"],
            "what": happened["kind"],
            "message": happened["message"],
            "when": (happened["ts"] * 1000).astype("datetime64[ms]"),
        }
        st.dataframe(
            table,
            hide_index=True,
            placeholder="–",
            column_config={
                "step": st.column_config.NumberColumn(format="%d", width=70),
                "what": st.column_config.TextColumn(width=140),
                "message": st.column_config.TextColumn(width="large"),
                "when": st.column_config.DatetimeColumn(format="D MMM, HH:mm:ss", timezone="UTC"),
            },
        )
