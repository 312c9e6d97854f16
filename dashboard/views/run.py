"""Run: what is to be said of one run on the first screen, then every curve and distribution that it recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import plotly.graph_objects as go
import streamlit as st

from dashboard import data
from dashboard.components.chart import Packed, packed, send_new_points, send_old_points
from dashboard.escape import markdown
from dashboard.figures import distributions
from dashboard.figures.lines import Line, entropy_against_reward, is_flat, lines, reward_and_pass, smoothed
from dashboard.figures.marks import MILESTONES, add_actions, add_milestones, add_outlook, milestones_shown
from dashboard.figures.spent import STEP, stand_over
from dashboard.figures.theme import Theme, arm_colours, compact, label
from dashboard.views import downloads, glance, replay, shared
from monitor.alerts import RULES
from monitor.alerts.outlook import outlook
from monitor.metrics import is_known
from monitor.queries.differences import setting
from monitor.queries.distributions import pooled, quantiles
from monitor.queries.followed import Series, thinned
from monitor.queries.frames import Frame, n_rows, select
from monitor.store.tail import RunEntry

PASSES = ("eval/heldout/pass@1", "eval/heldout/pass@4")
FIRST_HEIGHT, HEIGHT = 250, 240
POINTS, COLUMNS = 600, 300  # most points of a series and columns of a map: more than such a chart has pixels for
LATE = 20  # steps that "newest" pools where one alone has few tokens
PACE_S = 5.0  # how often the page is made anew while its curves alone grow
SEEN_S, UNSEEN_S = 20.0, 60.0  # how far the other parts of figures may lag behind: those on the screen, and the others
FAN = "entropy quantiles"  # the name under which the newest quantiles come


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of series: the keys drawn in it, and its title (none: made from the keys).

    log: its axis always is. by_factors: its axis is log where the reader asks for that.
    """

    keys: tuple[str, ...]
    title: str = ""
    log: bool = False
    by_factors: bool = False


SECTIONS = {  # heading -> its charts of series
    "Answers": (
        Chart(("eval/heldout/distinct", "eval/multipath/distinct", "eval/ood/distinct"), "Distinct correct answers"),
        Chart(("eval/heldout/pass@1", "eval/multipath/pass@1", "eval/ood/pass@1"), "pass@1 by split"),
        Chart(("all_correct_share", "all_wrong_share", "zero_variance_share"), "Groups without a signal"),
        Chart(("same_answer_share", "duplicate_share", "repetition_share"), "Same answers, same texts, repetition"),
        Chart(("response_length",), by_factors=True),
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
        Chart(("kl", "log_ratio_abs"), by_factors=True),
        Chart(("grad_norm",), log=True),
        Chart(("clip_share_low", "clip_share_high")),
        Chart(("sampler_mismatch_k3",), by_factors=True),
        Chart(("sampler_ess", "sampler_ratio", "sampler_ratio_cut"), "Importance weights of sampled tokens"),
        Chart(("loss",)),
        Chart(("lr",), by_factors=True),
        Chart(("perf/step_s", "perf/rollout_s", "perf/update_s"), "Time of a step", by_factors=True),
    ),
}
CHARTS = tuple(chart for charts in SECTIONS.values() for chart in charts)
OTHERS = "Other series"  # those that METRICS does not know
MOST_OTHERS = 6  # of them that are drawn unless the reader chooses
WHAT_NOW = {  # shared.no_steps -> what a reader can do
    "no steps yet": "They appear here by themselves as soon as the first one is written.",
    "no steps": "It ended before the first one was written.",
    "no steps that can be read": "Their files are damaged: rlvr store check names them.",
}


def page() -> None:
    with st.container(horizontal=True, vertical_alignment="center", key="run-head"):
        entry = shared.pick_run(label_visibility="collapsed", width=320, ends=replay.PARAMETERS)
        if entry is None:
            return
        shared.status_badge(entry)
        st.caption(markdown("{}", shared.describe(entry)), width="stretch")
        replay.offer(entry)
        with st.popover("View", icon=":material/tune:"):
            view = _view(entry)
        with st.popover("Download", icon=":material/download:"):
            downloads.run(entry)
    shared.title("Run", entry.name)
    shared.what_now(entry)
    tape = replay.bar(entry)
    if tape is not None and not tape.is_over:
        entry = replace(entry, status="running")  # as it was then
    run = data.followed(entry.name)
    if not run.keys and not len(data.sample_steps(entry.name)):
        st.info(
            markdown("This run has {}. {}", shared.no_steps(entry), WHAT_NOW[shared.no_steps(entry)]),
            icon=":material/hourglass_empty:",
        )
        return
    drawing = Drawing(
        entry,
        shared.theme(),
        RunAlerts(data.transitions(entry.name), data.actions(entry.name), frozenset(run.keys)),
        data.milestones(entry.name),
        view,
        "" if tape is None else tape.name,
    )
    window = data.window(entry.name, glance.KEYS)
    glance.show(entry, window)
    _show(drawing, shared.FIRST, partial(_first, drawing))
    _evaluated(entry, run.keys)
    glance.strip(entry, window)
    glance.alerts(entry)
    _key_of_milestones(drawing.milestones)
    for heading in SECTIONS:
        _show(drawing, heading, partial(_section, drawing, heading))
    _show(drawing, "Distributions of tokens", partial(_distributions, drawing))
    _others(drawing)
    _events(entry)
    live = Live(drawing, data.urgent(entry.name), time.monotonic())
    shared.follow(live if tape is None else replay.Played(tape, live))


@dataclass(frozen=True, slots=True)
class Live:
    """How the page follows its run: its curves grow at every step, all else is made anew every PACE_S.

    It is made anew at once where something else than further steps came, such as an alert. urgent: `data.urgent` when
    it was made; drawn: when that was, by time.monotonic().
    """

    drawing: Drawing
    urgent: object
    drawn: float

    @property
    def name(self) -> str:
        return self.drawing.name

    def is_due(self, *, is_new: bool) -> bool:
        """Whether the page must be made anew. is_new: whether the store changed since it was made."""
        if data.is_behind(self.name):
            return True
        return is_new and (time.monotonic() - self.drawn >= PACE_S or data.urgent(self.name) != self.urgent)

    def send(self) -> None:
        """Send the points of the shown curves since the oldest of their figures was made."""
        names = tuple(sorted({name for section in self.drawing.shown for name in section.live}))
        asked = (self._since, names, self.drawing.view)
        if names:
            send_new_points(data.remembered(self.name, "new points", asked, self._points))

    @property
    def _since(self) -> int:
        return min((section.until for section in self.drawing.shown), default=-1)

    def _points(self) -> dict[str, Series]:
        """{name: its points after the step `_since`} of what curves are live."""
        since, found = self._since, dict[str, Series]()
        names = {name for section in self.drawing.shown for name in section.live}
        for key in data.followed(self.name).keys:
            if self.drawing.live(key) in names:
                steps, values = data.followed(self.name).series(key)
                first = int(np.searchsorted(steps, since, side="right"))
                if first < len(steps):
                    found[self.drawing.live(key)] = compact(self.drawing.x(steps[first:])), compact(values[first:])
        if self.drawing.live(f"{FAN}/mean") in names:
            fan = quantiles(data.new_columns(self.name, "entropy", since, COLUMNS))
            steps = compact(self.drawing.x(fan["step"]))
            found |= {
                self.drawing.live(f"{FAN}/{key}"): (steps, values)
                for key, values in distributions.bounded_fan(fan, log=self.drawing.view.log).items()
                if len(steps) and key in distributions.FAN
            }
        return found


@dataclass(frozen=True, slots=True)
class View:
    """How curves are drawn: over what, on a log axis where that makes sense, smoothed over so many steps (0: not)."""

    over: str
    log: bool
    smoothing: int


def _view(entry: RunEntry) -> View:
    recorded = data.followed(entry.name).keys
    over = shared.choose_axis([what for what, (key, _) in data.SPENT_SERIES.items() if key in recorded])
    axis = shared.choose(st.segmented_control, "Value axis", "axis", ("linear", "log"), "linear", required=True)
    smoothing = shared.choose_smoothing()
    shared.choose(st.segmented_control, "Updates", "updates", ("live", shared.PAUSED), "live", required=True)
    st.caption(
        "A log axis is for what changes by factors: entropy, KL, gradient norm, times. "
        "A smoothed curve is an exponential mean over that many steps; the values themselves stay pale behind."
    )
    return View(over, axis == "log", smoothing)


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
    milestones: Frame
    view: View
    tape: str = ""  # of a replay: what newer points of an earlier one are not mistaken for
    shown: list[Section] = field(default_factory=list)  # filled while the page is made

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def colour(self) -> str:
        kind = str(self.entry.info.get("weighting", "uniform"))
        return arm_colours([kind], self.theme)[kind]

    @property
    def newest(self) -> int:
        """The newest step of the run, as far as it was read."""
        return data.followed(self.name).newest_step

    @property
    def colours(self) -> tuple[str, str, str]:
        """For the series of one chart."""
        return self.colour, self.theme.second, self.theme.wheel[1]

    def over_steps(self, fig: go.Figure) -> go.Figure:
        """A figure over steps with the run's actions and milestones, moved to what the reader wants it over."""
        add_actions(fig, self.alerts.actions, self.theme)
        add_milestones(fig, self.milestones, self.theme)
        return fig if self.view.over == STEP else stand_over(fig, self.view.over, self.x)

    def x(self, steps: np.ndarray) -> np.ndarray:
        """Where steps stand on the x axis."""
        return steps if self.view.over == STEP else data.spent(self.name, self.view.over, steps)

    def step_at(self, x: float) -> int:
        """The step at a place of the x axis."""
        return round(x) if self.view.over == STEP else data.step_at(self.name, self.view.over, x)

    @property
    def group(self) -> str:
        """The group of charts that zoom together."""
        return "steps" if self.view.over == STEP else self.view.over

    def live(self, what: str) -> str:
        """The name under which newer points of a curve come."""
        return f"{self.name}{self.tape}/{what}"

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a series, with as many points as a chart can show."""
        return thinned(data.followed(self.name).series(key), POINTS)

    def line(self, key: str, colour: str, *, name: str = "", points: bool = False, dash: str = "solid") -> list[Line]:
        """The line of a series, with its raw values pale behind it where it is smoothed; [] of none."""
        steps, values = self.series(key)
        line = Line(name or label(key)[0], steps, values, colour, points=points, dash=dash, live=self.live(key))
        return smoothed(line, self.view.smoothing) if len(steps) else []


@dataclass(frozen=True, slots=True)
class Section:
    """What stands under a heading: its charts by key, those of them over steps, and a line of what is not drawn.

    until: the newest step of the run when it was made.
    """

    charts: dict[str, Packed]
    over_steps: frozenset[str]
    until: int
    quiet: str = ""

    @property
    def live(self) -> set[str]:
        """The names under which newer points of its curves come."""
        return {name for chart in self.charts.values() for name in chart.live}


def _show(drawing: Drawing, heading: str, build: Callable[[], Section], chosen: Sequence[str] = ()) -> None:
    """A section of the page. Its curves grow at every step (`Live`); the figures are built anew now and then.

    chosen: what the reader has chosen to see in it.
    """
    rows = (n_rows(drawing.alerts.alerts), n_rows(drawing.alerts.actions), data.history(drawing.name))
    pinned, status = shared.pinned_step(drawing.name), drawing.entry.status
    asked = (drawing.theme.name, drawing.view, drawing.tape, status, pinned, rows, tuple(chosen))
    section = data.remembered(
        drawing.name, heading, asked, build, lag_s=SEEN_S if shared.is_visible(heading) else UNSEEN_S
    )
    if not section.charts and not section.quiet:
        return
    drawing.shown.append(section)
    if heading not in (shared.FIRST, OTHERS):
        shared.small_heading(heading)
    names = {key: f"{key}-{drawing.name}-{drawing.view.over}" for key in section.charts}  # another axis, another chart
    keyed = {names[key]: chart for key, chart in section.charts.items()}
    with st.container(key=f"unseen-{heading.replace(' ', '-')}"):
        send_old_points(keyed, key=f"old-{heading}-{drawing.name}")
    with shared.grid(heading.replace(" ", "-")):
        for key, chart in section.charts.items():
            group = drawing.group if key in section.over_steps else ""
            shared.chart(chart, names[key], group=group, run=drawing.name, section=heading, step_at=drawing.step_at)
    if section.quiet:
        st.caption(markdown("Not drawn: {}.", section.quiet))


def _evaluated(entry: RunEntry, keys: Sequence[str]) -> None:
    """Of a run without evaluations: what is not known of it, and when the first one comes."""
    if any(key.startswith("eval/") for key in keys):
        return
    every = setting(entry.info, "config.eval.every", int)
    if entry.status in shared.ENDED:
        st.caption("No evaluation was recorded, so nothing is known of its pass@k and distinct answers.")
    elif every:
        st.caption(markdown("No evaluation yet: one comes every {} steps, with pass@k and distinct answers.", every))
    else:
        st.caption("No evaluation yet: pass@k and distinct answers come with the first one, if the trainer makes any.")


def _key_of_milestones(milestones: Frame) -> None:
    """What the signs at the foot of the charts mean, and which of them there are too many to draw."""
    shown = milestones_shown(milestones)
    told = ", ".join(f"{MILESTONES[what][1]} {what}" for what in shown)
    counts = {what: int(np.sum(milestones["what"] == what)) for what in MILESTONES if what not in shown}
    many = " and ".join(f"{n:,} {what}s" for what, n in counts.items() if n)
    if told:
        st.caption(markdown("At the foot of the charts: {}.", told))
    if many:
        st.caption(markdown("Not marked, because there are too many to tell apart: {}.", many))


def _first(drawing: Drawing) -> Section:
    drawn = {"entropy": _entropy(drawing), "fan": _fan(drawing), "reward": _reward(drawing)}
    charts = {key: packed(drawing.over_steps(fig), split=True) for key, fig in drawn.items() if fig is not None}
    return Section(charts, frozenset(charts), drawing.newest)


def _entropy(drawing: Drawing) -> go.Figure | None:
    theme = drawing.theme
    steps, every = drawing.series("entropy")
    drawn = [*drawing.line("entropy", drawing.colour), *drawing.line("renyi2", theme.second)]
    selected = drawing.series("entropy_selected")[1]
    if len(selected) and not np.array_equal(selected, every):  # with equal weights they are one curve
        drawn += drawing.line("entropy_selected", theme.wheel[1], dash="dot")
    if not drawn:
        return None
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
    found = outlook(data.window(drawing.name, ("entropy",)))
    if found is not None:
        planned = setting(drawing.entry.info, "config.steps", int)
        follows = drawing.entry.status == "running" and drawing.view.over == STEP  # nobody knows what steps will cost
        ahead = float(planned or np.inf) if follows else 0.0
        add_outlook(fig, theme, found, float(steps[-1]), ahead)
    return fig


def _fan(drawing: Drawing) -> go.Figure | None:
    fan = quantiles(pooled(data.counts_of(drawing.name, "entropy"), COLUMNS))
    if not len(fan["step"]):
        return None
    return distributions.entropy_fan(
        drawing.theme, fan, drawing.colour, alerts=drawing.alerts.on("entropy"), log=drawing.view.log,
        live=drawing.live(FAN), height=FIRST_HEIGHT,
    )  # fmt: skip


def _reward(drawing: Drawing) -> go.Figure | None:
    theme = drawing.theme
    passes = [
        line
        for key, colour, dash in zip(PASSES, (theme.second, theme.wheel[1]), ("solid", "dot"), strict=True)
        for line in drawing.line(key, colour, points=True, dash=dash)
    ]
    reward = drawing.line("reward", drawing.colour)
    if not reward and not passes:
        return None
    on = drawing.alerts.on("reward", *PASSES, "same_answer_share")
    return reward_and_pass(theme, reward, passes, alerts=on, height=FIRST_HEIGHT)


def _section(drawing: Drawing, heading: str) -> Section:
    """The charts for which the run has recorded something; of series that never move, or equal another, one line."""
    charts, quiet = dict[str, Packed](), list[str]()
    for chart in SECTIONS[heading]:
        keys, told = _moving(drawing, chart)
        quiet += told
        if keys:
            charts[keys[0]] = packed(drawing.over_steps(_series_chart(drawing, chart, keys)), split=True)
    over_steps = frozenset(charts)
    law = _law(drawing) if heading == "Where the entropy goes" else None
    if law is not None:
        charts["law"] = packed(law)
    return Section(charts, over_steps, drawing.newest, "; ".join(quiet))


def _moving(drawing: Drawing, chart: Chart) -> tuple[list[str], list[str]]:
    """(the recorded keys of a chart that are worth a line, what is to be said of the others)."""
    drawn, told = list[str](), list[str]()
    values = {key: data.followed(drawing.name).series(key)[1] for key in chart.keys}
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


def _series_chart(drawing: Drawing, chart: Chart, keys: Sequence[str]) -> go.Figure:
    names = {key: label(key)[0] for key in keys}
    kinds = {name.rpartition(", ")[0] for name in names.values()}
    if chart.title and len(kinds) == 1 and "" not in kinds:  # "pass@1, heldout" under the title "pass@1 by split"
        names = {key: name.rpartition(", ")[2] for key, name in names.items()}
    drawn = [
        line
        for key, colour in zip(keys, drawing.colours, strict=False)
        for line in drawing.line(key, colour, name=names[key], points=key.startswith(("eval/", "probe_")))
    ]
    title, alerts = chart.title or _joined(keys), drawing.alerts.on(*keys)
    log = chart.log or (chart.by_factors and drawing.view.log)
    return lines(drawing.theme, keys[0], drawn, title=title, alerts=alerts, log=log, height=HEIGHT)


def _law(drawing: Drawing) -> go.Figure | None:
    """Reward against entropy, with the law fitted to the steps; without it where an action or a control broke it."""
    (steps, entropy), (seen, reward) = (data.followed(drawing.name).series(key) for key in ("entropy", "reward"))
    both, at, of = np.intersect1d(steps, seen, return_indices=True)
    if len(both) < 10:
        return None
    return entropy_against_reward(
        drawing.theme, both, entropy[at], reward[of], drawing.colour, law=not _disturbed(drawing), height=HEIGHT
    )


def _disturbed(drawing: Drawing) -> bool:
    """Whether an action or a moving entropy control changed what the entropy does."""
    controls = (data.followed(drawing.name).series(key)[1] for key in ("entropy_coef", "budget_share", "temperature"))
    return bool(n_rows(drawing.alerts.actions)) or any(len(values) > 1 and not is_flat(values) for values in controls)


def _joined(keys: Sequence[str]) -> str:
    """'Clipped low, clipped high'; KL and the like keep their capitals."""
    first, *rest = (label(key)[0] for key in keys)
    return ", ".join([first, *(text if text[1:2].isupper() else text[0].lower() + text[1:] for text in rest)])


def _distributions(drawing: Drawing) -> Section:
    """How entropy and deviation of single tokens are distributed: over all steps, at two of them, and together."""
    theme, name = drawing.theme, drawing.name
    every, selected, deviation = (
        data.counts_of(name, metric, split)
        for metric, split in (("entropy", "all"), ("entropy", "selected"), ("deviation", "all"))
    )
    over_steps = {
        f"{key}-map": drawing.over_steps(
            distributions.histogram_map(theme, pooled(rows, COLUMNS, whole=True), key, height=HEIGHT)
        )
        for key, rows in (("entropy", every), ("deviation", deviation))
        if n_rows(rows)
    }
    others = dict[str, go.Figure]()
    if n_rows(every) > 1:
        pinned = shared.pinned_step(name)
        at = 0 if pinned is None else max(0, int(np.searchsorted(every["step"], pinned, side="right")) - 1)
        one, newest = (select(every, every["step"] == every["step"][i]) for i in (at, -1))
        others["two-steps"] = distributions.step_against_step(theme, one, newest, height=HEIGHT)
    late, late_selected = (
        select(rows, rows["step"] > rows["step"].max(initial=0) - LATE) for rows in (every, selected)
    )
    if n_rows(late_selected) and late["counts"].sum() != late_selected["counts"].sum():
        accent = drawing.colour if drawing.colour != theme.uniform else theme.accent
        others["selected"] = distributions.selected_against_all(theme, late, late_selected, accent, height=HEIGHT)
    counts = data.joint(name, LATE)
    if counts.size:
        others["joint"] = distributions.joint_map(theme, counts, height=HEIGHT)
    charts = {key: packed(fig) for key, fig in (over_steps | others).items()}
    return Section(charts, frozenset(over_steps), drawing.newest)


def _others(drawing: Drawing) -> None:
    """Series that METRICS does not know, as the trainer called them: closed, and drawn only while it is open."""
    names = [key for key in data.followed(drawing.name).keys if not is_known(key)]
    if not names:
        return
    with st.expander(markdown("{} ({})", OTHERS, len(names)), key=f"others-{drawing.name}", on_change="rerun") as box:
        if not box.open:
            return
        chosen = st.multiselect(
            "Series", names, names[:MOST_OTHERS], key=f"chosen-{drawing.name}", label_visibility="collapsed"
        )
        st.caption("As the trainer or tracker called them. No rule judges them.")
        _show(drawing, OTHERS, partial(_chosen_series, drawing, chosen), chosen)


def _chosen_series(drawing: Drawing, chosen: Sequence[str]) -> Section:
    charts = {
        key: packed(drawing.over_steps(_series_chart(drawing, Chart((key,), key), [key])), split=True) for key in chosen
    }
    return Section(charts, frozenset(charts), drawing.newest)


def _events(entry: RunEntry) -> None:
    happened = data.events(entry.name)
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
