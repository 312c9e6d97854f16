"""The table of all runs: a Streamlit component that draws only the rows on the screen, so a thousand runs are cheap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import streamlit as st

from dashboard.figures.theme import Theme
from dashboard.overview_rows import Sent

_HERE = Path(__file__).parent
_JS = """export default function (component) {
  if (window.rlvrDrawRuns) window.rlvrDrawRuns(component);
  else window.addEventListener("rlvr-run-base", () => window.rlvrDrawRuns(component), { once: true });
}"""
_HTML = '<div class="rlvr-runs"><p class="rlvr-runs-wait">Reading the runs…</p></div>'


@dataclass(frozen=True, slots=True)
class Asked:
    """What a reader did: opened a run, ticked runs to compare, chose an option to group by (None: as the URL says)."""

    run: str | None
    compare: Sequence[str]
    group: str | None


@cache
def _component() -> Callable[..., Any]:
    return st.components.v2.component("rlvr_runs", html=_HTML, js=_JS, isolate_styles=False)


@cache
def _base_component() -> Callable[..., Any]:
    return st.components.v2.component(
        "rlvr_runs_base",
        html="<span></span>",
        css=(_HERE / "runs_table.css").read_text(),
        js=(_HERE / "runs_table.js").read_text(),
        isolate_styles=False,
    )


def runs_base(sent: Sent) -> None:
    """Hands the browser the table's code and all rows as they once were.

    Both rarely change, and Streamlit sends an element that stayed the same as its hash alone.
    """
    _base_component()(key="runs-base", data={"id": sent.base_id, "rows": sent.base})


def runs_table(
    sent: Sent, *, group: str, keys: Sequence[str], colours: Mapping[str, str], theme: Theme, key: str = "runs"
) -> Asked:
    """Draws the table; returns what its reader asked for. Filter, order, ticks and open rows stay in the browser's URL.

    group: the option by which the rows of `sent` can be grouped; keys: all options that can be chosen; colours: of the
    sparklines by weighting.
    """
    data = {
        "base": sent.base_id,
        "patch": sent.patch,
        "group": group,
        "keys": list(keys),
        "colours": dict(colours),
        "theme": theme.name,
    }
    result = _component()(key=key, data=data, on_run_change=_ignore, on_compare_change=_ignore, on_group_change=_ignore)
    return Asked(getattr(result, "run", None), getattr(result, "compare", None) or [], getattr(result, "group", None))


def _ignore() -> None:
    """Streamlit takes only values for which there is a callback."""
