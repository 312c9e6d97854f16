"""Compare: uniform and weighted runs. Curves in one chart, the difference of their distributions, final figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import streamlit as st

from dashboard import data
from dashboard.escape import markdown
from dashboard.figures import distributions
from dashboard.figures.lines import Line, arm_lines, is_flat, lines, pass_against_distinct, seed_band
from dashboard.figures.theme import Theme, arm_colours
from dashboard.shown_arms import Arm, default_arms, figures_table, partner_arms
from dashboard.views import shared
from monitor.queries.differences import config_difference
from monitor.queries.series import series_of
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
)
NAMES = ("run", "seed", "save", "comparison", "store")  # options that differ from run to run and change nothing
PASS, DISTINCT = "eval/heldout/pass@1", "eval/heldout/distinct"


def page() -> None:
    shared.title("Compare")
    top = st.container()  # above the pickers, which say what it is about
    arms = _pick_arms()
    if arms is None:
        return
    with top:
        _verdict(arms)
        _other_pairs(arms)
    theme = shared.theme()
    colours = arm_colours([arm.name for arm in arms], theme)
    if colours[arms[0].name] == colours[arms[1].name]:  # two arms of one kind: the first is the grey reference
        colours = {arms[0].name: theme.uniform, arms[1].name: theme.accent}
    with shared.grid("curves"):
        _curves(arms, colours, theme)
    with shared.grid("difference"):
        gap = data.difference(arms[0].runs, arms[1].runs)
        if len(gap["step"]):
            names = (arms[0].name, arms[1].name)
            shared.chart(distributions.difference_map(theme, gap, "entropy", names), "difference")
        else:
            st.info("These runs have no step in common yet, so there is no difference of their entropies to show.")
        _pass_and_distinct(arms, colours, theme)
    _tables(arms)


def _pick_arms() -> tuple[Arm, Arm] | None:
    entries = data.runs()
    if len(entries) < 2:
        st.info(
            "A comparison needs two runs. Record a second one with the same seed and another weighting, e.g. "
            "`rlvr compare` or `rlvr demo`.",
            icon=":material/compare_arrows:",
        )
        return None
    base, other = default_arms(entries)
    names = [entry.name for entry in entries]
    for wanted in (n for key in ("a", "b") for n in st.query_params.get(key, "").split(",") if n and n not in names):
        shared.unknown_run(wanted, names)
        return None
    left, right = st.columns(2)
    chosen = [
        _multiselect(left, "Baseline", "a", names, base.runs),
        _multiselect(right, "Compared with it", "b", names, other.runs),
    ]
    if not all(chosen):
        st.info("Choose at least one run on each side.", icon=":material/compare_arrows:")
        return None
    first, second = (Arm(_arm_name(entries, runs), tuple(runs)) for runs in chosen)
    if first.name == second.name:
        first, second = (Arm(", ".join(arm.runs), arm.runs) for arm in (first, second))
    return first, second


def _verdict(arms: tuple[Arm, Arm]) -> None:
    """What the chosen runs show, in one sentence."""
    sentence = data.comparison_verdict(*arms)
    if sentence is None:
        st.caption("One side has two runs of one seed, so the runs cannot be paired. Choose one run of each seed.")
        return
    entries = [entry for arm in arms for run in arm.runs if (entry := data.run(run))]
    training = sum(entry.status == "running" for entry in entries)
    st.info(markdown("**{}**{}", *headline(sentence)), icon=":material/balance:")
    so_far = f"{training} of {len(entries)} runs still train. " if training else ""
    st.caption(
        markdown(
            "{}Newest values, mean over pairs of equal seed; in brackets the 95 % interval of the difference, "
            "which is too narrow with few pairs. Distinct answers are those of a prompt's samples that are correct.",
            so_far,
        )
    )


def _other_pairs(arms: tuple[Arm, Arm]) -> None:
    """Links to the other weightings of the same comparison, each against uniform."""
    first = data.run(arms[0].runs[0])
    others = [pair for pair in partner_arms(first, data.runs()) if pair[1].name != arms[1].name] if first else []
    if others and first and first.info.get("weighting") == "uniform":
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.caption("Also of this comparison:", width="content")
            for pair in others:
                where = {key: ",".join(arm.runs) for key, arm in zip("ab", pair, strict=True)}
                shared.link("compare", markdown("{}", pair[1].name), where)


def _multiselect(column, text: str, key: str, names: Sequence[str], default: Sequence[str]) -> list[str]:
    asked = [name for name in st.query_params.get(key, "").split(",") if name]
    state = f"arm_{key}"
    st.session_state[state] = asked if key in st.query_params else list(default)
    st.query_params[key] = ",".join(st.session_state[state])

    def remember() -> None:
        st.query_params[key] = ",".join(st.session_state[state])

    return column.multiselect(text, names, key=state, on_change=remember)


def _arm_name(entries: Sequence[RunEntry], runs: Sequence[str]) -> str:
    kinds = {str(entry.info.get("weighting", "")) for entry in entries if entry.name in runs}
    return kinds.pop() if len(kinds) == 1 else ", ".join(runs)


def _curves(arms: tuple[Arm, Arm], colours: dict[str, str], theme: Theme) -> None:
    runs = [run for arm in arms for run in arm.runs]
    rows = data.scalars(runs, CURVES)
    shown = [key for key in CURVES if key in set(rows["name"])]
    for key in shown:
        drawn = {arm.name: arm_lines(arm.name, arm.runs, key, rows, colours[arm.name]) for arm in arms}
        values = np.concatenate([line.y for part in drawn.values() for line in part])
        if is_flat(values):  # no run ever left the one value: the table says it
            continue
        fig = lines(theme, key, [line for part in drawn.values() for line in part], log=key == "grad_norm")
        for name, part in drawn.items():
            members = [line for line in part if line.faint]
            fig.add_traces(seed_band(theme, members, colours[name]) if members else [])
        shared.chart(fig, f"compare-{key}")


def _pass_and_distinct(arms: tuple[Arm, Arm], colours: dict[str, str], theme: Theme) -> None:
    runs = [run for arm in arms for run in arm.runs]
    rows = data.scalars(runs, (PASS, DISTINCT))
    paths = []
    for arm in arms:
        for run in arm.runs:
            (steps, passed), (seen, distinct) = series_of(rows, run, PASS), series_of(rows, run, DISTINCT)
            both, at, of = np.intersect1d(steps, seen, return_indices=True)
            if len(both):
                name = arm.name if len(arm.runs) == 1 else run
                paths.append(Line(name, passed[at], distinct[of], colours[arm.name], group=arm.name))
    if paths:
        shared.chart(pass_against_distinct(theme, paths), "pass-distinct", group="")
    else:
        st.caption("No evaluation with distinct answers yet. The chart of pass@1 against them appears with the first.")


def _tables(arms: tuple[Arm, Arm]) -> None:
    runs = [run for arm in arms for run in arm.runs]
    found = data.final_figures(runs, FIGURES)
    compared = data.comparison(*arms, FIGURES)
    for which, title, note in (
        ("last", "Final figures", "each run's newest values; mean of an arm's runs"),
        (
            "equal",
            "At equal pass@1",
            f"each run where its held-out pass@1, interpolated, first crosses {shared.number(found['level'], 'share')}",
        ),
    ):
        if found[which]:
            shared.small_heading(title, note)
            rows = compared["rows"] if compared else []
            paired = {row["figure"]: row for row in rows if row["when"] == which and row["arm"] == arms[1].name}
            table = figures_table(arms, found[which], FIGURES, paired if compared and which == "last" else None)
            widths = {"figure": st.column_config.TextColumn(width=230)}
            st.dataframe(table, hide_index=True, height="content", column_config=widths)
    shared.small_heading("Configuration", "options that differ")
    configs = {run: dict(entry.info.get("config") or {}) for run in runs if (entry := data.run(run))}
    differing = {option: row for option, row in config_difference(configs).items() if option not in NAMES}
    if differing:
        columns = {"option": list(differing)} | {run: [str(row[run]) for row in differing.values()] for run in runs}
        st.dataframe(columns, hide_index=True, height="content")
    else:
        st.caption("The runs' configurations are equal but for their names and seeds.")
