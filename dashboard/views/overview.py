"""Overview: every run of the store in one line, those that need somebody first; a click leads to the run."""

from __future__ import annotations

from typing import Any

import streamlit as st

from dashboard import data
from dashboard.components.runs_table import runs_base, runs_table
from dashboard.escape import markdown
from dashboard.figures.theme import arm_colours
from dashboard.overview_rows import SEVERITIES, compare_sides
from dashboard.views import shared, verdict


def page() -> None:
    rows = data.overview_rows()
    _summary(rows)
    options = data.group_options()
    asked = st.session_state.get("runs", {}).get("group")
    group = st.query_params.get("group", "") if asked is None else asked
    group = group if group in options else ""
    sent = data.overview_sent(rows, group)
    runs_base(sent)
    colours = arm_colours([row["weighting"] for row in rows.values()], shared.theme())
    wanted = runs_table(sent, group=group, keys=options, colours=colours, theme=shared.theme())
    if wanted.run in rows:
        st.switch_page(shared.PAGES["run"], query_params={"run": wanted.run})
    if wanted.compare:
        _compare([str(run) for run in wanted.compare if run in rows])


def _summary(rows: dict[str, dict[str, Any]]) -> None:
    """How many runs there are and how they fare, over the table."""
    with st.container(horizontal=True, vertical_alignment="center"):
        running = sum(row["status"] == "running" for row in rows.values())
        st.markdown(markdown("### {} runs", len(rows)) if len(rows) != 1 else "### 1 run", width="content")
        st.caption(markdown("{} running · {}", running, data.store_path().name), width="content")
        for place, health in enumerate(SEVERITIES[:2]):
            count = sum(row["firing"][place] > 0 and not any(row["firing"][:place]) for row in rows.values())
            if count:
                colour, icon = verdict.HEALTH[health]
                st.badge(markdown("{} {}", count, health), color=colour, icon=icon)


def _compare(runs: list[str]) -> None:
    """To the Compare page with two weightings of the ticked runs; what does not fit is told there."""
    base, others, left = compare_sides([entry for run in runs if (entry := data.run(run))])
    if left:
        st.toast(
            markdown("Compare sets two weightings against each other; left out: {}.", ", ".join(left)),
            icon=":material/compare_arrows:",
        )
    st.switch_page(shared.PAGES["compare"], query_params={"a": ",".join(base), "b": ",".join(others)})
