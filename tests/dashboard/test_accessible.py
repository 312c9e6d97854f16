"""Every page, in both colour schemes, under axe-core: nothing serious and nothing moderate."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe
from test_browser import PATIENCE_S, opened, scroll_through, until

PAGES = {  # page -> what is there once it is drawn
    "": ".rlvr-runs tbody tr",
    "run?run=uniform-s0": ".rlvr-chart .main-svg",
    "compare": ".rlvr-chart .main-svg",
    "tokens?run=ict-s0&step=17&cell=entropy:60": ".rlvr-tokens span",
    "tokens?run=ict-s0&step=17&view=selected": "[data-testid=stDataFrame]",
    "method?run=ict-s0": ".rlvr-chart .main-svg",
    "alerts": "[data-testid=stDataFrame]",
    "sql?q=SELECT+run,step,value+FROM+steps+WHERE+name='reward'": ".rlvr-chart",
}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark-phone"])
def test_axe_finds_nothing_serious(browser, url: str, dark: bool) -> None:
    for path, sign in PAGES.items():
        with opened(browser, f"{url}/{path}", dark=dark) as page:
            page.wait_for_selector(sign, timeout=PATIENCE_S * 1000)
            until(page, lambda page=page: not page.locator("[data-testid=stStatusWidget], .stSkeleton").count())
            scroll_through(page)
            found = [
                (violation["id"], node["target"], node["html"][:200])
                for violation in Axe().run(page).response["violations"]
                if violation["impact"] in ("critical", "serious", "moderate")
                for node in violation["nodes"]
            ]
            assert not found, path
