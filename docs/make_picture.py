"""Makes docs/compare.png, the README's picture, from the recorded runs: python -m docs.make_picture"""

from __future__ import annotations

import os
from pathlib import Path

from playwright.sync_api import sync_playwright

from dashboard.launch import start, stop

ROOT = Path(__file__).parent.parent
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def main() -> None:
    server, url = start(ROOT / "sample_runs")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=os.environ.get("RLVR_CHROMIUM") or "/usr/bin/chromium", args=FLAGS
            )
            page = browser.new_page(viewport={"width": 1280, "height": 1130}, color_scheme="light")
            sides = [",".join(f"{arm}-s{seed}" for seed in range(3)) for arm in ("uniform", "entropy_budget")]
            page.goto(f"{url}/compare?a={sides[0]}&b={sides[1]}")
            page.get_by_text("Distinct correct answers, heldout").first.wait_for(timeout=60_000)
            page.wait_for_timeout(3000)  # the charts draw one after the other
            page.screenshot(path=ROOT / "docs" / "compare.png")
            browser.close()
    finally:
        stop(server)


if __name__ == "__main__":
    main()
