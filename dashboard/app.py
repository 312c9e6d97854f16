"""The frame of the dashboard: the store, the page bar, and a check each half second that redraws when data changed."""

from __future__ import annotations

import streamlit as st

from dashboard import data
from dashboard.components.history import keep_back_working
from dashboard.escape import markdown
from dashboard.figures.theme import DARK
from dashboard.login import is_allowed, offer_logout
from dashboard.views import alerts, compare, method, overview, run, shared, sql, tokens

PAGES = (
    ("overview", "Overview", ":material/dashboard:", overview.page),
    ("run", "Run", ":material/show_chart:", run.page),
    ("compare", "Compare", ":material/compare_arrows:", compare.page),
    ("tokens", "Tokens", ":material/article:", tokens.page),
    ("method", "Method", ":material/function:", method.page),
    ("alerts", "Alerts", ":material/notifications:", alerts.page),
    ("sql", "SQL", ":material/database:", sql.page),
)
STYLE = """<style>
.stMainBlockContainer { padding: 4.2rem 2.5rem 3rem; max-width: 1760px; }
[class*="st-key-grid"] { display: grid; gap: .75rem 1.25rem;
                         grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr)); }
[class*="st-key-verdict-links"] { row-gap: .6rem !important; }
[class*="st-key-unseen-"] { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
[data-testid="stMetricValue"] { font-size: 1.45rem; }
[data-testid="stPageLink"] p { font-size: 1rem; line-height: 1.35; white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 640px) { .stMainBlockContainer { padding-left: 0.9rem; padding-right: 0.9rem; } }
</style>"""
READABLE = """<style>
.stApp [data-testid=stCaptionContainer] { opacity: .78; }
</style>"""  # Streamlit's own .6 is too faint
ON_ACCENT = """<style>
.stApp :is([data-tag], [kind=primary]), .stApp :is([data-tag], [kind=primary]) * { color: #000; }
</style>"""  # white on the accent of the dark scheme is too faint


def main() -> None:
    """The script that Streamlit runs for every session and every redraw."""
    run_name = st.query_params.get("run", "")
    st.set_page_config(page_title=f"{run_name} · rlvr monitor".removeprefix(" · "), page_icon="📈", layout="wide")
    if not is_allowed():
        return
    for path, title, icon, page in PAGES:
        shared.PAGES[path] = st.Page(page, title=title, icon=icon, url_path=path, default=path == "overview")
    chosen = st.navigation([shared.PAGES[path] for path, *_ in PAGES], position="top")
    shared.keep_choices(chosen.url_path)
    st.html(STYLE)
    keep_back_working()
    st.html(READABLE)
    if shared.theme() is DARK:
        st.html(ON_ACCENT)
    with st.spinner("Reading the store…"):  # which shows only where that takes its time: when the server is new
        drawn = data.poll()
    for of_a_page in ("follows", "until"):
        st.session_state.pop(of_a_page, None)
    if _ready():
        _quarantine_banner()
        chosen.run()
    offer_logout()
    _watch(drawn, st.session_state.get("follows"))


def _ready() -> bool:
    store = data.store_path()
    if not store.exists():
        st.error(markdown("No store at {}.", store), icon=":material/folder_off:")
        st.markdown("Start a run that records there (`rlvr train --store STORE`), or open another store with "
                    "`rlvr dashboard STORE`. This page fills by itself.")  # fmt: skip
        return False
    if not data.runs():
        st.info(markdown("No runs in {} yet.", store), icon=":material/hourglass_empty:")
        st.markdown("`rlvr train --store STORE` starts one, `rlvr demo` two. They appear here by themselves.")
        return False
    return True


def _quarantine_banner() -> None:
    damaged = data.tail().quarantined()
    if damaged:
        total = sum(len(names) for names in damaged.values())
        which = ", ".join(f"{run}: {names[0]}" for run, names in damaged.items())
        st.warning(
            markdown(
                "{count} could not be read and {be} left out ({which}). Everything else is shown. "
                "`rlvr store check` says what is wrong.",
                count=f"{total} files" if total > 1 else "1 file",
                be="are" if total > 1 else "is",
                which=f"{which}, ..." if total > len(damaged) else which,
            ),
            icon=":material/broken_image:",
        )


@st.fragment(run_every=0.5)
def _watch(drawn: int, follows: shared.Follows | None) -> None:
    """Makes the page anew if the data's version changed, or sends what is new. Else this costs a few stat calls."""
    if st.query_params.get("updates") == shared.PAUSED:
        return
    is_new = data.poll() != drawn
    if is_new if follows is None else follows.is_due(is_new=is_new):
        st.rerun()
    if follows is not None:
        follows.send()


if __name__ == "__main__":
    main()
