"""Files to save from a page: series as CSV, neither smoothed nor thinned, and a comparison as an HTML report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import streamlit as st

from dashboard import data
from dashboard.escape import markdown
from dashboard.report import CURVES, page
from dashboard.shown_arms import Arm
from monitor.store.tail import RunEntry


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV with a header; lists and objects are written as JSON, as `rlvr sql --format csv` does."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([json.dumps(value) if isinstance(value, list | dict) else value for value in row])
    return file.getvalue()


def run(entry: RunEntry) -> None:
    """Every series of a run, a row for each step."""
    _offer("all series as CSV", f"{entry.name}.csv", "text/csv", entry.name, lambda: run_csv(entry.name))
    st.caption("Each chart has buttons in its upper right corner that save it as PNG or SVG.")
    st.caption("`rlvr sql` gives everything else that the store has.")


def run_csv(name: str) -> str:
    """step and every series of the run; an empty cell where a step has no value."""
    series = _series(name)
    steps = np.unique(np.concatenate([at for at, _ in series.values()])) if series else np.empty(0, np.int64)
    columns = list[list[str]]()
    for at, values in series.values():
        cells = np.full(len(steps), "", object)
        cells[np.searchsorted(steps, at)] = values
        columns.append(cells.tolist())
    return csv_text(["step", *series], zip(steps.tolist(), *columns, strict=True))


def _series(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    followed = data.followed(name)
    return {key: followed.series(key) for key in sorted(followed.keys)}


def comparison(arms: Sequence[Arm]) -> None:
    """The curves of all arms in one table, and the report of `rlvr report`."""
    with st.expander("Download", icon=":material/download:"):
        _offer("curves as CSV", "comparison.csv", "text/csv", tuple(arms), lambda: comparison_csv(arms))
        if data.can_pair(arms):
            _offer("report as HTML", "comparison.html", "text/html", tuple(arms), lambda: report_html(arms))
        st.caption("Each chart has buttons in its upper right corner that save it as PNG or SVG.")


def comparison_csv(arms: Sequence[Arm]) -> str:
    """arm, run, step, name, value of every series of every arm."""
    rows = (
        (arm.name, run, step, key, value)
        for arm in arms
        for run in arm.runs
        for key, (steps, values) in _series(run).items()
        for step, value in zip(steps.tolist(), values.tolist(), strict=True)
    )
    return csv_text(["arm", "run", "step", "name", "value"], rows)


def report_html(arms: Sequence[Arm]) -> str:
    """The page of `rlvr report` for the chosen runs."""
    found = data.whole_comparison(" against ".join(arm.name for arm in reversed(arms)), arms)
    first = data.run(arms[0].runs[0])
    runs = [run for arm in arms for run in arm.runs]
    return page(found, data.scalars(runs, CURVES), first.info if first else {}) if found else ""


def _offer(what: str, name: str, kind: str, of: Hashable, make: Callable[[], str]) -> None:
    """A button that makes the file, and then one that saves it: making it at every redraw would cost too much.

    of: what the file is of; one that was made of something else is not offered.
    """
    made = st.session_state.get(f"made_{what}")
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button(markdown("Prepare {}", what), key=f"make_{what}"):
            with st.spinner("Reading the store…"):
                made = (of, make().encode())
            st.session_state[f"made_{what}"] = made
        if made is not None and made[0] == of:
            size = f"{max(1, round(len(made[1]) / 1000)):,} kB"
            st.download_button(
                markdown("Save {}, {}", name, size), made[1], name, kind, icon=":material/download:", on_click="ignore",
                key=f"save_{what}",
            )  # fmt: skip
