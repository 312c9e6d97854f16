"""The SQL page: its examples, its answers, its errors, and what a query may not do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_browser import PATIENCE_S, opened, plot, until
from test_pages import open_page, told, words

from dashboard.figures.query import MOST_LINES, MOST_POINTS, numeric_columns, query_plot, text_columns
from dashboard.figures.theme import LIGHT
from dashboard.views.downloads import csv_text
from dashboard.views.sql import EXAMPLES
from monitor.store.reader import open_store


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_runs_on_the_locked_store_and_has_rows(store: Path, title: str) -> None:
    with open_store(store, locked=True) as opened:
        assert len(opened.sql(EXAMPLES[title])) > 0


def test_a_query_of_the_url_is_answered_with_table_plot_and_csv(monkeypatch, store: Path) -> None:
    query = "SELECT run, step, value FROM steps WHERE name = 'entropy' ORDER BY run, step"
    app = open_page(monkeypatch, store, "sql", q=query)
    assert app.text_area[0].value == query
    assert "80 rows" in words(app)  # two runs of 40 steps
    assert len(app.dataframe[0].value) == 80
    pickers = {box.label: box.value for box in app.selectbox}
    assert pickers == {"x": "step", "y": "value", "one line for each": "run"}
    assert app.get("download_button")[0].label == "CSV"


def test_what_is_typed_goes_into_the_url_and_an_example_into_the_text(monkeypatch, store: Path) -> None:
    app = open_page(monkeypatch, store, "sql")
    assert "Write a query" in words(app)
    app.text_area[0].set_value("SELECT count(*) AS n FROM runs").run()
    assert app.query_params["q"] == "SELECT count(*) AS n FROM runs" or app.query_params["q"] == [
        "SELECT count(*) AS n FROM runs"
    ]
    assert int(app.dataframe[0].value["n"][0]) == 2
    next(button for button in app.button if button.label.startswith("How are")).click().run()
    assert app.text_area[0].value == EXAMPLES["How are my runs?"]
    assert list(app.dataframe[0].value["run"]) == ["uniform-s0", "ict-s0"]


def test_the_views_stand_beside_with_their_columns(monkeypatch, store: Path) -> None:
    shown = words(open_page(monkeypatch, store, "sql"))
    for word in ("steps", "attempt, step, rank, ts, name, value", "token_texts", "lows, highs", "acknowledged"):
        assert word in shown.replace("\u2060", ""), word


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("SELECT nothing FROM steps", "nothing"),
        ("SELEC 1", "syntax error"),
        ("COPY steps TO '/tmp/x'", "SELECT"),
        ("SELECT * FROM read_csv('/etc/passwd')", "read_csv"),
        ("SELECT * FROM range(200000)", "more than 100,000 rows"),
    ],
)
def test_a_query_that_fails_says_why(monkeypatch, store: Path, query: str, why: str) -> None:
    app = open_page(monkeypatch, store, "sql", q=query)
    said = "\n".join([*(told(error) for error in app.error), *(str(code.value) for code in app.code)])
    assert why.lower() in said.lower() and not app.dataframe


def test_no_rows_and_more_rows_than_shown_are_said(monkeypatch, store: Path) -> None:
    assert "has no rows" in words(open_page(monkeypatch, store, "sql", q="SELECT * FROM steps WHERE false"))
    app = open_page(monkeypatch, store, "sql", q="SELECT range AS n FROM range(2500)")
    assert "2,500 rows" in words(app) and "the first 1,000 are shown" in words(app)
    assert len(app.dataframe[0].value) == 1000


def test_an_answer_stays_until_the_query_changes(monkeypatch, store: Path) -> None:
    app = open_page(monkeypatch, store, "sql", q="SELECT count(*) AS n FROM runs")
    first = app.session_state["sql_answer"]
    app.run()  # as after each new step of a live run
    assert app.session_state["sql_answer"] is first
    next(button for button in app.button if button.label == "Run").click().run()
    assert app.session_state["sql_answer"] is not first


def test_a_csv_file_has_every_row(store: Path) -> None:
    with open_store(store, locked=True) as opened:
        rows = opened.sql("SELECT 1 AS a, 'x,\"y' AS b, [1, 2] AS c UNION ALL SELECT NULL, NULL, NULL")
    assert csv_text(rows.columns, rows.rows) == 'a,b,c\n1,"x,""y","[1, 2]"\n,,\n'


def test_the_plot_draws_a_line_for_each_value_and_says_what_it_leaves_out() -> None:
    n = 2 * MOST_POINTS
    rows = {
        "run": np.array(["b", "a"] * (n // 2), object),
        "step": np.arange(n),
        "value": np.where(np.arange(n) == 3, np.nan, 1.0),
    }
    assert numeric_columns(rows) == ["step", "value"] and text_columns(rows) == ["run"]
    fig, left = query_plot(LIGHT, rows, "step", "value", "run")
    assert [trace.name for trace in fig.data] == ["b", "a"]
    assert left == "one row in 2 is drawn, rows without a number are left out (1)"
    # of the 5,000 of "a" one is nan; every second of the others is drawn
    assert [len(trace.x) for trace in fig.data] == [2500, 2500]
    assert fig.data[0].x[:3].tolist() == [0.0, 4.0, 8.0]
    many = {"run": np.array([f"r{i}" for i in range(20)], object), "x": np.arange(20), "y": np.arange(20)}
    fig, left = query_plot(LIGHT, many, "x", "y", "run")
    assert len(fig.data) == MOST_LINES and left == "8 of 20 lines are left out"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark-phone"])
def test_a_query_is_typed_run_and_drawn(browser, url: str, dark: bool) -> None:
    with opened(browser, f"{url}/sql", dark=dark) as page:
        box = page.get_by_role("textbox", name="Query")
        box.wait_for(timeout=PATIENCE_S * 1000)
        box.fill("SELECT run, step, value FROM steps WHERE name = 'reward' ORDER BY run, step")
        box.press("Control+Enter")
        page.get_by_text("80 rows").wait_for(timeout=PATIENCE_S * 1000)
        assert "q=SELECT+run" in page.url

        def drawn_points() -> object:
            page.locator(".rlvr-chart").scroll_into_view_if_needed()  # again, as the table above grows when it is drawn
            return plot(page, "value against step", "p._fullData.map(t => t.x.length)")

        until(page, lambda: drawn_points() == [40, 40])
        assert not page.evaluate("document.querySelector('.stMain').scrollWidth > innerWidth")
        for _ in range(3):
            with page.expect_download() as download:
                page.get_by_role("button", name="CSV", exact=True).click()
            assert len(Path(download.value.path()).read_text().splitlines()) == 81  # the header and 80 rows
