"""What the alert engine says of a run: the verdict as a banner or a badge, and the alerts that it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import streamlit as st
from markupsafe import Markup

from dashboard.escape import html, markdown
from dashboard.figures.marks import alert_numbers
from dashboard.views import shared
from monitor.alerts import RULES
from monitor.alerts.marks import Marks
from monitor.queries.frames import Frame, n_rows, select

HEALTH: dict[str, tuple[Any, str]] = {  # worst first: colour and icon of its badge
    "critical": ("red", ":material/error:"),
    "warning": ("orange", ":material/warning:"),
    "info": ("blue", ":material/info:"),
    "too early": ("gray", ":material/hourglass_empty:"),
    "healthy": ("green", ":material/check_circle:"),
}
STYLE = """<style>
.rlvr-alert { margin: 0 0 .8rem; overflow-wrap: anywhere; font-size: .9rem; line-height: 1.45; }
.rlvr-alert > p { margin: 0 0 .25rem; }
.rlvr-alert > p > code { white-space: nowrap; font-size: .8rem; }
.rlvr-alert ul { margin: 0; padding: 0; list-style: none; }
.rlvr-alert li { margin: 0 0 .3rem .1rem; padding: 0 0 0 .65rem; border-left: 3px solid; }
.rlvr-alert li b { font-weight: 600; }
.rlvr-alert li i { display: block; font-style: normal; opacity: .85; }
</style>"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The newest word on a run, and when it was said; step is nan where it names none."""

    health: str
    sentence: str
    step: float
    ts: float


def verdict_of(rows: Frame, run: str) -> Verdict | None:
    """The row of one run in `monitor.queries.alerts.verdicts`; None for a run of which nothing was said."""
    mine = select(rows, rows["run"] == run)
    if not n_rows(mine):
        return None
    return Verdict(str(mine["health"][0]), str(mine["sentence"][0]), float(mine["step"][0]), float(mine["ts"][0]))


def banner(found: Verdict, newest_step: float, *, replayed: bool = False) -> None:
    """The verdict in its colour: sentence, the step it was said at, its age, and the run's step where that is later.

    replayed: whether the page shows the run as it stood after `newest_step`, when nobody knew what is "now".
    """
    when = [f"As of step {found.step:.0f}"] if np.isfinite(found.step) else []
    if replayed:
        if not newest_step <= found.step:
            when.append(f"the newest word when the run was at step {newest_step:.0f}")
    else:
        when.append(shared.age(found.ts))
        if newest_step > found.step:
            when.append(f"the run is at step {newest_step:.0f} now")
    _, icon = HEALTH.get(found.health, HEALTH["info"])
    said, told = found.sentence, " · ".join(when)
    if said.lower().startswith(found.health):  # "Too early to judge ..."
        text = markdown("{}  \n:small[{}]", said, told)
    else:
        text = markdown("**{}:** {}  \n:small[{}]", found.health.capitalize(), said, told)
    if found.health == "critical":
        st.error(text, icon=icon)
    elif found.health == "warning":
        st.warning(text, icon=icon)
    elif found.health == "healthy":
        st.success(text, icon=icon)
    else:
        st.info(text, icon=icon)


def _marked(marks: Marks, rule: str, first_step: int, step: int) -> str:
    """ " · seen" of an acknowledged alert, " · muted" of a rule that is not delivered."""
    seen, muted = marks.has_seen(rule, first_step), marks.is_muted(rule, step)
    return " · seen" * seen + " · muted" * muted


def alert_list(transitions: Frame, marks: Marks) -> None:
    """The alerts of one run behind a line that counts them: each with all its transitions and their own numbers."""
    keys = list(zip(transitions["rule"], transitions["first_step"], strict=True))
    alerts = [select(transitions, np.array([one == key for one in keys])) for key in dict.fromkeys(keys)]
    if not alerts:
        st.caption("No alert has fired.")
        return
    fires = sum(alert["state"][-1] == "firing" for alert in alerts)
    told = [f"{fires} firing"] * (fires > 0) + [f"{len(alerts) - fires} resolved"] * (fires < len(alerts))
    with st.expander(markdown("Alerts: {}", ", ".join(told)), icon=":material/notifications:", key="alerts"):
        st.html(STYLE)
        st.html(html("{}", Markup().join(_alert(alert, marks) for alert in alerts)))


def _alert(rows: Frame, marks: Marks) -> Markup:
    """One alert: what its rule says, then a line for each transition."""
    name, first, last = str(rows["rule"][0]), rows["first_step"][0], rows["step"][-1]
    says = RULES[name].says if name in RULES else "An alert fired"
    when = f"since step {first}" if rows["state"][-1] == "firing" else f"step {first} to {last}, resolved"
    when += _marked(marks, name, int(first), int(last))
    lines = Markup().join(_transition(rows, i) for i in range(n_rows(rows)))
    return html('<div class="rlvr-alert"><p><b>{}</b> <code>{}</code> {}</p><ul>{}</ul></div>', says, name, when, lines)


def _transition(rows: Frame, i: int) -> Markup:
    theme, severity, numbers = shared.theme(), str(rows["severity"][i]), alert_numbers(rows, i)
    colour, what = theme.severity.get(severity, theme.muted), severity
    repeated = i > 0 and rows["action"][i] == rows["action"][i - 1]
    if rows["state"][i] == "resolved":
        colour, what = theme.muted, "resolved"
    elif rows["step"][i] > rows["first_step"][i]:
        what = f"turned {severity}"
    return html(
        '<li style="border-color:{}"><b>Step {} · {}</b>{}<i>{} {}</i></li>',
        colour,
        rows["step"][i],
        what,
        f" · {numbers}" if numbers else "",
        rows["message"][i],
        "" if repeated else rows["action"][i],
    )
