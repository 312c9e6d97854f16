"""Overview: every run of the store with its status, health, newest figures and alerts; a click leads to the run."""

from __future__ import annotations

import base64
from collections.abc import Mapping

import streamlit as st
from markupsafe import Markup

from dashboard import data
from dashboard.escape import html, markdown
from dashboard.figures.lines import Line, lines, sparkline
from dashboard.figures.theme import arm_colours, label
from dashboard.views import shared, verdict
from monitor.queries.differences import setting
from monitor.queries.frames import Frame
from monitor.queries.series import series_of
from monitor.store.tail import RunEntry

SHOWN = ("entropy", "reward")
TOGETHER = 8  # most runs drawn in one chart

Verdicts = Mapping[str, verdict.Verdict | None]


def page() -> None:
    everything = data.runs()
    said = data.verdicts([entry.name for entry in everything])
    verdicts = {entry.name: verdict.verdict_of(said, entry.name) for entry in everything}
    entries = _worst_first(_filtered(everything, verdicts), verdicts)
    names = [entry.name for entry in entries]
    series, spans = data.scalars(names, SHOWN), data.spans(names)
    colours = arm_colours([str(entry.info.get("weighting", "")) for entry in data.runs()], shared.theme())
    for entry in entries:
        with st.container(border=True, key=f"run-{entry.name}"):
            colour = colours.get(str(entry.info.get("weighting", "")), shared.theme().accent)
            _card(entry, series, spans, verdicts[entry.name], colour)
    if len(series["step"]):
        _together(entries, series)


def _worst_first(entries: list[RunEntry], verdicts: Verdicts) -> list[RunEntry]:
    """Runs that run now, worst first: they can still be saved. Those that ended stay as they are, newest first."""
    return sorted(entries, key=lambda entry: verdict.rank(verdicts[entry.name]) if entry.status == "running" else 99)


def _filtered(entries: list[RunEntry], verdicts: Verdicts) -> list[RunEntry]:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        running = sum(entry.status == "running" for entry in entries)
        st.markdown(markdown("#### {} runs", len(entries)) if len(entries) != 1 else "#### 1 run", width="content")
        st.caption(markdown("{} running · {}", running, data.store_path()), width="content")
        for health in ("critical", "warning"):
            count = sum(found is not None and found.health == health for found in verdicts.values())
            if count:
                colour, icon = verdict.HEALTH[health]
                st.badge(markdown("{} {}", count, health), color=colour, icon=icon)
    if len(entries) <= 6:
        return entries
    text = st.text_input("Filter", st.query_params.get("filter", ""), placeholder="name, task or weighting")
    st.query_params["filter"] = text
    return [entry for entry in entries if text.lower() in f"{entry.name} {shared.describe(entry)}".lower()]


def _card(entry: RunEntry, series: Frame, spans: Frame, found: verdict.Verdict | None, colour: str) -> None:
    who, entropy, reward = st.columns([2.2, 1, 1], vertical_alignment="center")
    with who:
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            shared.link("run", markdown("**{}**", entry.name), {"run": entry.name})
            shared.status_badge(entry)
            if found is not None:
                verdict.health_badge(found)
        st.caption(markdown("{}", _progress(entry, series)))
        if found is not None and found.health != "healthy":
            st.markdown(markdown(":small[{}]", found.sentence))
        with st.container(horizontal=True, gap="small"):
            verdict.alert_badges(spans, entry.name)
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
    planned = setting(entry.info, "config.steps", int)
    text = shared.no_steps(entry) if not len(steps) else f"step {steps[-1]}" + (f" of {planned}" if planned else "")
    created = entry.info.get("created")
    return " · ".join([shared.describe(entry), text] + ([f"started {shared.age(float(created))}"] if created else []))
