"""Overview: every run of the store with its status, newest figures and alerts; a click leads to the run."""

from __future__ import annotations

import base64

import streamlit as st
from markupsafe import Markup

from dashboard import data
from dashboard.escape import html, markdown
from dashboard.figures.lines import Line, lines, sparkline
from dashboard.figures.theme import arm_colours, label
from dashboard.views import shared
from monitor.queries.frames import Frame
from monitor.queries.series import series_of
from monitor.store.tail import RunEntry

SHOWN = ("entropy", "reward")
TOGETHER = 8  # most runs drawn in one chart


def page() -> None:
    entries = _filtered(data.runs())
    names = [entry.name for entry in entries]
    series, spans = data.scalars(names, SHOWN), data.spans(names)
    colours = arm_colours([str(entry.info.get("weighting", "")) for entry in data.runs()], shared.theme())
    for entry in entries:
        with st.container(border=True, key=f"run-{entry.name}"):
            _card(entry, series, spans, colours.get(str(entry.info.get("weighting", "")), shared.theme().accent))
    if len(series["step"]):
        _together(entries, series)


def _filtered(entries: list[RunEntry]) -> list[RunEntry]:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        running = sum(entry.status == "running" for entry in entries)
        st.markdown(markdown("#### {} runs", len(entries)) if len(entries) != 1 else "#### 1 run", width="content")
        st.caption(markdown("{} running · {}", running, data.store_path()), width="content")
    if len(entries) <= 6:
        return entries
    text = st.text_input("Filter", st.query_params.get("filter", ""), placeholder="name, task or weighting")
    st.query_params["filter"] = text
    return [entry for entry in entries if text.lower() in f"{entry.name} {shared.describe(entry)}".lower()]


def _card(entry: RunEntry, series: Frame, spans: Frame, colour: str) -> None:
    who, entropy, reward = st.columns([2.2, 1, 1], vertical_alignment="center")
    with who:
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            shared.link("run", markdown("**{}**", entry.name), {"run": entry.name})
            shared.status_badge(entry)
        st.caption(markdown("{}", _progress(entry, series)))
        with st.container(horizontal=True, gap="small"):
            shared.alert_badges(spans, entry.name)
    for column, key in ((entropy, "entropy"), (reward, "reward")):
        name, unit, help_text = label(key)
        _, values = series_of(series, entry.name, key)
        latest = shared.number(float(values[-1])) if len(values) else "–"
        column.html(
            html(
                '<div title="{help}"><div style="font-size:.8rem;opacity:.65">{name}</div>'
                '<div style="display:flex;align-items:center;gap:.8rem;flex-wrap:wrap">'
                '<span style="font-size:1.35rem;font-weight:600;min-width:4.5rem">{latest}'
                '<span style="opacity:.65;font-size:.8rem"> {unit}</span></span>{image}</div></div>',
                help=help_text,
                name=name,
                latest=latest,
                unit=unit if len(values) else "",
                image=_image(sparkline(values, colour), name),
            )
        )


def _image(svg: str, name: str) -> Markup:
    """The SVG as an image, because Streamlit strips inline SVG from a page's HTML."""
    encoded = base64.b64encode(svg.encode()).decode()
    return html('<img alt="{} over steps" src="data:image/svg+xml;base64,{}">', name, encoded) if svg else Markup("")


def _together(entries: list[RunEntry], series: Frame) -> None:
    """All runs in one chart, so that a run which leaves the others is seen at once."""
    theme = shared.theme()
    colours = arm_colours([str(entry.info.get("weighting", "")) for entry in entries], theme)
    for column, key in zip(st.columns(2), SHOWN, strict=True):
        drawn = [
            Line(entry.name, *series_of(series, entry.name, key), colours[str(entry.info.get("weighting", ""))])
            for entry in entries[:TOGETHER]
        ]
        with column:
            shared.chart(lines(theme, key, [line for line in drawn if len(line.x)]), f"all-{key}")


def _progress(entry: RunEntry, series: Frame) -> str:
    steps, _ = series_of(series, entry.name, SHOWN[0])
    planned = entry.info.get("config", {}).get("steps")
    text = shared.no_steps(entry) if not len(steps) else f"step {steps[-1]}" + (f" of {planned}" if planned else "")
    created = entry.info.get("created")
    return " · ".join([shared.describe(entry), text] + ([f"started {shared.age(float(created))}"] if created else []))
