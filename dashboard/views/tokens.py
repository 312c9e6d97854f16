"""Tokens: the rollouts of a step, group by group; tokens looked for by text or by value; the words behind a change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import streamlit as st

from dashboard import data
from dashboard.components.rollouts import COLOUR_BY, Lit, Place, sent_rollouts, show_found, show_rollouts
from dashboard.escape import html, markdown
from dashboard.figures.theme import label
from dashboard.views import shared
from dashboard.views.words import lost_words, selected_words
from monitor.metrics import cell_bounds, metric
from monitor.queries.frames import Frame, n_rows, select
from monitor.store.tail import RunEntry

PAGE_TOKENS = 8000  # tokens drawn at once
MOST_FOUND = 200  # found tokens that are listed
CONTEXT = 16  # tokens on each side of a found one
SORTS = {"sample": "as sampled", "high": "highest reward", "low": "lowest reward", "long": "longest"}
FILTERS = ("all", "correct", "incorrect")
VIEWS = {"rollouts": "Rollouts", "selected": "What is selected", "lost": "What lost entropy"}
_MARKS = {1.0: "✓", 0.0: "✗"}  # of correct rollouts and others; none where it is not known
NOT_OF_TOKENS = ("log_ratio_abs", "predicted_entropy_change")  # the store has them of whole steps alone
CELLS = {"entropy": "nats96", "deviation": "deviation96"}  # metric of a cell in the URL -> its histogram's cells


def page() -> None:
    shared.title("Tokens")
    left, right = st.columns([2, 3])
    with left:
        entry = shared.pick_run()
    if entry is None:
        return
    shared.what_now(entry)
    steps = data.sample_steps(entry.name)
    if not len(steps):
        st.info("This run has no rollouts stored yet. They come with each recorded step; if raw tokens were pruned or "
                "record.tokens is off, only curves and histograms remain.", icon=":material/article:")  # fmt: skip
        return
    with right:
        step = _pick_step(entry, steps, data.token_steps(entry.name))
    rows = data.samples(entry.name, step)
    if not n_rows(rows):
        st.info(
            markdown("Step {} has no rollouts stored: raw tokens were thinned or pruned. Choose another step.", step)
        )
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        view = shared.choose(
            st.segmented_control, "View", "view", list(VIEWS), "rollouts", format_func=VIEWS.get, required=True
        )
        text = _find_box() if view == "rollouts" else ""
    if view == "selected":
        selected_words(entry, step)
    elif view == "lost":
        lost_words(entry, data.token_steps(entry.name), step)
    else:
        lit = _found(entry, step, rows, text)
        _group(entry, step, rows, lit)


def _pick_step(entry: RunEntry, steps: np.ndarray, raw: np.ndarray) -> int:
    """The step to show: that of the URL, or the nearest one that has what the URL asks for. Older links stay good."""
    options = [int(step) for step in steps]
    needs_raw = len(raw) and (st.query_params.get("view", "rollouts") != "rollouts" or "cell" in st.query_params)
    wanted, able = st.query_params.get("step", ""), [int(step) for step in raw] if needs_raw else options
    missed = bool(wanted) and wanted not in map(str, able)
    if missed and wanted.lstrip("-").isdigit():
        st.query_params["step"] = str(min(able, key=lambda step: abs(step - int(wanted))))
    step = options[0]
    if len(options) > 1:
        text = markdown("Step, newest {}", options[-1])
        step = int(shared.choose(st.select_slider, text, "step", options, able[-1]))
    if missed:
        what = "raw tokens" if needs_raw else "stored rollouts"
        st.caption(markdown("Step {} has no {}; the nearest one is shown.", wanted, what))
    if not needs_raw and len(raw) and step not in raw:
        nearest = int(raw[np.argmin(np.abs(raw - step))])
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.caption("Of this step only the texts were kept.", width="content")
            where = {"run": entry.name, "step": str(nearest)}
            shared.link("tokens", markdown("Step {} has its tokens", nearest), where, ":material/arrow_forward:")
    return step


# --- tokens looked for ---


def _find_box() -> str:
    st.session_state["find_text"] = st.query_params.get("find", "")

    def remember() -> None:
        st.query_params.pop("cell", None)
        shared.put_parameter("find", st.session_state["find_text"])

    return st.text_input(
        "Find in all rollouts of this step", key="find_text", on_change=remember, placeholder="text, then Enter",
        icon=":material/search:", width=320,
    )  # fmt: skip


def _cell() -> Lit | None:
    """The cell of a histogram in the URL, as METRIC:CELL."""
    key, _, number = st.query_params.get("cell", "").partition(":")
    if key not in CELLS or not (number.isascii() and number.isdigit()):
        return None
    lows, highs = cell_bounds(CELLS[key])
    return Lit(key, float(lows[int(number)]), float(highs[int(number)])) if int(number) < len(lows) else None


def _found(entry: RunEntry, step: int, rows: Frame, text: str) -> Lit | None:
    """The tokens of the step that the URL asks for, by their text or by a cell of a histogram; returns that cell."""
    cell = _cell()
    if cell is not None:
        found = data.cell_tokens(entry.name, step, cell.key, cell.low, cell.high, MOST_FOUND)
        listed = [
            _in_context(rows, _row_of(rows, found["rank"][i], found["sample"][i]), int(position), float(value))
            for i, (position, value) in enumerate(zip(found["position"], found["value"], strict=True))
        ] if n_rows(found) else []  # fmt: skip
        n, n_rollouts = (int(found["n"][0]), int(found["n_rollouts"][0])) if n_rows(found) else (0, 0)
        said = markdown("**{}** of step {} with {} {}, in {} of {} rollouts", _counted(n), step,
                        label(cell.key)[0].lower(), _range(cell), n_rollouts, n_rows(rows))  # fmt: skip
    elif text:
        places = [(i, place) for i in range(n_rows(rows)) for place in _places(rows["token_texts"][i], text)]
        listed = [_in_context(rows, i, place) for i, place in places[:MOST_FOUND]]
        n, n_rollouts = len(places), len({i for i, _ in places})
        said = markdown("**{}** of {!r} at step {}, in {} of {} rollouts",
                        f"{n:,} place{'' if n == 1 else 's'}", text, step, n_rollouts, n_rows(rows))  # fmt: skip
    else:
        return None
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(said, width="content")
        if n > len(listed):
            st.caption(markdown("the first {} are listed", len(listed)), width="content")
        st.button("Clear", icon=":material/close:", type="tertiary", on_click=_clear)
    opened = show_found([row for row in listed if row]) if listed else None
    if opened is not None:
        _open(rows, opened)
    return cell


def _counted(n: int) -> str:
    return f"{n:,} token{'' if n == 1 else 's'}"


def _range(cell: Lit) -> str:
    unit = label(cell.key)[1]
    if not np.isfinite(cell.low):
        return f"below {cell.high:.3g} {unit}"
    if not np.isfinite(cell.high):
        return f"from {cell.low:.3g} {unit} on"
    return f"from {cell.low:.3g} to {cell.high:.3g} {unit}"


def _places(texts: Sequence[str], wanted: str) -> list[int]:
    """The tokens at which `wanted` begins in the rollout, whatever its case and however it is cut into tokens."""
    whole, wanted = "".join(texts).lower(), wanted.lower()
    starts = np.cumsum([0, *(len(text.lower()) for text in texts)])
    found, at = list[int](), whole.find(wanted)
    while at >= 0:
        found.append(int(np.searchsorted(starts, at, side="right")) - 1)
        at = whole.find(wanted, at + 1)
    return list(dict.fromkeys(found))


def _row_of(rows: Frame, rank: int, sample: int) -> int | None:
    at = np.flatnonzero((rows["rank"] == rank) & (rows["sample"] == sample))
    return int(at[0]) if len(at) else None


def _in_context(rows: Frame, i: int | None, position: int, value: float | None = None) -> dict[str, Any]:
    """A found token as `show_found` lists it; {} where its rollout was not kept."""
    if i is None:
        return {}
    texts = [str(text) for text in rows["token_texts"][i]]
    return {
        "sample": int(rows["sample"][i]),
        "position": position,
        "where": f"{_MARKS.get(float(rows['correct'][i]), '')} rollout {rows['sample'][i]} · {position}".lstrip(),
        "before": "".join(texts[max(0, position - CONTEXT) : position]),
        "text": texts[position] if position < len(texts) else "",
        "after": "".join(texts[position + 1 : position + 1 + CONTEXT]),
        "value": "" if value is None else f"{value:.3g}",
    }


def _clear() -> None:
    for name in ("find", "cell"):
        shared.put_parameter(name, "")


def _open(rows: Frame, place: Place) -> None:
    """Shows the rollout of a found token, with the focus on it."""
    at = np.flatnonzero(rows["sample"] == place.sample)
    st.query_params.update(
        group=str(rows["group_id"][at[0]]), sample="all", show="all", at=f"{place.sample}:{place.position}"
    )
    st.rerun()


# --- the rollouts of a group ---


def _group(entry: RunEntry, step: int, rows: Frame, lit: Lit | None) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        groups = [int(group) for group in dict.fromkeys(rows["group_id"])]
        chosen = shared.choose(
            st.selectbox, "Prompt", "group", groups, groups[0], format_func=lambda group: _group_name(rows, group)
        )
        mine = select(rows, rows["group_id"] == chosen)
        samples = [int(sample) for sample in mine["sample"]]
        only = shared.choose(
            st.selectbox, "Rollout", "sample", ["all", *samples], "all", width=150,
            format_func=lambda sample: "all of the group" if sample == "all" else f"rollout {sample}",
        )  # fmt: skip
        order = shared.choose(st.selectbox, "Sort", "sort", list(SORTS), "sample", format_func=SORTS.get, width=150)
        kept = shared.choose(st.segmented_control, "Show", "show", FILTERS, "all", required=True)
        colour_by = shared.choose(st.segmented_control, "Colour by", "colour", COLOUR_BY, "entropy", required=True)
    _prompt(mine)
    mine = _ordered(mine, order, kept)
    if only != "all":
        mine = select(mine, mine["sample"] == only)
    if not n_rows(mine):
        st.info(markdown("No {} rollout here. Choose others above.", kept))
        return
    _rollouts(entry, step, mine, colour_by, lit)


def _group_name(rows: Frame, group: int) -> str:
    mine = select(rows, rows["group_id"] == group)
    correct = mine["correct"].astype(float)  # nan where the source does not tell it
    n, known = n_rows(mine), np.isfinite(correct).all()
    share = f"{int(correct.sum())} of {n} correct" if known else f"{n} rollouts"
    text = " ".join(str(mine["prompt"][0]).split())
    return f"{group} · {share} · {'…' + text[-60:] if len(text) > 60 else text}"  # equal names would be one option


def _prompt(rows: Frame) -> None:
    if n_rows(rows):
        st.html(html('<div style="font-size:.8rem;opacity:.75">{}</div>'
                     '<div style="white-space:pre-wrap;overflow-wrap:anywhere;'
                     'font-family:var(--st-code-font,monospace);font-size:.9rem;max-height:14rem;overflow:auto;'
                     'border-left:3px solid rgba(128,128,128,.35);padding:.2rem .8rem">{}</div>',
                     ", ".join(filter(None, (f"Prompt {rows['prompt_id'][0]}".strip(), rows["split"][0]))),
                     rows["prompt"][0]))  # fmt: skip


def _ordered(rows: Frame, order: str, kept: str) -> Frame:
    if kept != "all":
        rows = select(rows, rows["correct"].astype(float) == float(kept == "correct"))
    keys = {"high": -rows["reward"], "low": rows["reward"], "long": -rows["n_tokens"]}
    places = np.argsort(keys.get(order, rows["sample"]), kind="stable")
    return {name: column[places] for name, column in rows.items()}


def _rollouts(entry: RunEntry, step: int, rows: Frame, colour_by: str, lit: Lit | None) -> None:
    shown = np.nancumsum(rows["n_tokens"].astype(float)) <= PAGE_TOKENS
    shown[0] = True
    visible = select(rows, shown)
    tokens = data.tokens(entry.name, step, [int(sample) for sample in visible["sample"]], int(visible["rank"][0]))
    sent = sent_rollouts(visible, tokens)
    recorded = [key for key in COLOUR_BY if {"surprisal": "logprob"}.get(key, key) in sent["values"]]
    if recorded and colour_by not in recorded:
        st.caption(markdown("The run has no {} of tokens; they are coloured by {}.", colour_by, recorded[0]))
        colour_by = recorded[0]
    if recorded:
        st.caption(markdown("{}", metric(colour_by).help))
    show_rollouts(sent, colour_by, shared.theme(), lit=lit, at=st.query_params.get("at", ""))
    _not_of_tokens(entry, step)
    if not shown.all():
        st.caption(markdown("{} further rollouts of this group: choose one above to read it.", int((~shown).sum())))


def _not_of_tokens(entry: RunEntry, step: int) -> None:
    """Why two colours are not offered, and what the store has in their place."""
    told = list[str]()
    for key in NOT_OF_TOKENS:
        steps, values = data.followed(entry.name).series(key)
        at = np.flatnonzero(steps == step)
        name, unit, _ = label(key)
        value = f"{shared.number(float(values[at[0]]))} {unit}".rstrip() if len(at) else "not recorded"
        told.append(f"{name}: {value}")
    st.caption(
        markdown(
            "Log-ratio and predicted entropy change (dH) are no colours. They need what the store does not keep of a "
            "token: its probability before the update, and the sums of p² ln p and p³ over the vocabulary. "
            "Of the whole step {}: {}.",
            step, "; ".join(told),
        )
    )  # fmt: skip
