"""Compare: any number of arms against a baseline. The answer first, then curves, distributions, figures, options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from dashboard import data
from dashboard.components.chart import Packed, packed
from dashboard.escape import markdown
from dashboard.figures import distributions
from dashboard.figures.lines import Line, arm_lines, is_flat, lines, pass_against_distinct, seed_band, smoothed
from dashboard.figures.spent import STEP, spent_axis
from dashboard.figures.theme import Theme, arm_colours
from dashboard.shown_arms import Arm, default_arms, doubts, figures_table
from dashboard.views import downloads, shared
from monitor.queries.differences import config_difference
from monitor.queries.followed import thinned
from monitor.stats.comparison_verdict import headline
from monitor.store.tail import RunEntry

CURVES = (
    "reward",
    "eval/heldout/pass@1",
    "eval/heldout/pass@4",
    "eval/heldout/distinct",
    "entropy",
    "renyi2",
    "kl",
    "response_length",
    "weight_mean",
    "grad_norm",
)
FIGURES = (
    "reward",
    "eval/heldout/pass@1",
    "eval/heldout/pass@4",
    "eval/heldout/distinct",
    "eval/ood/pass@1",
    "eval/ood/pass@4",
    "eval/multipath/distinct",
    "entropy",
    "renyi2",
    "response_length",
    "weight_mean",
    "perf/step_s",
)
POINTS = 400  # most points of a line: more than such a chart has pixels for
NAMES = ("run", "seed", "save", "comparison", "store")  # options that differ from run to run and change nothing
ARMS = "abcdefghijklmnop"  # parameters of the URL, the baseline first
PASS, DISTINCT = "eval/heldout/pass@1", "eval/heldout/distinct"


def page() -> None:
    shared.title("Compare")
    top = st.container()  # above the pickers, which say what it is about
    pickers, tools = st.container(), st.container(horizontal=True, vertical_alignment="bottom")
    with pickers:
        arms = _pick_arms(tools)
    if arms is None:
        return
    with top:
        _verdicts(arms)
    theme = shared.theme()
    colours = arm_colours([arm.name for arm in arms], theme)
    with tools:
        axis = shared.choose_axis()
        smoothing = shared.choose_smoothing()
    with shared.grid("curves"):
        _curves(arms, colours, theme, axis, smoothing)
    distributions_too = shared.grid("difference")
    _tables(arms)
    downloads.comparison(arms)
    with distributions_too:  # last, because it reads the histograms of all runs
        _pass_and_distinct(arms, colours, theme)
        _difference(arms, theme)


def _pick_arms(tools: DeltaGenerator) -> tuple[Arm, ...] | None:
    """The arms of the URL, its parameters a (the baseline), b, c ...; without any those of the newest comparison."""
    entries = data.runs()
    if len(entries) < 2:
        st.info(
            "A comparison needs two runs. Record a second one with the same seed and another weighting, e.g. "
            "`rlvr compare` or `rlvr demo`.",
            icon=":material/compare_arrows:",
        )
        return None
    names = [entry.name for entry in entries]
    asked = {key: _asked(key) for key in ARMS if key in st.query_params}
    for wanted in (name for runs in asked.values() for name in runs if name not in names):
        shared.unknown_run(wanted, names)
        return None
    if not asked:
        asked = {key: list(arm.runs) for key, arm in zip(ARMS, default_arms(entries), strict=False)}
    chosen = _chips(asked, names, tools)
    if len(chosen) < 2 or not chosen[0]:
        st.info("Choose a baseline and at least one run to compare with it.", icon=":material/compare_arrows:")
        return None
    arms = [Arm(_arm_name(entries, runs), tuple(runs)) for runs in chosen]
    taken = [arm.name for arm in arms]
    return tuple(arm if taken.count(arm.name) == 1 else Arm(", ".join(arm.runs), arm.runs) for arm in arms)


def _asked(key: str) -> list[str]:
    return [name for name in st.query_params.get(key, "").split(",") if name]


def _chips(asked: dict[str, list[str]], names: Sequence[str], tools: DeltaGenerator) -> list[list[str]]:
    """A picker of runs for each arm, and a button for a further one; returns the runs of the arms that have any."""
    free = next((key for key in ARMS[1:] if key not in asked), "")
    if st.session_state.pop("arm_more", False) and free:
        asked[free] = []
    with shared.grid("arms"):
        for key, runs in asked.items():
            st.session_state[f"arm_{key}"] = runs
            shared.set_parameter(key, ",".join(runs))
            text = "Baseline" if key == ARMS[0] else "Compared with it"
            st.multiselect(text, names, key=f"arm_{key}", on_change=_remember, args=(key,))
    if all(asked.values()) and free:
        tools.button("Add an arm", icon=":material/add:", on_click=_more)
    return [
        asked.get(ARMS[0], []),
        *(runs for key, runs in asked.items() if key != ARMS[0] and runs),
    ]


def _remember(key: str) -> None:
    runs = st.session_state[f"arm_{key}"]
    if runs or key in ARMS[:2]:
        st.query_params[key] = ",".join(runs)
    else:  # an arm that lost its last run is gone
        st.query_params.pop(key, None)


def _more() -> None:
    st.session_state["arm_more"] = True


def _verdicts(arms: Sequence[Arm]) -> None:
    """What each arm did against the baseline, in one sentence each, and what makes the comparison doubtful."""
    compared = data.comparison(arms, FIGURES)
    if compared is None:
        st.caption("One side has two runs of one seed, so the runs cannot be paired. Choose one run of each seed.")
        return
    entries = {run: entry for arm in arms for run in arm.runs if (entry := data.run(run))}
    training = sum(entry.status == "running" for entry in entries.values())
    for sentence in compared["verdicts"].values():
        st.info(markdown("**{}**{}", *headline(sentence)), icon=":material/balance:")
    so_far = f"{training} of {len(entries)} runs still train. " if training else ""
    st.caption(
        markdown(
            "{}Newest values, mean over pairs of equal seed; in brackets the 95 % interval of the difference, "
            "which is too narrow with few pairs. Distinct answers are those of a prompt's samples that are correct.",
            so_far,
        )
    )
    for doubt in doubts(arms, entries):
        st.caption(markdown(":material/warning: {}", doubt))


def _arm_name(entries: Sequence[RunEntry], runs: Sequence[str]) -> str:
    kinds = {str(entry.info.get("weighting", "")) for entry in entries if entry.name in runs}
    return kinds.pop() if len(kinds) == 1 else ", ".join(runs)


def _difference(arms: Sequence[Arm], theme: Theme) -> None:
    """The distribution of the entropy, one arm's minus the baseline's."""
    names = [arm.name for arm in arms[1:]]
    with st.container():
        chosen = names[0]
        if len(names) > 1:
            chosen = shared.choose(st.segmented_control, "Difference of", "gap", names, names[0], required=True)
        other = next(arm for arm in arms[1:] if arm.name == chosen)
        with st.spinner("Reading the histograms of these runs…"):
            gap = data.difference(arms[0].runs, other.runs)
        if len(gap["step"]):
            both = (arms[0].name, other.name)
            shared.chart(distributions.difference_map(theme, gap, "entropy", both), "difference")
        else:
            st.info("These runs have no step in common yet, so there is no difference of their entropies to show.")


def _curves(arms: Sequence[Arm], colours: dict[str, str], theme: Theme, axis: str, smoothing: int) -> None:
    runs = [run for arm in arms for run in arm.runs]
    charts = data.remembered_of(
        runs,
        "compared curves",
        (tuple(arms), theme.name, axis, smoothing),
        lambda: _curve_charts(arms, colours, theme, axis, smoothing),
    )
    for key, chart in charts.items():
        shared.chart(chart, f"compare-{key}-{axis}", group="steps" if axis == STEP else axis)


def _curve_charts(
    arms: Sequence[Arm], colours: dict[str, str], theme: Theme, axis: str, smoothing: int
) -> dict[str, Packed]:
    """The charts of the curves, by key. Lines have as many points as a chart can show; means are of all of them."""
    charts = dict[str, Packed]()
    followed = {run: data.followed(run) for arm in arms for run in arm.runs}
    recorded = {key for run in followed.values() for key in run.keys}
    for key in (key for key in CURVES if key in recorded):
        drawn = {
            arm.name: arm_lines(arm.name, key, {run: followed[run].series(key) for run in arm.runs}, colours[arm.name])
            for arm in arms
        }
        values = np.concatenate([line.y for part in drawn.values() for line in part])
        if is_flat(values):  # no run ever left the one value: the table says it
            continue
        shown_lines = [part for arm in arms for line in drawn[arm.name] for part in _over(line, arm, axis, smoothing)]
        fig = lines(theme, key, shown_lines, log=key == "grad_norm")
        for arm in arms:
            members = [line for line in drawn[arm.name] if line.faint]
            band = seed_band(theme, members, colours[arm.name]) if members else []
            for trace in band:
                trace.x = _spent(arm.runs, axis, np.asarray(trace.x))
            fig.add_traces(band)
        if axis != STEP:
            fig.layout.xaxis.update(spent_axis(axis))
        charts[key] = packed(fig)
    return charts


def _over(line: Line, arm: Arm, axis: str, smoothing: int) -> list[Line]:
    """A line over what its run, or the mean of its arm's runs, had spent at each step.

    An arm's own line is smoothed, with its values pale behind it; those of single seeds are pale, and stay as they are.
    """
    runs, found = (line.name,) if line.faint else arm.runs, list[Line]()
    for part in [line] if line.faint else smoothed(line, smoothing):
        steps, values = thinned((part.x, part.y), POINTS)
        found.append(replace(part, x=_spent(runs, axis, steps), y=values))
    return found


def _spent(runs: Sequence[str], axis: str, steps: np.ndarray) -> np.ndarray:
    return steps if axis == STEP else np.mean([data.spent(run, axis, steps) for run in runs], 0)


def _pass_and_distinct(arms: Sequence[Arm], colours: dict[str, str], theme: Theme) -> None:
    paths = []
    for arm in arms:
        for run in arm.runs:
            (steps, passed), (seen, distinct) = (data.followed(run).series(key) for key in (PASS, DISTINCT))
            both, at, of = np.intersect1d(steps, seen, return_indices=True)
            if len(both):
                name = arm.name if len(arm.runs) == 1 else run
                paths.append(Line(name, passed[at], distinct[of], colours[arm.name], group=arm.name))
    if paths:
        shared.chart(pass_against_distinct(theme, paths), "pass-distinct", group="")
    else:
        st.caption("No evaluation with distinct answers yet. The chart of pass@1 against them appears with the first.")


def _tables(arms: Sequence[Arm]) -> None:
    runs = [run for arm in arms for run in arm.runs]
    found = data.final_figures(runs, FIGURES)
    compared = data.comparison(arms, FIGURES)
    for which, title, note in (
        (
            "last",
            "Final figures",
            "each run's newest values, mean of an arm's runs; differences of pairs of equal seed",
        ),
        (
            "equal",
            "At equal pass@1",
            f"each run where its held-out pass@1, interpolated, first crosses {shared.number(found['level'], 'share')}",
        ),
    ):
        if found[which]:
            shared.small_heading(title, note)
            rows = compared["rows"] if compared else []
            paired = {(row["arm"], row["figure"]): row for row in rows if row["when"] == which}
            table = figures_table(arms, found[which], FIGURES, paired if compared and which == "last" else None)
            widths = {"figure": st.column_config.TextColumn(width=230)}
            st.dataframe(table, hide_index=True, height="content", column_config=widths)
    shared.small_heading("Configuration", "options that differ")
    configs = {run: dict(entry.info.get("config") or {}) for run in runs if (entry := data.run(run))}
    differing = {option: row for option, row in config_difference(configs).items() if option not in NAMES}
    if differing:
        columns = {arm.name: [_values(row, arm.runs) for row in differing.values()] for arm in arms}
        st.dataframe({"option": list(differing)} | columns, hide_index=True, height="content")
    else:
        st.caption("The runs' configurations are equal but for their names and seeds.")
    for told in data.partings(arms):
        st.caption(markdown("{}", told))


def _values(row: Mapping[str, Any], runs: Sequence[str]) -> str:
    """The values that an option has in the runs of an arm, each once."""
    return " or ".join(dict.fromkeys(str(row.get(run, "")) for run in runs))
