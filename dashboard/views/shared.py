"""What every page uses: theme, links, pickers whose state is the URL, badges, empty states."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, LiteralString, Protocol

import numpy as np
import plotly.graph_objects as go
import streamlit as st
from markupsafe import Markup
from streamlit.delta_generator import DeltaGenerator

from dashboard import data
from dashboard.components.chart import Packed, Pick, live_chart, packed
from dashboard.escape import html, markdown
from dashboard.figures.spent import SPENT, STEP
from dashboard.figures.theme import DARK, LIGHT, Theme
from monitor.errors import nearest
from monitor.store.runs import busy_with
from monitor.store.tail import RunEntry

STATUS: dict[str, tuple[Any, str, str]] = {  # colour and icon of st.badge
    "running": ("blue", ":material/play_arrow:", "Its process lives, and steps come or it says what else it does."),
    "finished": ("green", ":material/check:", "It ended as planned."),
    "stopped": ("gray", ":material/stop:", "Someone stopped it; all steps are written."),
    "stalled": ("orange", ":material/hourglass_empty:", "The process lives, but no new step comes."),
    "crashed": ("red", ":material/error:", "Its process ended without closing the run."),
    "failed": ("red", ":material/error:", "It ended with an error: see its events."),
}
_GOES_ON = "A run of rlvr train goes on with rlvr train --resume RUN."
WHAT_NOW = {  # what is true of a run that does not train as it should, and what to do
    "stalled": "No new step comes, though its process lives. Look at the trainer's output and at its machine.",
    "crashed": f"Its process is gone and did not close the run; the steps it had written are here. {_GOES_ON}",
    "failed": f"It ended with an error: see its events at the foot of the Run page. {_GOES_ON}",
    "stopped": f"Someone stopped it; the steps until then are here. {_GOES_ON}",
}
NOT_DESCRIBED = (
    "Its run.json is missing or cannot be read, so its settings are not known. Its steps are not touched by that. "
    "rlvr store check says what is wrong."
)
ENDED = ("finished", "stopped", "crashed", "failed")
SMOOTHING = {"none": 0, "5 steps": 5, "20 steps": 20, "50 steps": 50}
PAUSED = "paused"  # of the URL's parameter "updates": the page stays as it is while its run goes on
SETTLE_S = 3.0  # until then the browser has heard of a change of its URL
FIRST = "first"  # the section of a page that is on the screen when it opens
PAGES: dict[str, Any] = {}  # url_path -> st.Page, filled by app.main


def theme() -> Theme:
    """The reader's colour scheme."""
    return DARK if st.context.theme.type == "dark" else LIGHT


def link(page: str, text: str, parameters: dict[str, str], icon: str | None = None) -> None:
    """A link to another page of the dashboard; its text is Markdown."""
    st.page_link(PAGES[page], label=text, icon=icon, query_params=parameters)


def choose(
    widget: Callable[..., Any],
    text: str,
    name: str,
    options: Sequence[Any],
    default: Any,
    *,
    ends: Sequence[str] = (),
    **settings: Any,
) -> Any:
    """A picker bound to the URL parameter `name`, so that a shared link shows the same choice.

    ends: other parameters that mean nothing after another choice, and leave the URL.
    """
    key = f"pick_{name}"
    known = {str(option): option for option in options}
    current = known.get(st.query_params.get(name, ""), default)
    st.session_state[key] = current
    set_parameter(name, str(current))

    def remember() -> None:  # also after the reader has left the page, whose state is then gone
        value = st.session_state.get(key)
        if value is not None:
            put_parameter(name, str(value))
            for other in ends:
                put_parameter(other, "")

    widget(text, options, key=key, on_change=remember, **settings)
    return current


def put_parameter(name: str, value: str) -> None:
    """Puts what the reader chose into the URL, "" takes it out, and holds on to it: `keep_choices`."""
    st.session_state.setdefault("choices", {})[name] = (value, time.monotonic())
    _put(name, value)


def _put(name: str, value: str) -> None:
    if value:
        st.query_params[name] = value
    else:
        st.query_params.pop(name, None)


def keep_choices(page: str) -> None:
    """Puts the reader's choices of the last SETTLE_S on this page back into the URL, if they are not in it.

    The browser sends its URL with every request. One that left it before it heard of a choice has the URL from before,
    and a page made from that would take the choice back.
    """
    if st.session_state.get("page") != page:
        st.session_state["page"], st.session_state["choices"] = page, {}
    for name, (value, when) in st.session_state.get("choices", {}).items():
        if time.monotonic() - when < SETTLE_S and st.query_params.get(name, "") != value:
            _put(name, value)


def set_parameter(name: str, value: str) -> None:
    """Puts a parameter into the URL, and tells the browser only where it changes.

    A message that changes nothing could arrive after a reader has followed a link, and take the link's parameters away.
    """
    if st.query_params.get(name) != value:
        st.query_params[name] = value


def choose_axis(among: Sequence[str] = tuple(SPENT)) -> str:
    """What curves stand over: STEP or one of `among`. A zoom of the former axis ends with it."""
    options = (STEP, *among)
    return str(choose(st.segmented_control, "Curves over", "over", options, STEP, required=True, ends=("x",)))


def choose_smoothing() -> int:
    """Over how many steps curves are smoothed; 0: not."""
    return SMOOTHING[choose(st.segmented_control, "Smoothing", "smooth", tuple(SMOOTHING), "none", required=True)]


def pick_run(**settings: Any) -> RunEntry | None:
    """The run of the URL, else the one shown last, else the newest. An unknown name shows a hint and gives None."""
    names = [entry.name for entry in data.runs()]
    wanted = st.query_params.get("run")
    if wanted is not None and wanted not in names:
        unknown_run(wanted, names)
        return None
    last = st.session_state.get("last_run")
    default = last if last in names else names[0]
    chosen = choose(st.selectbox, "Run", "run", names, default, **settings)
    st.session_state["last_run"] = chosen
    return data.run(chosen)


def unknown_run(wanted: str, names: Sequence[str]) -> None:
    hint = nearest(wanted, names)
    st.error(markdown("No run {!r} in this store.{}", wanted, hint), icon=":material/search_off:")
    close = [name for name in names if hint and repr(name) in hint]
    for name in close or names[:5]:
        link("run", markdown("Open {}", name), {"run": name}, ":material/arrow_forward:")


def status_badge(entry: RunEntry) -> None:
    colour, icon, help_text = STATUS.get(entry.status, ("gray", ":material/help:", ""))
    busy = busy_with(entry.heartbeats) if entry.status == "running" else None
    status = f"{entry.status}: {busy}" if busy else entry.status
    st.badge(markdown("{}", status), color=colour, icon=icon, help=markdown("{}", help_text))


def describe(entry: RunEntry) -> str:
    """One line about a run: task, weighting, seed, model."""
    info = entry.info
    if not info:
        return "its run.json is missing or cannot be read"
    parts = [info.get("task"), info.get("weighting"), f"seed {info.get('seed', 0)}", info.get("model")]
    return " · ".join(str(part) for part in parts if part)


def what_now(entry: RunEntry) -> None:
    """A line on a run that does not train as it should, or whose description cannot be read; nothing for others."""
    if entry.status in WHAT_NOW:
        st.caption(markdown(":material/info: {}", WHAT_NOW[entry.status]))
    if not entry.info:
        st.caption(markdown(":material/broken_image: {}", NOT_DESCRIBED))


def no_steps(entry: RunEntry) -> str:
    """Why a run shows no steps, in a word or two."""
    if any(name.startswith("steps/") for name in data.tail().quarantined().get(entry.name, ())):
        return "no steps that can be read"
    return "no steps" if entry.status in ENDED else "no steps yet"


def age(ts: float) -> str:
    """'3 min ago' for a moment in the past."""
    seconds = max(0.0, time.time() - ts)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"


def number(value: float, unit: str = "") -> str:
    """A value as people read it; '–' where there is none."""
    if value is None or not np.isfinite(value):
        return "–"
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def chart(
    fig: go.Figure | Packed,
    key: str,
    *,
    group: str = "steps",
    run: str = "",
    section: str = "",
    step_at: Callable[[float], int] = round,
) -> None:
    """Draws a figure. The zoom of charts of a `group` stands in the URL.

    With `run`, a click on a step or on a cell of a histogram opens a menu: read its tokens, or pin its distribution.
    step_at: the step at a place of x. A chart of a `section` of the page reports which sections are on the screen:
    `is_visible`.
    """
    sent = fig if isinstance(fig, Packed) else packed(fig)
    shown = st.session_state.get("visible_sections", "")
    picked = live_chart(
        sent, key=key, group=group, menu=bool(run) and bool(group or sent.cells),
        zoom=st.query_params.get("x", "") if group else "", section=section, shown=shown,
        on_pick=_keep_zoom if group else lambda pick: None,
    )  # fmt: skip
    if picked is None:
        return
    if picked.what == "tokens":
        st.switch_page(PAGES["tokens"], query_params={"run": run, "step": str(step_at(float(picked.value)))})
    elif picked.what == "cell":
        x, _, cell = picked.value.partition(":")
        step = step_at(float(x)) if group else int(x)  # without a group it is of a figure of steps that it names
        st.switch_page(PAGES["tokens"], query_params={"run": run, "step": str(step), "cell": cell})
    elif picked.what == "pin":
        st.query_params["pin"] = f"{run}@{step_at(float(picked.value))}"
        st.rerun()
    elif picked.what == "visible" and picked.value != shown:
        st.session_state["visible_sections"] = picked.value
        st.rerun()


def _keep_zoom(pick: Pick) -> None:
    """Puts the zoom into the URL before the page is made, so that all of its charts are told the same."""
    if pick.what == "zoom":
        put_parameter("x", pick.value)


class Follows(Protocol):
    """How a page follows what it shows, where it need not be made anew with every change of the store."""

    def is_due(self, *, is_new: bool) -> bool:
        """Whether the page must be made anew. is_new: whether the store changed since it was made."""

    def send(self) -> None:
        """Send the browser what is new since the page was made."""


def follow(how: Follows) -> None:
    """Lets the page that is being made follow its data in its own way."""
    st.session_state["follows"] = how


def is_visible(section: str) -> bool:
    """Whether a section is on the reader's screen, as its charts told it; the first one until they did."""
    return section in st.session_state.get("visible_sections", FIRST).split("|")


def pinned_step(run: str) -> int | None:
    """The step of `run` that the URL pins."""
    of, _, step = st.query_params.get("pin", "").rpartition("@")
    return int(step) if of == run and step.isascii() and step.isdigit() else None


def grid(name: str) -> DeltaGenerator:
    """A container that sets charts side by side, as many as the screen has room for."""
    return st.container(key=f"grid-{name}")


def title(page: LiteralString, of: str = "") -> None:
    """The heading of a page for screen readers; sighted readers see the page's name in its bar."""
    with st.container(key="unseen-title"):
        st.markdown(markdown("# {} {}", page, of))


def small_heading(text: str, note: str = "", place: DeltaGenerator | None = None) -> None:
    """A heading within a page, at `place` where that is given."""
    tail = html('<span style="opacity:.75;font-size:.85rem;font-weight:400"> {}</span>', note) if note else Markup("")
    (place or st).html(
        html('<h2 style="font-weight:600;font-size:1.05rem;margin:.6rem 0 0;padding:0">{}{}</h2>', text, tail)
    )
