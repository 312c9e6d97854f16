"""Run: what is to be said of one run, then its curves from the reward down to the gradient, with their alerts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import streamlit as st

from dashboard import data
from dashboard.escape import markdown
from dashboard.figures import distributions
from dashboard.figures.lines import Line, lines, reward_and_pass
from dashboard.figures.marks import add_actions
from dashboard.figures.theme import Theme, arm_colours, label
from dashboard.views import shared, verdict
from monitor.alerts import RULES
from monitor.queries.frames import Frame, n_rows, select
from monitor.queries.series import series_of, value_at
from monitor.store.tail import RunEntry

PASSES = ("eval/heldout/pass@1", "eval/heldout/pass@4")
SMALL = (  # the small charts: keys drawn in one chart, its title (none: made from the keys), log axis
    (("kl", "log_ratio_abs"), "", False),
    (("response_length",), "", False),
    (("clip_share_low", "clip_share_high"), "", False),
    (("grad_norm",), "", True),
    (("zero_variance_share", "truncated_share"), "", False),
    (("selected_share", "selected_decided_share", "decided_share"), "Selected and decided tokens", False),
)
DIAGNOSTICS = (
    (("regime_h_share", "regime_h_share_selected"), "Regime H: p > sum p²", False),
    (("predicted_entropy_change", "predicted_entropy_change_weighted"), "Predicted entropy change", False),
    (("probe_predicted_change", "probe_true_change"), "Change of H2: predicted and true", False),
    (("sampler_mismatch_k3",), "", False),
)
WHAT_NOW = {  # shared.no_steps -> what a reader can do
    "no steps yet": "They appear here by themselves as soon as the first one is written.",
    "no steps": "It ended before the first one was written.",
    "no steps that can be read": "Their files are damaged: rlvr store check names them.",
}
HEADLINE = ("reward", "correct_share", "eval/heldout/pass@1", "entropy", "renyi2", "deviation", "perf/step_s")


def page() -> None:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        entry = shared.pick_run()
        if entry is None:
            return
        log = (
            shared.choose(st.segmented_control, "Entropy axis", "axis", ("linear", "log"), "linear", required=True)
            == "log"
        )
    _header(entry)
    if not len(data.sample_steps(entry.name)) and not data.scalar_names([entry.name]):
        st.info(
            markdown("This run has {}. {}", shared.no_steps(entry), WHAT_NOW[shared.no_steps(entry)]),
            icon=":material/hourglass_empty:",
        )
        return
    recorded = frozenset(data.scalar_names([entry.name]))
    alerts = RunAlerts(data.transitions(entry.name), data.actions(entry.name), recorded)
    _learning(entry, alerts)
    _distributions(entry, alerts, log)
    _selection(entry)
    _small_charts(entry, alerts, SMALL)
    _small_charts(entry, alerts, DIAGNOSTICS, "Diagnostics")
    _events(entry)


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
        charts = {"reward", *PASSES, *(key for of, _, _ in (*SMALL, *DIAGNOSTICS) for key in of)} & self.recorded
        watched = [RULES[rule].watches if rule in RULES else "" for rule in self.alerts["rule"]]
        return select(self.alerts, np.array([(key if key in charts else "entropy") in keys for key in watched], bool))


def _chart(fig: go.Figure, key: str, alerts: RunAlerts) -> None:
    shared.chart(add_actions(fig, alerts.actions, shared.theme()), key, pick=True)


def _colour(entry: RunEntry, theme: Theme) -> str:
    kind = str(entry.info.get("weighting", "uniform"))
    return arm_colours([kind], theme)[kind]


def _header(entry: RunEntry) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        shared.status_badge(entry)
        st.caption(markdown("{}", shared.describe(entry)), width="content")
    latest = data.latest([entry.name])
    found = verdict.verdict_of(data.verdicts([entry.name]), entry.name)
    if found is not None:
        verdict.banner(found, float(np.max(latest["step"], initial=0)))
    if n_rows(latest):
        verdict.alert_list(data.transitions(entry.name), data.marks(entry.name))
    picked = st.session_state.get("picked_step")
    if picked is not None:
        shared.link(
            "tokens",
            markdown("Step {} picked: read its tokens", picked),
            {"run": entry.name, "step": str(picked)},
            ":material/article:",
        )
    with st.container(horizontal=True, gap="medium"):
        for key in HEADLINE:
            name, unit, help_text = label(key)
            value = value_at(latest, entry.name, key)
            if np.isfinite(value):
                text = shared.number(value, unit)
                told = f"{text} {unit}" if unit not in ("", "share") else text
                st.metric(markdown("{}", name), told, help=markdown("{}", help_text), width="content")


def _series(entry: RunEntry, key: str, colour: str, rows: Frame, **style: object) -> Line:
    steps, values = series_of(rows, entry.name, key)
    return Line(label(key)[0], steps, values, colour, **style)  # type: ignore[arg-type]


def _learning(entry: RunEntry, alerts: RunAlerts) -> None:
    theme = shared.theme()
    rows = data.scalars([entry.name], ("reward", *PASSES, "correct_share"))
    reward = _series(entry, "reward", _colour(entry, theme), rows)
    passes = {
        key: _series(entry, key, colour, rows, points=True, dash=dash)
        for key, colour, dash in zip(PASSES, (theme.second, theme.wheel[1]), ("solid", "dot"), strict=True)
        if len(series_of(rows, entry.name, key)[0])
    }
    _chart(reward_and_pass(theme, reward, passes, alerts=alerts.on("reward", *PASSES)), f"reward-{entry.name}", alerts)


def _distributions(entry: RunEntry, alerts: RunAlerts, log: bool) -> None:
    theme, name = shared.theme(), entry.name
    colour = _colour(entry, theme)
    rows = data.scalars([name], ("entropy", "renyi2", "entropy_selected"))
    fan = data.fan(name)
    left, right = st.columns(2)
    with left:
        drawn = [
            Line(text, *series_of(rows, name, key), line_colour, dash=dash)
            for key, text, line_colour, dash in (
                ("entropy", "mean H1", colour, "solid"),
                ("renyi2", "mean H2 (Renyi-2)", theme.second, "solid"),
                ("entropy_selected", "mean H1, selected", theme.wheel[1], "dot"),
            )
        ]
        means = lines(
            theme,
            "entropy",
            [line for line in drawn if len(line.x)],
            title="Mean entropy",
            alerts=alerts.on("entropy"),
            log=log,
            height=320,
            zero=True,
        )
        _chart(means, f"entropy-{name}", alerts)
    with right:
        if len(fan["step"]):
            renyi2 = series_of(rows, name, "renyi2")
            _chart(
                distributions.entropy_fan(theme, fan, renyi2, colour, alerts=alerts.on("entropy"), log=log, height=320),
                f"fan-{name}",
                alerts,
            )
    matrix = data.counts(name, "deviation")
    if len(matrix["step"]):
        shared.chart(distributions.histogram_map(theme, matrix, "deviation"), f"deviation-{name}", pick=True)


def _selection(entry: RunEntry) -> None:
    """Which tokens the weighting picks, and which entropy the deviating tokens have, over the newest steps."""
    theme, name = shared.theme(), entry.name
    colour = _colour(entry, theme)
    left, right = st.columns(2)
    with left:
        every, selected = (data.newest_counts(name, "entropy", split) for split in ("all", "selected"))
        if len(every["step"]):
            accent = colour if colour != theme.uniform else theme.accent
            fig = distributions.selected_against_all(theme, every, selected, accent)
            shared.chart(fig, f"selected-{name}", group="")
    with right:
        counts = data.joint(name)
        if counts.size:
            shared.chart(distributions.joint_map(theme, counts), f"joint-{name}", group="")


def _small_charts(
    entry: RunEntry, alerts: RunAlerts, charts: Sequence[tuple[tuple[str, ...], str, bool]], heading: str = ""
) -> None:
    """The charts for which the run has recorded something, in two columns."""
    theme = shared.theme()
    rows = data.scalars([entry.name], tuple(key for keys, _, _ in charts for key in keys))
    recorded = set(rows["name"])
    shown = [(tuple(k for k in keys if k in recorded), title, log) for keys, title, log in charts]
    shown = [chart for chart in shown if chart[0]]
    if heading and shown:
        shared.small_heading(heading)
    columns = st.columns(2)
    for i, (keys, title, log) in enumerate(shown):
        colours = (_colour(entry, theme), theme.second, theme.wheel[1])
        drawn = [
            _series(entry, key, colour, rows, points=key.startswith("probe_"))  # values of some steps only
            for key, colour in zip(keys, colours, strict=False)
        ]
        with columns[i % 2]:
            fig = lines(theme, keys[0], drawn, title=title or _joined(keys), alerts=alerts.on(*keys), log=log)
            _chart(fig, f"{keys[0]}-{entry.name}", alerts)


def _joined(keys: tuple[str, ...]) -> str:
    """'Clipped low, clipped high'; KL and the like keep their capitals."""
    first, *rest = (label(key)[0] for key in keys)
    return ", ".join([first, *(text if text[1:2].isupper() else text[0].lower() + text[1:] for text in rest)])


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
