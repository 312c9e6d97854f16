"""Method: how a run's weighting works on its tokens. Each chart has two sentences on how to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import streamlit as st

from dashboard import data
from dashboard.escape import markdown
from dashboard.figures import method
from dashboard.figures.distributions import selected_against_all
from dashboard.figures.lines import Line, lines
from dashboard.figures.theme import Theme, arm_colours, label
from dashboard.views import shared
from monitor.queries.frames import Frame, n_rows, select
from monitor.store.tail import RunEntry

LATE = 20  # newest steps that a distribution pools
REGIMES = ("regime_h_share", "regime_h_share_selected", "regime_h_share_positive", "regime_h_share_negative")


def page() -> None:
    shared.title("Method")
    with st.container(horizontal=True, vertical_alignment="center"):
        entry = shared.pick_run(label_visibility="collapsed", width=320)
        if entry is None:
            return
        shared.status_badge(entry)
        st.caption(markdown("{}", shared.describe(entry)), width="stretch")
    shared.what_now(entry)
    theme = shared.theme()
    kind = str(entry.info.get("weighting", "uniform"))
    colour = arm_colours([kind], theme)[kind] if kind != "uniform" else theme.accent
    drawn = [_panel(entry, make, theme, colour) for make in (_elbow, _selected, _regimes, _change, _along_the_response)]
    if not any(drawn):
        st.info(
            "This run recorded no deviations, no regimes and no probe yet. They come with the steps of a run whose "
            "logits are seen: of `rlvr train`, of an attached TRL trainer, or of your own loop.",
            icon=":material/function:",
        )
    st.caption("docs/method.md has every formula with its source.")


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart, its heading, what it shows, and what that means."""

    key: str
    figure: go.Figure
    heading: str
    shows: str
    means: str


def _panel(entry: RunEntry, make: Callable[..., Panel | None], theme: Theme, colour: str) -> bool:
    """A chart with its explanation beside it; False where the run has nothing for it."""
    found = make(entry, theme, colour)
    if found is None:
        return False
    left, right = st.columns([3, 2], gap="large", vertical_alignment="center")
    with left:
        group = "steps" if found.key == "regimes" else ""
        shared.chart(found.figure, f"method-{found.key}-{entry.name}", group=group, run=entry.name)
    with right:
        st.markdown(markdown("**{}** {}  \n{}", found.heading, found.shows, found.means))
        if found.key == "selected":
            where = {"run": entry.name, "view": "selected"}
            shared.link("tokens", "Which tokens it selects", where, ":material/article:")
    return True


def _late(name: str, metric: str, split: str = "all") -> Frame:
    rows = data.counts_of(name, metric, split)
    return select(rows, rows["step"] > rows["step"].max(initial=0) - LATE)


def _elbow(entry: RunEntry, theme: Theme, colour: str) -> Panel | None:
    late = _late(entry.name, "deviation")
    if not n_rows(late) or not late["counts"].sum():
        return None
    selected = data.followed(entry.name).series("selected_share")[1][-LATE:]
    kept = float(np.mean(selected)) if len(selected) else float("nan")
    return Panel(
        "elbow",
        method.elbow(theme, late["counts"].sum(0), kept, colour),
        "How unequal the deviations are.",
        "The tokens of the newest steps stand from the most deviating one on; the "
        "dotted curve adds up how much of all deviation they hold.",
        "Where the curve bends, its elbow, further "
        "tokens add little: a weighting by deviation should keep the tokens up to there. The dashed line is what this "
        "run keeps.",
    )


def _selected(entry: RunEntry, theme: Theme, colour: str) -> Panel | None:
    every, selected = _late(entry.name, "entropy"), _late(entry.name, "entropy", "selected")
    if not n_rows(selected) or every["counts"].sum() == selected["counts"].sum():
        return None
    return Panel(
        "selected",
        selected_against_all(theme, every, selected, colour),
        "What gets selected.",
        "The share of tokens in each cell of entropy, of all tokens and of those with a weight above 0.",
        "Where the coloured area stands above the grey one the weighting prefers tokens of that entropy; a "
        "peak at the left means that it picks tokens that are decided, whose update cannot explore.",
    )


def _regimes(entry: RunEntry, theme: Theme, colour: str) -> Panel | None:
    colours = (theme.uniform, colour, theme.wheel[1], theme.second)
    drawn = [
        Line(label(key)[0].removeprefix("Regime H, ").replace("Regime H", "all tokens"), *series, one)
        for key, one in zip(REGIMES, colours, strict=True)
        if len((series := data.followed(entry.name).series(key))[0])
    ]
    if not drawn:
        return None
    return Panel(
        "regimes",
        lines(theme, REGIMES[0], drawn, title="Tokens in regime H", height=300),
        "Which updates lower the entropy.",
        "A token in regime H has a probability above the sum of all squared "
        "probabilities: raising it lowers the entropy H2, and lowering it raises H2.",
        "Entropy falls fast where "
        "tokens with a positive advantage are mostly in regime H and those with a negative one are not. The selected "
        "ones should lie nearer to one half.",
    )


def _change(entry: RunEntry, theme: Theme, colour: str) -> Panel | None:
    (steps, predicted), (seen, true) = (
        data.followed(entry.name).series(key) for key in ("probe_predicted_change", "probe_true_change")
    )
    both, at, of = np.intersect1d(steps, seen, return_indices=True)
    finite = np.isfinite(predicted[at]) & np.isfinite(true[of])
    if finite.sum() < 3:
        return None
    return Panel(
        "change",
        method.predicted_against_true(theme, both[finite], predicted[at][finite], true[of][finite], colour),
        "Does the theory hold here?",
        "The change of H2 that the first order predicts from the change of the logits, against the true one.",
        "Points on the line mean that what is said of regimes and flows can be believed for "
        "this run. A cloud off the line means steps too large for a first order: lower the learning rate before you "
        "trust them.",
    )


def _along_the_response(entry: RunEntry, theme: Theme, colour: str) -> Panel | None:
    steps = data.token_steps(entry.name)
    profile = data.profile(entry.name, int(steps[-1])) if len(steps) else {}
    if not n_rows(profile):
        return None
    return Panel(
        "along",
        method.along_response(theme, profile, int(steps[-1]), colour),
        "Where in the response.",
        "Mean entropy in each tenth of the responses of the newest step with raw tokens, "
        "apart for correct and incorrect ones.",
        "High entropy early means that the policy still chooses its way. High "
        "entropy late in incorrect responses alone means that it got lost there.",
    )
