"""Overview: every run of the store with its status, newest figures and alerts; a click leads to the run."""

from __future__ import annotations

from html import escape

import streamlit as st

from dashboard import data
from dashboard.figures.lines import sparkline
from dashboard.figures.theme import arm_colours, label
from dashboard.views import shared
from monitor.queries import Frame, series_of
from monitor.store.tail import RunEntry

SHOWN = ("entropy", "reward")


def page() -> None:
    entries = _filtered(data.runs())
    names = [entry.name for entry in entries]
    series, spans = data.scalars(names, SHOWN), data.spans(names)
    colours = arm_colours([str(entry.info.get("weighting", "")) for entry in data.runs()], shared.theme())
    for entry in entries:
        with st.container(border=True, key=f"run-{entry.name}"):
            _card(entry, series, spans, colours.get(str(entry.info.get("weighting", "")), shared.theme().accent))


def _filtered(entries: list[RunEntry]) -> list[RunEntry]:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        running = sum(entry.status == "running" for entry in entries)
        st.markdown(f"#### {len(entries)} runs" if len(entries) != 1 else "#### 1 run", width="content")
        st.caption(f"{running} running · {data.store_path()}", width="content")
    if len(entries) <= 6:
        return entries
    text = st.text_input("Filter", st.query_params.get("filter", ""), placeholder="name, task or weighting")
    st.query_params["filter"] = text
    return [entry for entry in entries if text.lower() in f"{entry.name} {shared.describe(entry)}".lower()]


def _card(entry: RunEntry, series: Frame, spans: Frame, colour: str) -> None:
    who, entropy, reward = st.columns([2.2, 1, 1], vertical_alignment="center")
    with who:
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            shared.link("run", f"**{entry.name}**", {"run": entry.name})
            shared.status_badge(entry)
        st.caption(_progress(entry, series))
        with st.container(horizontal=True, gap="small"):
            shared.alert_badges(spans, entry.name)
    for column, key in ((entropy, "entropy"), (reward, "reward")):
        name, unit, help_text = label(key)
        _, values = series_of(series, entry.name, key)
        latest = shared.number(float(values[-1])) if len(values) else "–"
        unit_text = f'<span style="opacity:.65;font-size:.8rem"> {escape(unit)}</span>' if len(values) else ""
        column.html(
            f'<div title="{escape(help_text)}"><div style="font-size:.8rem;opacity:.65">{escape(name)}</div>'
            f'<div style="display:flex;align-items:center;gap:.8rem;flex-wrap:wrap">'
            f'<span style="font-size:1.35rem;font-weight:600;min-width:4.5rem">{latest}{unit_text}</span>'
            f"{sparkline(values, colour)}</div></div>"
        )


def _progress(entry: RunEntry, series: Frame) -> str:
    steps, _ = series_of(series, entry.name, SHOWN[0])
    planned = entry.info.get("config", {}).get("steps")
    text = "no steps yet" if not len(steps) else f"step {steps[-1]}" + (f" of {planned}" if planned else "")
    created = entry.info.get("created")
    return " · ".join([shared.describe(entry), text] + ([f"started {shared.age(float(created))}"] if created else []))
