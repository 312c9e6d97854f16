"""Alerts: what fired in any run and on what evidence, who has seen it, who is told, and how often a rule is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import streamlit as st
from markupsafe import Markup

from dashboard import data
from dashboard.alert_rows import PastAlert
from dashboard.escape import html, markdown
from dashboard.figures.marks import alert_numbers
from dashboard.views import shared, verdict
from monitor.alerts import RULES
from monitor.alerts.delivery import TEST_S, send_test
from monitor.alerts.judged_runs import JudgedRun, judged_runs
from monitor.alerts.judgement import measured_rates
from monitor.alerts.marks import Marks, acknowledge, mute, unmute
from monitor.alerts.settings import Route, load_alerts
from monitor.errors import MonitorError
from monitor.queries.frames import n_rows

WORTH = ("false alarm", "too late", "in time", "right", "counted on no side")  # of a warning, worst first
OUTCOMES = {  # as benchmarks/corpus/labels.py names them -> as a reader is told
    "healthy": "healthy", "stall": "no gain", "no_signal": "nothing to learn from", "unclear": "unclear",
    "reward_lost": "lost its reward", "diversity_lost": "lost its answers",
}  # fmt: skip
MOST_LINKS = 12  # to runs of this store, below a list
SHOW = {"new": "firing, not seen", "firing": "firing", "all": "all"}
STYLE = """<style>
.rlvr-evidence { margin: 0; padding: 0; list-style: none; font-size: .92rem; line-height: 1.45; }
.rlvr-evidence li { overflow-wrap: anywhere; }
.rlvr-evidence li { margin: 0 0 .5rem .1rem; padding: 0 0 0 .65rem; border-left: 3px solid; }
.rlvr-evidence i { display: block; font-style: normal; }
</style>"""

Past = Sequence[tuple[PastAlert, Marks]]


def page() -> None:
    everything = data.alert_history()
    st.markdown("### Alerts")
    _summary(everything)
    shown = _history(everything)
    picked = _picked(everything)
    if picked is not None:
        _evidence(*picked)
    elif shown:
        st.caption("Tick a row at its left to see its evidence, and to acknowledge or mute it.")
    _rules(everything)
    _routes()


def _seen(alert: PastAlert, marks: Marks) -> bool:
    return marks.has_seen(alert.rule, alert.first_step)


def _summary(everything: Past) -> None:
    """How many alerts there are, and how many of them ask for somebody."""
    fires = [(alert, marks) for alert, marks in everything if alert.end_step is None]
    new = [alert for alert, marks in fires if not _seen(alert, marks)]
    with st.container(horizontal=True, vertical_alignment="center"):
        told = f"{len(new)} of {len(fires)} firing alerts not seen yet" if fires else "No alert fires now"
        st.caption(markdown("{} · {} resolved", told, len(everything) - len(fires)), width="content")
        for severity in ("critical", "warning", "info"):
            count = sum(alert.severity == severity for alert in new)
            if count:
                colour, icon = verdict.HEALTH[severity]
                st.badge(markdown("{} {}", count, severity), color=colour, icon=icon)


def _history(everything: Past) -> Past:
    """The table; a ticked row goes into the URL."""
    if not everything:
        st.info("No alert has fired in this store. The rules below judge every run that an engine follows; "
                "`rlvr watch STORE` judges the others.", icon=":material/notifications_off:")  # fmt: skip
        return []
    show = shared.choose(
        st.segmented_control, "Show", "show", list(SHOW), "all", required=True, format_func=SHOW.get,
        label_visibility="collapsed",
    )  # fmt: skip
    shown = [
        (alert, marks) for alert, marks in everything
        if show == "all" or (alert.end_step is None and (show == "firing" or not _seen(alert, marks)))
    ]  # fmt: skip
    if not shown:
        st.caption(markdown("None of the {} alerts is {}. Choose “all” for the others.", len(everything), SHOW[show]))
        return shown
    table = {
        "state": [_state(alert, marks) for alert, marks in shown],
        "severity": [alert.severity for alert, _ in shown],
        "run": [alert.run for alert, _ in shown],
        "rule": [alert.rule for alert, _ in shown],
        "since step": [alert.first_step for alert, _ in shown],
        "to step": [alert.end_step for alert, _ in shown],
        "when": (np.array([alert.ts for alert, _ in shown]) * 1000).astype("datetime64[ms]"),
        "message": [alert.message for alert, _ in shown],
    }
    event = st.dataframe(
        table, key=f"alerts-{show}", hide_index=True, on_select="rerun", selection_mode="single-row",
        height=min(290 if "rule" in st.query_params else 430, 40 + 35 * len(shown)), placeholder="–",
        column_config={
            "state": st.column_config.TextColumn(width=140),
            "severity": st.column_config.TextColumn(width=80),
            "run": st.column_config.TextColumn(width=150),
            "rule": st.column_config.TextColumn(width=160),
            "since step": st.column_config.NumberColumn(format="%d", width=80),
            "to step": st.column_config.NumberColumn(format="%d", width=80),
            "when": st.column_config.DatetimeColumn(format="D MMM, HH:mm", timezone="UTC", width=110),
            "message": st.column_config.TextColumn(width="large"),
        },
    )  # fmt: skip
    rows = event.selection.rows
    if rows and rows != st.session_state.get("alerts_rows") and rows[0] < len(shown):
        alert = shown[rows[0]][0]
        st.query_params.update({"run": alert.run, "rule": alert.rule, "first": str(alert.first_step)})
    st.session_state["alerts_rows"] = list(rows)
    return shown


def _state(alert: PastAlert, marks: Marks) -> str:
    entry = data.run(alert.run)
    fires = "firing at its end" if entry is not None and entry.status in shared.ENDED else "firing"
    words = [fires if alert.end_step is None else "resolved"]
    words += ["seen"] * _seen(alert, marks) + ["muted"] * (alert.rule in marks.muted)
    return ", ".join(words)


def _picked(everything: Past) -> tuple[PastAlert, Marks] | None:
    """The alert that the URL names."""
    wanted = tuple(st.query_params.get(name, "") for name in ("run", "rule", "first"))
    if not any(wanted):
        return None
    for alert, marks in everything:
        if (alert.run, alert.rule, str(alert.first_step)) == wanted:
            return alert, marks
    st.warning(markdown("No alert {} of run {} from step {} in this store.", wanted[1], wanted[0], wanted[2]),
               icon=":material/search_off:")  # fmt: skip
    return None


def _evidence(alert: PastAlert, marks: Marks) -> None:
    """One alert: what its rule says, what can be done about it, and all its transitions with their numbers."""
    rule, rows = RULES.get(alert.rule), alert.transitions
    last = n_rows(rows) - 1
    with st.container(border=True, key="evidence"):
        when = f"since step {alert.first_step}"
        when += "" if alert.end_step is None else f", resolved at step {alert.end_step}"
        st.markdown(markdown("#### {} in {}", alert.rule, alert.run))
        st.markdown(markdown("{}, {}. To do: {}", rule.says if rule else "An alert", when, rows["action"][last] or "–"))
        _judged_box(alert.rule)
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            _buttons(alert, marks)
            shared.link("run", "Open the run", {"run": alert.run}, ":material/show_chart:")
            shared.link("tokens", "Tokens of its first step", {"run": alert.run, "step": str(alert.first_step)},
                        ":material/article:")  # fmt: skip
        st.html(STYLE)
        st.html(
            html('<ul class="rlvr-evidence">{}</ul>', Markup().join(_transition(alert, i) for i in range(last + 1)))
        )


def _buttons(alert: PastAlert, marks: Marks) -> None:
    where = (data.store_path(), alert.run, alert.rule)
    if _seen(alert, marks):
        st.markdown(markdown("Seen {}", shared.age(marks.acknowledged[alert.rule].ts)), width="content")
    elif st.button("Acknowledge", icon=":material/done:", type="primary",
                   help="It no longer asks for attention. A later alert of this rule does."):  # fmt: skip
        _mark(lambda: acknowledge(*where, alert.first_step), "Acknowledged.")
    muted = marks.muted.get(alert.rule)
    if muted is None:
        if st.button("Mute this rule for the run", icon=":material/notifications_off:",
                     help="Its alerts of this run are recorded and shown here, and sent to nobody."):  # fmt: skip
            _mark(lambda: mute(*where), "Muted.")
    else:
        until = "until unmuted" if muted.until_step is None else f"to step {muted.until_step}"
        st.markdown(markdown("Muted {}", until), width="content")
        if st.button("Unmute", icon=":material/notifications_active:"):
            _mark(lambda: unmute(*where), "Its next transition is sent again.")


def _mark(do: Callable[[], None], done: str) -> None:
    """Write a mark beside the run's data, which is the only thing that the dashboard ever writes."""
    try:
        do()
    except (MonitorError, OSError) as error:
        st.error(markdown("{}", error), icon=":material/error:")
        return
    st.toast(markdown("{}", done), icon=":material/done:")
    st.rerun()


def _transition(alert: PastAlert, i: int) -> Markup:
    theme, rows = shared.theme(), alert.transitions
    severity, numbers = str(rows["severity"][i]), alert_numbers(rows, i)
    colour, what = theme.severity.get(severity, theme.muted), f"fires as {severity}"
    if rows["state"][i] == "resolved":
        colour, what = theme.muted, "resolved"
    elif i:
        what = f"turned {severity}"
    return html(
        '<li style="border-color:{}"><b>Step {} · {}</b>{}<i>{}</i></li>',
        colour, rows["step"][i], what, f" · {numbers}" if numbers else "", rows["message"][i],
    )  # fmt: skip


def rate_text(rule: str) -> str:
    """How often a rule was right on the real runs that it was measured on."""
    rate = measured_rates().get(rule)
    if not rate or not rate["fired"]:
        return "How often this rule is right on real runs was not measured: too few fired it."
    return f"Of {rate['fired']} real runs in which this rule fired, {rate['bad']} came to harm."


def _judged_box(rule: str) -> None:
    """The sentence on a rule's rate, which opens the runs that it rests on."""
    if any(rule in one.warned for one in judged_runs()):
        with st.expander(markdown("{} Which?", rate_text(rule)), icon=":material/fact_check:", key=f"judged-{rule}"):
            _judged(rule)
    else:
        st.caption(markdown("{}", rate_text(rule)))


def _judged(rule: str) -> None:
    """The real runs that a rule warned of, with what became of them: what its rates are counted from."""
    every = judged_runs()
    fired = [one for one in every if rule in one.warned]
    if not fired:
        st.info(markdown("{} warned of none of the {} real runs, so nothing is known of how often it is right.", rule,
                         len(every)), icon=":material/help:")  # fmt: skip
        return
    fired.sort(key=lambda one: (WORTH.index(one.judged(rule)), one.run))
    worth = [one.judged(rule) for one in fired]
    counts = ", ".join(f"{worth.count(what)} {what}" for what in WORTH if what in worth)
    st.markdown(markdown("{} warned of {} of {} real runs: {}.", rule, len(fired), len(every), counts))
    st.dataframe(
        {
            "run": [one.run for one in fired],
            "the warning was": worth,
            "outcome": [OUTCOMES[one.outcome] for one in fired],
            "warned at step": [one.warned[rule] for one in fired],
            "damage seen at step": [one.damage_step for one in fired],
            "settings": [_settings(one) for one in fired],
            "part": [one.part for one in fired],
        },
        hide_index=True, height=min(290, 40 + 35 * len(fired)), placeholder="–",
        column_config={
            "run": st.column_config.TextColumn(width=70),
            "the warning was": st.column_config.TextColumn(width=140),
            "outcome": st.column_config.TextColumn(width=150),
            "warned at step": st.column_config.NumberColumn(format="%d", width=110),
            "damage seen at step": st.column_config.NumberColumn(
                format="%d", width=140, help="The first evaluation that shows it. An alert must come before it."
            ),
            "settings": st.column_config.TextColumn(width=260),
            "part": st.column_config.TextColumn(
                width=105, help="The rules were made on the development part; the test part was kept from them."
            ),
        },
    )  # fmt: skip
    silent = [one for one in every if rule not in one.warned and one.damage_step is not None]
    st.caption(
        markdown(
            "It was silent in {} other runs that lost reward or answers; other rules may have warned of them. The rate "
            "counts the development part without unclear runs. Labels come from held-out evaluations alone. All runs "
            "are of small policies on one built-in task.",
            len(silent),
        )
    )
    held = [one.run for one in fired if data.run(one.run) is not None]
    if not held:
        st.caption(
            markdown(
                "This store holds none of them. In a checkout of the project `python -m benchmarks.corpus.show {} "
                "--store STORE` records one into a store, for example.",
                fired[0].run,
            )
        )
    else:
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            for name in held[:MOST_LINKS]:
                shared.link("run", markdown("Open {}", name), {"run": name}, ":material/show_chart:")


def _settings(one: JudgedRun) -> str:
    return f"{one.weighting}, lr {one.lr}, {one.task}, {one.model}"


def _rules(everything: Past) -> None:
    shared.small_heading("Rules", "measured on real runs, labelled by evaluation alone: docs/alerts.md")
    fires = [alert.rule for alert, _ in everything if alert.end_step is None]
    past = [alert.rule for alert, _ in everything]
    rates = measured_rates()
    names = [*RULES, *sorted(set(past) - RULES.keys())]
    fired = [rates.get(name, {}).get("fired", 0) for name in names]
    bad = [rates.get(name, {}).get("bad", 0) for name in names]
    table = {
        "rule": names,
        "says": [RULES[name].says if name in RULES else "a rule of another engine" for name in names],
        "fires here": [fires.count(name) for name in names],
        "fired here": [past.count(name) for name in names],
        "real runs it fired in": [n or None for n in fired],
        "of them harmed": [b if n else None for n, b in zip(fired, bad, strict=True)],
        "right": [100 * b / n if n else None for n, b in zip(fired, bad, strict=True)],
        "needs": [", ".join(RULES[name].needs) if name in RULES else "" for name in names],
    }
    chosen = st.query_params.get("judged", "")
    st.caption("Tick a row at its left to see the real runs behind its figures.")
    event = st.dataframe(
        table, key="rules", hide_index=True, height=290 if chosen in RULES else 40 + 35 * len(names),
        placeholder="–", on_select="rerun",
        selection_mode="single-row",
        column_config={
            "rule": st.column_config.TextColumn(width=165),
            "says": st.column_config.TextColumn(width=330),
            "fires here": st.column_config.NumberColumn(width=85, help="Alerts of this store that fire now."),
            "fired here": st.column_config.NumberColumn(width=85, help="All alerts of this store, resolved ones too."),
            "real runs it fired in": st.column_config.NumberColumn(
                width=150, help="Runs of the test corpus. None: it fired in none, so nothing is known of it."
            ),
            "of them harmed": st.column_config.NumberColumn(
                width=125, help="They lost reward or answers, or had nothing to learn from."
            ),
            "right": st.column_config.NumberColumn(format="%.0f %%", width=70),
            "needs": st.column_config.TextColumn(width=200),
        },
    )  # fmt: skip
    ticked = event.selection.rows
    if ticked != st.session_state.get("rules_rows", []):
        st.session_state["rules_rows"] = list(ticked)
        shared.put_parameter("judged", names[ticked[0]] if ticked else "")
        st.rerun()
    if chosen in RULES:
        with st.container(border=True, key="judged"):
            _judged(chosen)


def _routes() -> None:
    shared.small_heading("Routes", "who is told")
    path = data.alerts_file()
    if not path:
        st.caption("This dashboard was started without an alerts file. `rlvr dashboard STORE --alerts alerts.toml` "
                   "shows its routes here and can send a test; docs/notifications.md explains the file.")  # fmt: skip
        return
    try:
        routes = load_alerts(path).routes
    except MonitorError as error:
        st.error(markdown("{}", error), icon=":material/error:")
        return
    if not routes:
        st.caption(
            markdown("{} has no routes: alerts are told in the terminal and recorded, and sent to nobody.", path)
        )
        return
    st.dataframe(
        {
            "route": [route.source for route in routes],
            "its address": [_address(route) for route in routes],
            "severities": [", ".join(route.severities) for route in routes],
            "rules": [", ".join(route.rules) for route in routes],
            "runs": [", ".join(route.runs) for route in routes],
            "states": [", ".join(route.states) for route in routes],
        },
        hide_index=True,
    )
    help_text = "Sends a message that says it is a test to every route. This waits for at most half a minute."
    if st.button("Send a test", icon=":material/send:", help=help_text):
        _test(routes)


def _address(route: Route) -> str:
    """Whether the secret is there; never the secret."""
    try:
        route.address()
    except MonitorError as error:
        return str(error)
    return "is there, not shown"


def _test(routes: Sequence[Route]) -> None:
    with st.spinner(markdown("Waiting for the receivers, at most {:.0f} s…", TEST_S)):
        try:
            told = send_test(routes, "TEST: rlvr dashboard")
        except MonitorError as error:
            st.error(markdown("{}", error), icon=":material/error:")
            return
    for source, why in told.items():
        if why:
            st.error(markdown("{}: {}", source, why), icon=":material/error:")
        else:
            st.success(markdown("{}: arrived", source), icon=":material/check:")
