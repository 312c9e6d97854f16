"""The browser's history: Back leads to the page before (history.js)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import streamlit as st


@cache
def _component() -> Callable:
    return st.components.v2.component("rlvr_history", js=Path(__file__).with_name("history.js").read_text())


def keep_back_working() -> None:
    """On every page, before it writes into its address."""
    with st.container(key="unseen-history"):
        _component()(key="history")
