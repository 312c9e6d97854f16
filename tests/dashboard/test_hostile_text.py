"""What a run wrote is text wherever it is shown: no address is asked, no markup is drawn, nothing is left out.

A real browser opens every page, and the report, of a store whose every text tries to be an image, a link, a script, a
formula, an icon or a directive. A server of our own listens at the address that these texts name.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
import simulated
from test_browser import PATIENCE_S, opened, scroll_through, until

from dashboard import report
from dashboard.launch import start, stop
from monitor.recorder import Recorder
from monitor.records import Alert
from monitor.stats.comparison import paired_comparison, save_comparison
from monitor.store import writer
from monitor.store.tail import Tail

MARKUP = (
    "![x](http://127.0.0.1:{port}/image.png) <img src='http://127.0.0.1:{port}/tag.png' onerror='document.title=1'> "
    "[a](javascript:document.title=1) [b](http://127.0.0.1:{port}/link) $\\href{{http://127.0.0.1:{port}/tex}}{{x}}$ "
    "$$x^2$$ :material/delete: :streamlit: :smile: :red[r] :blue-badge[s] **bold** _thin_ `code` ~~gone~~ -> -- >= "
    "&lt; &amp; <b>fat</b> <a href='http://127.0.0.1:{port}/a'>here</a> http://127.0.0.1:{port}/auto www.a.example "
    "me@a.example %{{x}} <extra>e</extra> <script>document.title=1</script>"
)
NAME = "![x](name.png) [a](javascript:document.title=1) :streamlit: **r** <b>fat<b>"  # a folder cannot hold a slash


@dataclass(frozen=True)
class Hostile:
    """A store, the text that all its fields hold, the name of its second run, and what was asked of the address."""

    store: Path
    text: str
    name: str
    asked: list[str]


class _Engine:
    """One alert that fires at step 4 and one that resolves."""

    def __init__(self, text: str) -> None:
        self.text = text

    def observe(self, step: int, scalars) -> list[Alert]:
        stages = {4: ("open", 4, "firing"), 5: ("shut", 5, "firing"), 7: ("shut", 5, "resolved")}
        if step not in stages:
            return []
        rule, first, state = stages[step]
        text = self.text
        return [Alert(f"{rule} {text}", "critical", state, step, first, 0.2, 0.9, 0.3, text, text)]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Iterator[Hostile]:
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as listener:
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        port = listener.server_address[1]
        made = Hostile(tmp_path_factory.mktemp("hostile"), MARKUP.format(port=port), NAME, asked)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "_RUN_NAME", re.compile(".+"))  # our writer refuses such names; another's need not
            _fill(made)
        yield made
        listener.shutdown()
        thread.join()


def _fill(hostile: Hostile) -> None:
    """Two finished runs of one comparison, uniform and one whose weighting, name and all else are hostile."""
    text, runs = hostile.text, hostile.store / "runs"
    for name, weighting in (("plain", "uniform"), (hostile.name, text)):
        info = replace(simulated.info(name, weighting, 0, 10), model=text, task=text)
        info = replace(info, config={"steps": 10, "weighting": {"kind": weighting}, text: text, "task": text})
        with Recorder(hostile.store, info, engine=_Engine(text), flush_s=0.0, queue_steps=4096) as recorder:
            for number in range(1, 11):
                record, tokens, samples = simulated.step(number, weighting=weighting, seed=0, total=10)
                n = len(samples.prompt)
                words = [[text, *of[1:]] for of in samples.token_texts]
                samples = replace(samples, prompt=[text] * n, completion=[text] * n, token_texts=words,
                                  prompt_id=[text] * n)  # fmt: skip
                recorder.record(record, tokens, samples)
            recorder.event("note", text, 3)
            recorder.event("verdict", f"warning: {text}", 10)
    next((runs / hostile.name / "data/events/g0").glob("*.parquet")).write_bytes(b"torn")  # so that the banner names it
    tail = Tail(hostile.store)
    tail.poll()
    arms = {"uniform": {0: "plain"}, text: {0: hostile.name}}
    configs = {name: entry.info["config"] for name, entry in tail.runs.items()}
    found = paired_comparison(tail.cursor(), "c", arms, configs)
    tail.close()
    save_comparison(hostile.store, found)


@pytest.fixture(scope="module")
def address(hostile: Hostile) -> Iterator[str]:
    process, url = start(hostile.store)
    yield url
    stop(process)


def words(page) -> str:
    """All text of the page as a reader sees it, with one space between words; word joiners have no width."""
    shown = page.evaluate(
        "document.body.innerText + [...document.querySelectorAll('svg text')].map(n => ' ' + n.textContent).join('')"
    )
    return " ".join(shown.replace("\u2060", "").split())


def nothing_came_of_it(page, hostile: Hostile, own: str) -> None:
    """No element was made of the text, no address was asked, and no script ran."""
    led = page.evaluate(
        "[...document.querySelectorAll('body [src], body [href]')].map("
        "n => new URL(n.getAttribute('src') ?? n.getAttribute('href'), location.href).href)"
    )
    assert not [link for link in led if not link.startswith((own, "data:", "file:"))]
    assert page.locator(".katex, [aria-label='delete icon'], [alt='Streamlit logo']").count() == 0
    marked = page.evaluate(
        "[...document.querySelectorAll('b, strong, em, del, code, a, span:not(:has(*)), tspan')]"
        ".map(n => n.textContent)"
    )
    assert not {"bold", "fat", "thin", "code", "gone", "here", "x", "a", "b", "r", "s"} & set(marked)
    assert page.evaluate("document.title") != "1"
    assert hostile.asked == []


def hover_charts(page) -> None:
    """The hover texts of the charts that are drawn, which Plotly makes of names and of our own texts."""
    until(
        page,
        lambda: page.evaluate(
            "[...document.querySelectorAll('.js-plotly-plot')].filter("
            " node => node.data.every(trace => (trace.type ?? 'scatter') === 'scatter')).map(node => {"
            " node.data.forEach((_, i) => Plotly.Fx.hover(node, [{curveNumber: i, pointNumber: 0}]));"
            " return node.querySelectorAll('.hoverlayer text').length; }).some(n => n)"
        ),
    )


PAGES = {  # page -> (what it is drawn with, how often at least the text stands on it)
    "": (".rlvr-runs tbody", 4),  # task, model, weighting and verdict
    "run?run=plain": (".rlvr-chart", 10),  # task, model, verdict; of two alerts all names, messages and actions
    "compare": (".rlvr-chart", 1),
    "tokens?run=plain": (".rlvr-tokens", 2),
    "method?run=plain": ("[data-testid=stMarkdown]", 1),
    "tokens?run=plain&view=lost": ("[data-testid=stMarkdown]", 0),
    "alerts?run=plain&rule=open%20{text}&first=4": (".rlvr-evidence", 3),  # rule, action and message
    "sql?q=SELECT%20%22{text}%22%20FROM%20runs": ("[data-testid=stAlert]", 1),  # the name of no column
    "run?run={text}": (".stAlert", 1),  # an address that someone made up
}


@pytest.mark.parametrize(
    "path", PAGES, ids=["overview", "run", "compare", "tokens", "method", "lost", "alerts", "sql", "unknown"]
)
def test_a_page_shows_what_runs_wrote_as_text(browser, hostile: Hostile, address: str, path: str) -> None:
    drawn, times = PAGES[path]
    literal = f"No run {hostile.text!r}" if drawn == ".stAlert" else hostile.text
    with opened(browser, f"{address}/{path.format(text=quote(hostile.text))}") as page:
        page.wait_for_selector(drawn, timeout=PATIENCE_S * 1000)
        for box in page.locator(".st-key-alerts summary").all():
            box.click()
            page.locator(".rlvr-alert").first.wait_for(timeout=PATIENCE_S * 1000)
        scroll_through(page)
        assert hostile.asked == []
        until(page, lambda: words(page).count(literal) >= times)
        if drawn == ".rlvr-chart":
            hover_charts(page)
        for badge in page.locator(":not([data-testid=stElementToolbarButton]) > .stTooltipHoverTarget").all():
            badge.hover()
            page.wait_for_selector("[data-testid=stTooltipContent]", timeout=PATIENCE_S * 1000)
        for box in page.locator("input[role=combobox]").all():  # its options are drawn when it is opened
            until(page, lambda box=box: box.press("ArrowDown") or page.locator("[role=listbox]").count())
            until(page, lambda: page.keyboard.press("Escape") or not page.locator("[role=listbox]").count())
        nothing_came_of_it(page, hostile, address)
        assert not page.locator("[data-testid=stException]").count()


def test_the_report_shows_what_runs_wrote_as_text(browser, hostile: Hostile) -> None:
    assert report.main(["c", str(hostile.store)]) == 0
    file = (hostile.store / "comparisons" / "c.html").as_uri()
    with opened(browser, file, hosts=("file:",)) as page:
        until(page, lambda: page.locator(".main-svg").count() > 3)
        hover_charts(page)
        assert words(page).count(hostile.text) >= 4
        nothing_came_of_it(page, hostile, file)
