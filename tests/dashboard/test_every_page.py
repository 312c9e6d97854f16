"""Every page in both colour schemes, wide and on a phone: it draws, fits, and axe-core finds nothing of weight."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe
from test_browser import PATIENCE_S, drawn, opened, scroll_through, until

PAGES = {  # page -> what is there once it is drawn, and the least number of charts
    "": (".rlvr-runs tbody tr", 0),
    "run?run=uniform-s0": (".rlvr-chart .main-svg", 12),
    "run?run=uniform-s0&replay=30": (".rlvr-chart .main-svg", 12),
    "compare": (".rlvr-chart .main-svg", 10),
    "tokens?run=ict-s0&step=17&cell=entropy:60": (".rlvr-tokens span", 0),
    "tokens?run=ict-s0&step=17&view=selected": ("[data-testid=stDataFrame]", 0),
    "method?run=ict-s0": (".rlvr-chart .main-svg", 1),
    "alerts?judged=entropy_collapse&run=ict-s0&rule=entropy_collapse&first=12": ("[data-testid=stDataFrame]", 0),
    "alerts": ("[data-testid=stDataFrame]", 0),
    "sql?q=SELECT+run,step,value+FROM+steps+WHERE+name='reward'": (".rlvr-chart", 1),
}
UNSETTLED = "[data-stale=true], [data-testid=stStatusWidget], .stSkeleton"  # stale elements are shown pale
WIDER = """[...document.querySelectorAll('.stMain, .rlvr-plot')]
    .filter(node => node.scrollWidth > innerWidth).map(node => node.className)"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark-phone"])
@pytest.mark.parametrize("path", PAGES)
def test_a_page_draws_fits_and_is_accessible(browser, url: str, path: str, dark: bool) -> None:
    sign, charts = PAGES[path]
    with opened(browser, f"{url}/{path}", dark=dark) as page:
        page.wait_for_selector(sign, timeout=PATIENCE_S * 1000)
        until(page, lambda: page.locator(".rlvr-chart").count() >= charts)
        scroll_through(page)
        until(page, lambda: drawn(page) >= charts)
        page.wait_for_timeout(300)  # what came on the screen is told to the server, which draws the page once more
        until(page, lambda: not page.locator(UNSETTLED).count())
        assert not page.locator("[data-testid=stException]").count()
        colour = page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor")
        assert colour == ("rgb(14, 17, 23)" if dark else "rgb(255, 255, 255)")
        assert not page.evaluate(WIDER), "something is wider than the screen"
        found = [
            (violation["id"], node["target"], node["html"][:200])
            for violation in Axe().run(page).response["violations"]
            if violation["impact"] in ("critical", "serious", "moderate")
            for node in violation["nodes"]
        ]
        assert not found
