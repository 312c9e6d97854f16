"""The first screen of a run: the verdict, where its entropy is going, and a strip of judged figures."""

from __future__ import annotations

import math

import numpy as np
import streamlit as st
from markupsafe import Markup

from dashboard import data
from dashboard.escape import html, markdown
from dashboard.figures.theme import label
from dashboard.shown_arms import partner_arms
from dashboard.views import shared, verdict
from monitor.alerts import RULES
from monitor.alerts.judgement import FARTHEST, duration
from monitor.alerts.outlook import Outlook, Vital, outlook, vitals
from monitor.alerts.window import BASELINE_ROWS, Window
from monitor.queries.frames import Frame, n_rows
from monitor.records import SEVERITY_RANK
from monitor.stats.comparison_verdict import headline
from monitor.store.tail import RunEntry

KEYS = (
    "entropy", "reward", "eval/heldout/pass@1", "eval/heldout/distinct", "same_answer_share", "all_correct_share",
    "all_wrong_share", "truncated_share", "response_length", "kl", "grad_norm", "clip_share_low", "clip_share_high",
    "sampler_mismatch", "perf/step_s",
)  # fmt: skip
STYLE = """<style>
.rlvr-vitals { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.2rem, 1fr)); gap: .5rem; }
.rlvr-vitals > div { padding: .3rem .6rem .35rem; border-radius: .4rem; border-left: 4px solid;
                  background: rgba(128, 128, 128, .09); min-width: 0; overflow-wrap: anywhere; }
.rlvr-vitals span { display: block; font-size: .78rem; line-height: 1.15; opacity: .85; }
.rlvr-vitals b { font-size: 1.05rem; font-weight: 600; line-height: 1.35; }
</style>"""


def show(entry: RunEntry, window: Window) -> None:
    """The verdict, where the entropy is going, and links to the tokens, the alerts and the comparison behind it."""
    found = verdict.verdict_of(data.verdicts(entry.name), entry.name)
    newest = data.newest_step(entry.name)
    if found is not None:
        verdict.banner(found, newest, replayed=data.until(entry.name) is not None)
    elif entry.status not in shared.ENDED and all(math.isnan(window.baseline(key)) for key in ("entropy", "reward")):
        st.info(
            markdown("Too early to judge: a verdict needs {} steps after warm-up, its baseline.", BASELINE_ROWS),
            icon=":material/hourglass_empty:",
        )
    else:
        st.info("Nothing has judged this run: it was recorded without an alert engine.", icon=":material/info:")
    ahead = outlook(window)
    if ahead is not None:
        st.markdown(markdown("**Entropy** {}. **Reward** {}.", _entropy(ahead, window, entry.status), _reward(window)))
    with st.container(horizontal=True, vertical_alignment="center", gap="medium", key="verdict-links"):
        if ahead is not None and ahead.since is not None:
            where = {"run": entry.name, "x": f"{ahead.since}-"}
            shared.link("run", markdown("Show the fall since step {}", ahead.since), where, ":material/zoom_in:")
            _lost(entry, ahead.since)
        _tokens(entry, newest)
        _against(entry)


def _lost(entry: RunEntry, since: int) -> None:
    """Leads to the tokens that lost the entropy: those of the newest step with tokens against those before the fall."""
    steps = data.token_steps(entry.name)
    before = steps[steps <= since]
    if len(before) and before[-1] < steps[-1]:
        where = {"run": entry.name, "step": str(steps[-1]), "view": "lost", "since": str(before[-1])}
        shared.link("tokens", "The tokens that lost it", where, ":material/trending_down:")


def _tokens(entry: RunEntry, newest: float) -> None:
    """Leads to the tokens of the step at which the alert fired, or of the nearest one that has any."""
    steps, transitions = data.sample_steps(entry.name), data.transitions(entry.name)
    if not len(steps):
        return
    step = int(steps[np.argmin(np.abs(steps - _alert_step(transitions, newest)))])
    if _fires(transitions):
        text = markdown("Tokens of step {}, where the alert fired", step)
    else:
        text = markdown("Tokens of step {}", step)
    shared.link("tokens", text, {"run": entry.name, "step": str(step), "colour": "entropy"}, ":material/article:")


def _alert_step(transitions: Frame, newest: float) -> float:
    """The step since which the worst alert that fires now has fired; without one the newest step."""
    steps, severities = transitions["first_step"], transitions["severity"]
    ranked = [(-SEVERITY_RANK[severities[i]], int(steps[i])) for i in _firing(transitions)]
    return min(ranked)[1] if ranked else newest


def _firing(transitions: Frame) -> list[int]:
    """The rows that are the newest transition of an alert that fires now."""
    newest = {(transitions["rule"][i], transitions["first_step"][i]): i for i in range(n_rows(transitions))}
    return [i for i in newest.values() if transitions["state"][i] == "firing"]


def _entropy(ahead: Outlook, window: Window, status: str) -> str:
    """'0.14 nats is 37 % of its baseline 0.38, and has fallen since step 24; about 60 steps (3 min) to its floor'."""
    text = f"{ahead.level:.3g} nats is {ahead.level / ahead.baseline:.0%} of its baseline {ahead.baseline:.3g}"
    if ahead.since is not None:
        text += f", and has fallen since step {ahead.since}"
    if ahead.direction in ("rising", "flat"):
        text += f", {ahead.direction} now"
    if ahead.steps_left == 0:
        text += f"; it is at its floor of {ahead.floor:.2g}"
    elif ahead.steps_left < FARTHEST and status not in shared.ENDED:
        seconds = ahead.steps_left * window.level("perf/step_s")
        minutes = f" ({duration(seconds)})" if math.isfinite(seconds) else ""
        text += f"; about {math.ceil(ahead.steps_left)} steps{minutes} to its floor of {ahead.floor:.2g}"
    return text


def _reward(window: Window) -> str:
    return f"{shared.number(window.level('reward'))}, {window.trend('reward')}".removesuffix(", unknown")


def _against(entry: RunEntry) -> None:
    """What the weightings of this run's comparison did against uniform; each sentence leads to Compare."""
    if data.until(entry.name) is not None:
        return  # the comparison knows how the runs ended
    for arms in partner_arms(entry, data.runs()):
        for sentence in (data.comparison_verdicts(arms) or {}).values():
            where = {key: ",".join(arm.runs) for key, arm in zip("ab", arms, strict=True)}
            shared.link("compare", markdown("{}", headline(sentence)[0]), where, ":material/balance:")


def strip(entry: RunEntry, window: Window) -> None:
    """The judged figures: value, how it stands to its own start, and the severity of an alert that fires on it."""
    st.html(STYLE)
    found = vitals(window, KEYS, _fires(data.transitions(entry.name)))
    st.html(html('<div class="rlvr-vitals" role="list" aria-label="Figures beside their start">{}</div>',
                 Markup().join(_cell(vital) for vital in found)))  # fmt: skip


def _fires(transitions: Frame) -> dict[str, tuple[str, str]]:
    """{series: (severity, what the rule says)} of the alerts that fire now; of several on one series the worst."""
    worst_last = sorted(_firing(transitions), key=lambda i: SEVERITY_RANK[transitions["severity"][i]])
    rules = {i: RULES[transitions["rule"][i]] for i in worst_last if transitions["rule"][i] in RULES}
    return {rule.watches: (str(transitions["severity"][i]), rule.says) for i, rule in rules.items()}


def alerts(entry: RunEntry) -> None:
    """The alerts of the run behind one line."""
    transitions = data.transitions(entry.name)
    if n_rows(transitions):
        verdict.alert_list(transitions, data.marks(entry.name))


def _cell(vital: Vital) -> Markup:
    theme = shared.theme()
    name, unit, help_text = label(vital.key)
    colours = {"better": theme.good, "as before": theme.good, "worse": theme.severity["warning"]} | theme.severity
    value = shared.number(vital.level, unit)
    return html(
        '<div role="listitem" style="border-color:{}" title="{}"><span>{}</span><b>{}</b><span>{}</span></div>',
        colours.get(vital.judgement, theme.muted),
        help_text,
        name.removesuffix(", heldout"),
        f"{value} {unit}" if unit in ("nats", "s", "tokens") else value,
        vital.word,
    )
