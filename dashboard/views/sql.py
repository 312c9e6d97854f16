"""SQL: any question to the store, also while runs write into it; its answer as a table, a plot and a CSV file."""

from __future__ import annotations

import time
from dataclasses import dataclass

import duckdb
import streamlit as st

from dashboard import data
from dashboard.escape import markdown
from dashboard.figures.query import numeric_columns, query_plot, text_columns
from dashboard.views import shared
from dashboard.views.downloads import csv_text
from monitor.errors import MonitorError
from monitor.queries.frames import Frame
from monitor.store.reader import Result

SHOWN_ROWS = 1000
NONE = "–"  # instead of a column
STYLE = "<style>.st-key-sql_text textarea { font-family: var(--st-code-font, monospace); font-size: .9rem; }</style>"
EXAMPLES = {  # title -> query; docs/store.md has more
    "How are my runs?": (
        "SELECT run, status, task, weighting, seed, acknowledged AS step, bytes\nFROM runs ORDER BY created"
    ),
    "Reward and entropy of each step": (
        "SELECT run, step, max(value) FILTER (name = 'reward') AS reward,\n"
        "    max(value) FILTER (name = 'entropy') AS entropy\nFROM steps GROUP BY run, step ORDER BY run, step"
    ),
    "How much entropy was lost since the first ten steps?": (
        "SELECT run, avg(value) FILTER (step <= first + 9) AS early, avg(value) FILTER (step > last - 10) AS late,\n"
        "    late / early AS ratio\nFROM (SELECT *, min(step) OVER (PARTITION BY run) AS first,\n"
        "    max(step) OVER (PARTITION BY run) AS last FROM steps WHERE name = 'entropy')\nGROUP BY run ORDER BY ratio"
    ),
    "The entropy fan of each step": (
        "SELECT run, step, hist_quantile(counts, edges_id, 0.1, min, max) AS p10,\n"
        "    hist_quantile(counts, edges_id, 0.5, min, max) AS p50,\n"
        "    hist_quantile(counts, edges_id, 0.9, min, max) AS p90\n"
        "FROM histograms WHERE metric = 'entropy' AND split = 'all' ORDER BY run, step"
    ),
    "Where do rollouts of a group deviate most?": (
        "SELECT t.run, t.step, t.sample, t.position, s.token_texts[t.position + 1] AS text, t.deviation, t.entropy,\n"
        "    t.weight\nFROM tokens t JOIN samples s USING (run, step, rank, sample)\nORDER BY t.deviation DESC LIMIT 20"
    ),
    "Entropy along the response, right and wrong": (
        "SELECT 10 * t.position // s.n_tokens AS tenth, CASE WHEN s.correct THEN 'right' ELSE 'wrong' END AS answer,\n"
        "    avg(t.entropy) AS entropy, avg(t.deviation) AS deviation, count(*) AS tokens\n"
        "FROM tokens t JOIN samples s USING (run, step, rank, sample) GROUP BY ALL ORDER BY answer, tenth"
    ),
    "Which alerts were there?": (
        "SELECT run, rule, severity, state, first_step, step, value, baseline, threshold, message\n"
        "FROM alerts ORDER BY ts DESC"
    ),
    "What was not recorded, and why?": "SELECT run, step, kind, message FROM events ORDER BY ts DESC",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a query: its rows, or why there are none; when it was asked and how long it took."""

    query: str
    rows: Result | None
    csv: bytes
    error: str
    ts: float
    seconds: float


def page() -> None:
    st.markdown("### SQL")
    st.html(STYLE)
    left, right = st.columns([3, 1.25], gap="medium")
    with right:
        _examples()
        _columns()
    with left:
        query, again = _editor()
        if not query:
            st.info("Write a query, or take an example. It may read everything in this store and change nothing.",
                    icon=":material/database:")  # fmt: skip
            return
        known = st.session_state.get("sql_answer")
        answer = known if known is not None and known.query == query and not again else _ask(query)
        st.session_state["sql_answer"] = answer
        _show(answer)


def _editor() -> tuple[str, bool]:
    """(the query, whether to ask it again though it is the same)."""
    asked = st.query_params.get("q", "")
    if st.session_state.get("sql_url") != asked:  # a link, Back, or an example
        st.session_state["sql_url"] = st.session_state["sql_text"] = asked
    elif "sql_text" not in st.session_state:  # the reader was on another page
        st.session_state["sql_text"] = asked
    text = st.text_area(
        "Query", key="sql_text", height=150, placeholder="SELECT run, status FROM runs",
        help="One SELECT on the views of this store. It cannot write, and ends after 10 s, at 1,000 MB or at 100,000 "
        "rows. Ctrl+Enter runs it.",
    )  # fmt: skip
    again = st.button("Run", type="primary", icon=":material/play_arrow:", help="Ctrl+Enter in the text does the same")
    query = text.strip()
    if query != asked:
        st.session_state["sql_url"] = query
        st.query_params.clear()
        if query:
            st.query_params["q"] = query
    return query, again


def _ask(query: str) -> Answer:
    began = time.monotonic()
    rows, error = None, ""
    with st.spinner("Asking the store…"):
        try:
            rows = data.locked_store().sql(query)
        except (duckdb.Error, MonitorError) as failure:
            error = str(failure).strip()
    seconds = time.monotonic() - began
    return Answer(query, rows, csv_text(rows.columns, rows.rows).encode() if rows else b"", error, time.time(), seconds)


def _show(answer: Answer) -> None:
    if answer.rows is None:
        first, _, rest = answer.error.partition("\n")
        st.error(markdown("{}", first), icon=":material/error:")
        if rest.strip():
            st.code(rest.strip("\n"), language=None)
        return
    n, shown = len(answer.rows), min(len(answer.rows), SHOWN_ROWS)
    with st.container(horizontal=True, vertical_alignment="center"):
        rows = markdown("{} row{}", f"{n:,}", "" if n == 1 else "s")
        st.markdown(rows, width="content")
        cut = f"the first {shown:,} are shown, the CSV file has all · " if shown < n else ""
        st.caption(markdown("{}{:.2f} s, asked {}", cut, answer.seconds, shared.age(answer.ts)), width="content")
        if n:
            # Made before the click: Streamlit may forget a file made at the click before the browser asks for it
            st.download_button(
                "CSV", answer.csv, "query.csv", "text/csv", icon=":material/download:", on_click="ignore"
            )
    if not n:
        st.caption("The query is fine and has no rows.")
        return
    st.dataframe(answer.rows.arrow.slice(0, SHOWN_ROWS), hide_index=True, height=min(420, 38 + 35 * shown))
    _plot(answer.rows.frame())


def _plot(rows: Frame) -> None:
    """One numeric column against another."""
    numbers, texts = numeric_columns(rows), text_columns(rows)
    if len(numbers) < 2 or not len(rows[numbers[0]]):
        return
    shared.small_heading("Plot")
    x_column, y_column, by_column = st.columns(3)
    with x_column:
        first = next((name for name in ("step", "tenth", "position") if name in numbers), numbers[0])
        x = shared.choose(st.selectbox, "x", "px", numbers, first)
    with y_column:
        y = shared.choose(st.selectbox, "y", "py", numbers, next(name for name in numbers if name != x))
    with by_column:
        by = shared.choose(st.selectbox, "one line for each", "pby", [NONE, *texts], texts[0] if texts else NONE)
    fig, left = query_plot(shared.theme(), rows, x, y, "" if by == NONE else by)
    shared.chart(fig, "sql-plot", group="")
    if left:
        st.caption(markdown("{}.", left.capitalize()))


def _examples() -> None:
    box = st.expander("Examples", icon=":material/lightbulb:", expanded=not st.query_params.get("q"))
    with box, st.container(gap="xsmall"):
        for number, (title, query) in enumerate(EXAMPLES.items()):
            st.button(
                markdown("{}", title), key=f"sql-example-{number}", type="tertiary", on_click=_take, args=(query,)
            )


def _take(query: str) -> None:
    st.query_params.clear()
    st.query_params["q"] = query


def _columns() -> None:
    """The views that a query can read, with their columns."""
    with st.expander("Views and columns", icon=":material/table:", expanded=True):
        for view, columns in data.views().items():
            st.markdown(markdown("**`{}`**", view))
            st.caption(markdown("{}", ", ".join(columns)))
        st.caption("VIEW_all also shows the steps of attempts that a resumed run replaced. docs/store.md explains all.")
