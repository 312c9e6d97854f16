"""Which token texts a weighting selects, and which lost the entropy: two views of the Tokens page.

A word is a token text, however often it was sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import streamlit as st

from dashboard import data
from dashboard.escape import markdown
from dashboard.views import shared
from monitor.queries.frames import Frame, n_rows
from monitor.stats.words import entropy_parts, log_odds
from monitor.store.tail import RunEntry

SHOWN = 15  # words of each table
NO_TOKENS = "The raw tokens of this step were not kept. Choose another step."


def selected_words(entry: RunEntry, step: int) -> None:
    """Words that are selected more often than others and less often, by the log-odds between the two sets of tokens."""
    words = data.words(entry.name, step)
    if not n_rows(words):
        st.info(NO_TOKENS)
        return
    heavy, rest = words["n_heavy"], words["n"] - words["n_heavy"]
    if not heavy.sum() or not rest.sum():
        st.info("All tokens of this step have the same weight, so none is selected.", icon=":material/balance:")
        return
    z = log_odds(heavy, rest)
    st.caption(
        markdown(
            "Token texts of step {}, by how much more often they are among the {:,} that weigh more than the mean than "
            "among the other {:,}. z is the log-odds ratio in standard errors (Monroe et al. 2008); beyond ±2 it is "
            "hardly chance for one text.",
            step, int(heavy.sum()), int(rest.sum()),
        )
    )  # fmt: skip
    order = np.argsort(-z, kind="stable")
    columns: dict[str, Callable[[np.ndarray], list[Any]]] = {
        "selected": lambda at: [f"{heavy[i]:,} of {words['n'][i]:,}" for i in at],
        "share": lambda at: [f"{heavy[i] / words['n'][i]:.0%}" for i in at],
        "mean entropy": lambda at: [f"{words['entropy'][i] / words['n'][i]:.3f}" for i in at],
        "z": lambda at: [f"{z[i]:+.1f}" for i in at],
    }
    with shared.grid("words"):
        for heading, places in (
            ("Selected more than others", [i for i in order[:SHOWN] if z[i] > 0]),
            ("Selected less", [i for i in order[::-1][:SHOWN] if z[i] < 0]),
        ):
            with st.container():
                shared.small_heading(heading)
                _table(words, np.array(places, int), columns, f"words-{heading}")


def lost_words(entry: RunEntry, steps: np.ndarray, step: int) -> None:
    """Of the entropy lost since an earlier step, the part of each word: the parts of all words add up to the loss."""
    before = [int(other) for other in steps if other < step]
    if not before:
        st.info("This is the first step with tokens, so there is none to compare it with. Choose a later step.")
        return
    since = shared.choose(st.select_slider, "Since step", "since", before, before[0]) if len(before) > 1 else before[0]
    parts = entropy_parts(data.words(entry.name, since), data.words(entry.name, step))
    if not n_rows(parts):
        st.info(NO_TOKENS)
        return
    lost = float(parts["lost"].sum())
    st.caption(
        markdown(
            "Mean entropy went from {:.3f} to {:.3f} nats between step {} and step {}. The part of a token text is its "
            "share of the tokens times the mean entropy where it was sampled, now minus then. All parts add up to the "
            "{} of {:.3f}.",
            float(parts["then"].sum()), float(parts["now"].sum()), since, step,
            "loss" if lost >= 0 else "gain", abs(lost),
        )
    )  # fmt: skip
    order = np.argsort(-parts["lost"], kind="stable")
    columns: dict[str, Callable[[np.ndarray], list[Any]]] = {
        "share of tokens": lambda at: [f"{parts['share_then'][i]:.1%} → {parts['share_now'][i]:.1%}" for i in at],
        "mean entropy": lambda at: [f"{_mean(parts, 'then', i)} → {_mean(parts, 'now', i)}" for i in at],
        "part, nats": lambda at: [f"{-parts['lost'][i]:+.4f}" for i in at],
        "of the change": lambda at: [
            f"{parts['lost'][i] / lost + 0.0:.0%}".replace("-0%", "0%") if lost else "–" for i in at
        ],
    }
    with shared.grid("words"):
        for heading, places in (
            ("Lost", [i for i in order[:SHOWN] if parts["lost"][i] > 0]),
            ("Gained", [i for i in order[::-1][:SHOWN] if parts["lost"][i] < 0]),
        ):
            with st.container():
                shared.small_heading(heading)
                _table(parts, np.array(places, int), columns, f"words-{heading}")


def _mean(parts: Frame, name: str, i: int) -> str:
    share = parts[f"share_{name}"][i]
    return f"{parts[name][i] / share:.3f}" if share else "–"


def _table(words: Frame, at: np.ndarray, columns: dict[str, Callable[[np.ndarray], list[Any]]], key: str) -> None:
    """Words with their figures; a chosen row is looked for in the rollouts."""
    if not len(at):
        st.caption("None.")
        return
    table = {"token": [repr(str(words["text"][i]))[1:-1].replace(" ", "·") for i in at]}
    table |= {name: column(at) for name, column in columns.items()}
    chosen = st.dataframe(
        table, hide_index=True, height="content", key=key, on_select="rerun", selection_mode="single-row",
        column_config={"token": st.column_config.TextColumn("token (choose to find it)")},
    )  # fmt: skip
    rows = chosen["selection"]["rows"]
    if rows:
        st.query_params.update(find=str(words["text"][at[rows[0]]]), view="rollouts", show="all", sample="all")
        st.query_params.pop("cell", None)
        st.rerun()
