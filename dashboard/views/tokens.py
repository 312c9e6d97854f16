"""Tokens: the rollouts of a step, group by group. Every token is coloured by entropy, deviation or weight."""

from __future__ import annotations

import numpy as np
import streamlit as st

from dashboard import data
from dashboard.components.tokens import COLOUR_BY, legend_html, token_css, token_scale, tokens_html
from dashboard.escape import html, markdown
from dashboard.figures.theme import label
from dashboard.views import shared
from monitor.metrics import metric
from monitor.queries.frames import Frame, n_rows, select
from monitor.store.tail import RunEntry

PAGE_TOKENS = 4000  # tokens drawn at once
SORTS = {"sample": "as sampled", "high": "highest reward", "low": "lowest reward", "long": "longest"}
FILTERS = ("all", "correct", "incorrect")


def page() -> None:
    left, right = st.columns([2, 3])
    with left:
        entry = shared.pick_run()
    if entry is None:
        return
    steps = data.sample_steps(entry.name)
    if not len(steps):
        st.info("This run has no rollouts stored yet. They come with each recorded step; if raw tokens were pruned or "
                "record.tokens is off, only curves and histograms remain.", icon=":material/article:")  # fmt: skip
        return
    with right:
        step = _pick_step(steps)
    rows = data.samples(entry.name, step)
    if not n_rows(rows):
        st.info(
            markdown("Step {} has no rollouts stored: raw tokens were thinned or pruned. Choose another step.", step)
        )
        return
    _group(entry, step, rows)


def _pick_step(steps: np.ndarray) -> int:
    options = [int(step) for step in steps]
    wanted = st.query_params.get("step", "")
    if wanted and wanted not in map(str, options):
        st.caption(markdown("Step {} has no stored rollouts; the nearest one is shown.", wanted))
        if wanted.lstrip("-").isdigit():
            st.query_params["step"] = str(min(options, key=lambda option: abs(option - int(wanted))))
    if len(options) == 1:
        return options[0]
    return shared.choose(st.select_slider, markdown("Step, newest {}", options[-1]), "step", options, options[-1])


def _group(entry: RunEntry, step: int, rows: Frame) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        groups = [int(group) for group in dict.fromkeys(rows["group_id"])]
        chosen = shared.choose(
            st.selectbox, "Prompt", "group", groups, groups[0], format_func=lambda group: _group_name(rows, group)
        )
        colour_by = shared.choose(st.segmented_control, "Colour by", "colour", COLOUR_BY, "entropy", required=True)
        order = shared.choose(st.selectbox, "Sort", "sort", list(SORTS), "sample", format_func=SORTS.get, width=170)
        kept = shared.choose(st.segmented_control, "Show", "show", FILTERS, "all", required=True)
    mine = select(rows, rows["group_id"] == chosen)
    _prompt(mine)
    mine = _ordered(mine, order, kept)
    if not n_rows(mine):
        st.info(markdown("No {} rollout in this group.", kept))
        return
    samples = [int(sample) for sample in mine["sample"]]
    only = shared.choose(
        st.selectbox, "Rollout", "sample", ["all", *samples], "all",
        format_func=lambda sample: "all of the group" if sample == "all" else f"rollout {sample}",
    )  # fmt: skip
    if only != "all":
        mine = select(mine, mine["sample"] == only)
    _rollouts(entry, step, mine, colour_by)


def _group_name(rows: Frame, group: int) -> str:
    mine = select(rows, rows["group_id"] == group)
    share = f"{int(mine['correct'].sum())} of {n_rows(mine)} correct"
    text = " ".join(str(mine["prompt"][0]).split())
    return f"{group} · {share} · {'…' + text[-60:] if len(text) > 60 else text}"  # equal names would be one option


def _prompt(rows: Frame) -> None:
    if n_rows(rows):
        st.html(html('<div style="font-size:.8rem;opacity:.65">Prompt {}, {}</div>'
                     '<div style="white-space:pre-wrap;overflow-wrap:anywhere;'
                     'font-family:var(--st-code-font,monospace);font-size:.9rem;max-height:14rem;overflow:auto;'
                     'border-left:3px solid rgba(128,128,128,.35);padding:.2rem .8rem">{}</div>',
                     rows["prompt_id"][0], rows["split"][0], rows["prompt"][0]))  # fmt: skip


def _ordered(rows: Frame, order: str, kept: str) -> Frame:
    if kept != "all":
        rows = select(rows, rows["correct"].astype(bool) == (kept == "correct"))
    keys = {"high": -rows["reward"], "low": rows["reward"], "long": -rows["n_tokens"]}
    places = np.argsort(keys.get(order, rows["sample"]), kind="stable")
    return {name: column[places] for name, column in rows.items()}


def _rollouts(entry: RunEntry, step: int, rows: Frame, colour_by: str) -> None:
    theme, scale = shared.theme(), token_scale(colour_by)
    shown = np.cumsum(rows["n_tokens"]) <= PAGE_TOKENS
    shown[0] = True
    visible = select(rows, shown)
    tokens = data.tokens(entry.name, step, [int(sample) for sample in visible["sample"]], int(visible["rank"][0]))
    weights = tokens["weight"] if colour_by == "weight" and n_rows(tokens) else None
    st.html(html("{}{}", token_css(theme), legend_html(scale, weights)))
    st.caption(markdown("{} Hover a token for its values.", metric(colour_by).help))
    for i in range(n_rows(visible)):
        _rollout(visible, i, tokens, scale)
    if not shown.all():
        st.caption(markdown("{} further rollouts of this group: choose one above to read it.", int((~shown).sum())))


def _rollout(rows: Frame, i: int, tokens: Frame, scale) -> None:
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.markdown(markdown("**Rollout {}**", rows["sample"][i]), width="content")
            correct = bool(rows["correct"][i])
            st.badge("correct" if correct else "incorrect", color="green" if correct else "gray",
                     icon=":material/check:" if correct else ":material/close:")  # fmt: skip
            if rows["truncated"][i]:
                st.badge("truncated", color="orange", icon=":material/content_cut:")
            reward, advantage, n_tokens = (rows[key][i] for key in ("reward", "advantage", "n_tokens"))
            figures = markdown("reward {:.3g} · advantage {:+.3g} · {} tokens", reward, advantage, n_tokens)
            st.caption(figures, width="content")
        mine = select(tokens, tokens["sample"] == rows["sample"][i]) if n_rows(tokens) else {}
        if n_rows(mine):
            texts = list(rows["token_texts"][i])
            means = " · ".join(f"{label(key)[0].lower()} {np.mean(mine[key]):.3f}" for key in ("entropy", "deviation"))
            st.html(html('{}<div style="font-size:.8rem;opacity:.65">mean {} nats · {:.0%} selected</div>',
                         tokens_html(texts, mine, scale), means, np.mean(mine["weight"] > 0)))  # fmt: skip
        else:
            st.caption("The raw tokens of this rollout were not kept. This is its text:")
            st.html(html('<div style="white-space:pre-wrap">{}</div>', rows["completion"][i]))
