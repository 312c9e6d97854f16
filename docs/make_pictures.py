"""Makes docs/images: every page of the dashboard over the recorded runs, light and dark, wide and narrow.

    python -m docs.make_pictures [PAGE ...]

Names: PAGE-light.png and PAGE-dark.png, 1440 x 900 as a laptop shows them; PAGE-narrow.png and PAGE-narrow-dark.png, as
a phone does. The README shows three of them.
"""

from __future__ import annotations

import os
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from dashboard.launch import start, stop

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "images"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
UNIFORM, BUDGET, ICT = (",".join(f"{arm}-s{seed}" for seed in range(3)) for arm in ("uniform", "entropy_budget", "ict"))
CHART = ".rlvr-plot .main-svg"
PAGES = {  # name -> address and what is there once it is drawn
    "overview": ("/", "text=explosion"),
    "run": ("/run?run=uniform-s1", CHART),
    "compare": (f"/compare?a={UNIFORM}&b={BUDGET}&c={ICT}", CHART),
    "tokens": ("/tokens?run=ict-s0&step=150&colour=weight", ".rlvr-tokens"),
    "method": ("/method?run=ict-s0", CHART),
    "alerts": ("/alerts", "text=diversity_lost"),
    "sql": ("/sql", "textarea"),
}
LOOKS = {  # end of the name -> colour scheme, width, height
    "light": ("light", 1440, 900),
    "dark": ("dark", 1440, 900),
    "narrow": ("light", 480, 1400),
    "narrow-dark": ("dark", 480, 1400),
}


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - PAGES.keys())
    if unknown:
        print(f"No page {', '.join(unknown)}. Known: {', '.join(PAGES)}.", file=sys.stderr)
        return 2
    FOLDER.mkdir(exist_ok=True)
    server, url = start(ROOT / "sample_runs")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=os.environ.get("RLVR_CHROMIUM") or "/usr/bin/chromium", args=FLAGS
            )
            for look, (scheme, width, height) in LOOKS.items():
                size = {"width": width, "height": height}
                page = browser.new_context(viewport=size, color_scheme=scheme).new_page()  # type: ignore[arg-type]
                for name in names or PAGES:
                    save(page, f"{url}{PAGES[name][0]}", PAGES[name][1], FOLDER / f"{name}-{look}.png")
                page.close()
            browser.close()
    finally:
        stop(server)
    return 0


def save(page: Page, address: str, there: str, path: Path) -> None:
    """A picture of a page in 128 colours, which is a third of the bytes."""
    page.goto(address)
    page.locator(there).first.wait_for(timeout=60_000, state="attached")
    page.wait_for_timeout(4000)  # the charts draw one after the other
    picture = Image.open(BytesIO(page.screenshot())).convert("RGB").quantize(128)
    picture.save(path, optimize=True)
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
