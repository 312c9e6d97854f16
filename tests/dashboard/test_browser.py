"""A real browser in front of a real server: what only shows when JavaScript runs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import pytest
import simulated

from dashboard.launch import start, stop
from monitor.recorder import Recorder

PATIENCE_S = 60.0  # generous: a busy machine is slow, a broken page never comes
# Streamlit itself asks for these below the page's path before it asks at the root, on every page but the first
STREAMLIT_PROBES = re.compile(r"/_stcore/(health|host-config)$")


@contextmanager
def opened(browser, address: str, *, dark: bool = False, hosts: tuple[str, ...] = ("http://127.0.0.1:",)) -> Iterator:
    """A page that fails the test if anything goes wrong in it, or asks any other host. Dark ones are phones."""
    context = browser.contexts[dark]  # shared, so that the browser's cache holds Plotly
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console",
        lambda message: (
            message.type == "error"
            and not STREAMLIT_PROBES.search(message.location.get("url", ""))
            and wrong.append(f"{message.text} {message.location}")
        ),
    )
    page.on(
        "request",
        lambda request: request.url.startswith((*hosts, "data:", "blob:")) or wrong.append(f"asked {request.url}"),
    )
    page.goto(address)
    try:
        yield page
        assert not wrong, wrong
    finally:
        page.close()


def until(page, condition: Callable[[], object], within_s: float = PATIENCE_S) -> float:
    """Seconds until `condition()` held; fails after `within_s`."""
    began = time.monotonic()
    while time.monotonic() - began < within_s:
        if condition():
            return time.monotonic() - began
        page.wait_for_timeout(30)  # time.sleep would keep Playwright from hearing the browser
    raise AssertionError(f"not within {within_s} s: {page.url}")


def drawn(page) -> int:
    return page.evaluate("document.querySelectorAll('.rlvr-plot .main-svg:first-child').length")


def plot(page, title: str, expression: str):
    """`expression` of the Plotly node `p` of the chart with that title."""
    return page.evaluate(
        "([title, code]) => { const p = [...document.querySelectorAll('.rlvr-plot')]"
        ".find(n => n.getAttribute('aria-label') === title);"
        " return p && p.data ? new Function('p', 'return ' + code)(p) : null; }",
        [title, expression],
    )


def drag(page, title: str) -> list[float]:
    """Zooms into the middle of a chart with the mouse; returns the range of x that it then shows."""
    before = plot(page, title, "[...p._fullLayout.xaxis.range]")
    box = page.locator(f".rlvr-plot[aria-label='{title}'] .nsewdrag").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.3 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], middle, steps=4)
    page.mouse.up()
    until(page, lambda: plot(page, title, "[...p._fullLayout.xaxis.range]") != before)
    return plot(page, title, "[...p._fullLayout.xaxis.range]")


def scroll_through(page) -> None:
    """Charts are drawn when they come on the screen."""
    for chart in page.locator(".rlvr-chart").all():
        chart.scroll_into_view_if_needed()
        page.wait_for_timeout(30)


@pytest.mark.parametrize("name", ["Compare", "Run", "Tokens"])
def test_back_leads_to_the_page_before(browser, url: str, name: str) -> None:
    """A page writes what it shows into its address. That must be no entry of the history of its own."""
    with opened(browser, url) as page:
        page.wait_for_selector(".rlvr-runs tbody tr", timeout=PATIENCE_S * 1000)
        page.get_by_role("link", name=name, exact=True).first.click()
        page.wait_for_selector(".rlvr-tokens" if name == "Tokens" else ".rlvr-chart", timeout=PATIENCE_S * 1000)
        until(page, lambda: "=" in page.evaluate("location.search"))
        page.wait_for_timeout(1500)
        until(page, lambda: not page.locator("[data-testid=stStatusWidget]").count())
        page.go_back()
        page.wait_for_selector(".rlvr-runs tbody tr", timeout=PATIENCE_S * 1000)
        page.wait_for_timeout(1000)
        assert page.evaluate("location.pathname") == "/"


def test_completions_are_text(browser, url: str) -> None:
    with opened(browser, f"{url}/tokens?run=ict-s0&step=5&group=0") as page:
        page.wait_for_selector(".rlvr-tokens", timeout=PATIENCE_S * 1000)
        assert simulated.EVIL in page.locator(".rlvr-tokens").first.inner_text()
        assert page.locator(".rlvr-tokens img, .rlvr-tokens script, .rlvr-tokens b").count() == 0
        assert page.title() != "pwned"
        page.locator(".rlvr-tokens span").first.hover()
        assert re.search(r"entropy\s+[\d.]+ nats.*weight", page.locator(".rlvr-values").inner_text(), re.S)


def test_the_url_brings_a_view_back(browser, url: str) -> None:
    with opened(browser, f"{url}/") as page:
        page.get_by_role("link", name="uniform-s0").click()
        page.wait_for_url("**/run?*", timeout=PATIENCE_S * 1000)
        until(page, lambda: "run=uniform-s0" in page.url)
        until(page, lambda: plot(page, "Mean entropy", "p.data[0].name") == "Entropy")
    address = f"{url}/tokens?run=uniform-s0&step=9&colour=deviation"
    with opened(browser, address) as page:
        page.wait_for_selector(".rlvr-tokens", timeout=PATIENCE_S * 1000)
        until(page, lambda: "group=" in page.url and "step=9" in page.url and "colour=deviation" in page.url)
        page.get_by_role("radio", name="weight").click()
        until(page, lambda: "colour=weight" in page.url)
        kept = page.url
    with opened(browser, kept) as page:
        page.wait_for_selector(".rlvr-legend", timeout=PATIENCE_S * 1000)
        until(page, lambda: page.locator(".rlvr-legend b").inner_text().startswith("Weight"))


def test_a_live_run_grows_and_the_zoom_stays(browser, tmp_path: Path) -> None:
    total, entropies = 60, list[float]()
    with Recorder(tmp_path, simulated.info("live", "ict", 0, total), flush_s=0.0) as recorder:

        def record(number: int) -> None:
            step = simulated.step(number, weighting="ict", seed=0, total=total)
            entropies.append(step[0].scalars["entropy"])
            recorder.record(*step)

        for number in range(1, 31):
            record(number)
        process, address = start(tmp_path)
        try:
            with opened(browser, f"{address}/run?run=live&smooth=5+steps") as page:
                shown = "[...p._fullLayout.xaxis.range]"
                newest = "Array.from(p._fullData[0].x).pop()"
                until(page, lambda: plot(page, "Mean entropy", newest) == 30)
                zoomed = drag(page, "Mean entropy")
                until(page, lambda: plot(page, "Reward and pass@k", shown) == zoomed)  # charts zoom together
                plot(page, "Mean entropy", "p.marked = true")
                delays, made = [], []
                for number in range(31, 37):
                    record(number)
                    delays.append(until(page, lambda n=number: plot(page, "Mean entropy", newest) == n))
                    made.append(plot(page, "Mean entropy", "atob(p.rlvrFigure.spec.data[0].x.bdata).length / 4"))
                for title in ("Mean entropy", "Reward and pass@k"):
                    assert plot(page, title, shown) == zoomed, "an update lost the zoom"
                assert plot(page, "Mean entropy", "p.marked"), "the chart's node was replaced"
                print("seconds from record() to the chart:", [round(delay, 2) for delay in delays])
                # the values, and their mean m + (y - m) / 3, go on in the browser where the server's figure ended
                means = list(accumulate(entropies, lambda mean, value: mean + (value - mean) / 3))
                for place, expected in enumerate((entropies, means)):
                    drawn = plot(page, "Mean entropy", f"Array.from(p._fullData[{place}].y)")
                    assert drawn == pytest.approx(expected, rel=1e-5)
                assert len(set(made)) < len(made), "every step made the figure anew"
                page.get_by_role("button", name="View").click()
                page.get_by_role("radio", name="paused").click()
                until(page, lambda: "updates=paused" in page.url)
                page.wait_for_timeout(1000)
                record(37)
                page.wait_for_timeout(2000)
                assert plot(page, "Mean entropy", newest) == 36
                page.get_by_role("radio", name="live").click()
                until(page, lambda: plot(page, "Mean entropy", newest) == 37)
                for title in ("Mean entropy", REWARD):
                    assert plot(page, title, SHOWN) == zoomed, "going on lost the zoom"
        finally:
            stop(process)


REWARD, SHOWN = "Reward and pass@k", "[...p._fullLayout.xaxis.range]"


def emit(page, title: str, *events: str) -> None:
    """Emits what Plotly emits, because the mouse cannot aim at one step: "'its name', what it tells" of each event.

    Charts are drawn one after the other, so this waits for its own one: before that nothing in the page listens.
    """
    until(page, lambda: plot(page, title, "p.rlvrReady"))
    plot(page, title, "void (" + ", ".join(f"p.emit({event})" for event in events) + ")")


def clicked(step: float) -> str:
    return f"'plotly_click', {{points: [{{x: {step}}}]}}"


def test_a_click_on_a_curve_opens_a_menu_that_leads_to_its_tokens(browser, url: str) -> None:
    with opened(browser, f"{url}/run?run=ict-s0") as page:
        until(page, lambda: plot(page, REWARD, "p.data.length"))
        emit(page, REWARD, clicked(17))
        emit(page, "Mean entropy", clicked(3), "'plotly_doubleclick', {}")
        menu = page.get_by_role("menu", name="Step 17")
        menu.wait_for(timeout=PATIENCE_S * 1000)
        page.wait_for_timeout(400)
        assert page.get_by_role("menu").count() == 1, "a double-click only zooms out"
        page.keyboard.press("Escape")
        assert page.get_by_role("menu").count() == 0
        emit(page, REWARD, clicked(17))
        page.get_by_role("menuitem", name="Pin its distribution").click(timeout=PATIENCE_S * 1000)
        until(page, lambda: "pin=ict-s0%4017" in page.url)
        until(page, lambda: page.get_by_text("Entropy, step 40 against step 17").count())
        emit(page, REWARD, clicked(17))
        page.get_by_role("menuitem", name="Read its tokens").click(timeout=PATIENCE_S * 1000)
        page.wait_for_selector(".rlvr-tokens", timeout=PATIENCE_S * 1000)
        until(page, lambda: "step=17" in page.url and "run=ict-s0" in page.url)


def test_the_zoom_stands_in_the_address_and_fits_the_height(browser, url: str) -> None:
    with opened(browser, f"{url}/run?run=uniform-s0&x=10-20") as page:
        until(page, lambda: plot(page, REWARD, SHOWN) == [10, 20])
        until(page, lambda: plot(page, "Mean entropy", SHOWN) == [10, 20])
        low, high = plot(page, REWARD, "[...p._fullLayout.yaxis.range]")
        inside = plot(
            page, REWARD, "p._fullData.filter(t => (t.yaxis ?? 'y') === 'y').flatMap(t => Array.from(t.x)"
            ".map((x, i) => [x, t.y[i]]).filter(([x]) => x >= 10 && x <= 20).map(([x, y]) => y))"
        )  # fmt: skip
        room = 0.06 * (max(inside) - min(inside))
        assert [low, high] == pytest.approx([min(inside) - room, max(inside) + room])
        # newer steps are to the right, and a click shows them
        page.get_by_role("button", name="newest step 40 is off screen").first.click()
        until(page, lambda: plot(page, REWARD, SHOWN)[1] > 40)
        until(page, lambda: re.search("x=10-(&|$)", page.url))
        menu_step = 25
        emit(page, REWARD, clicked(menu_step))
        page.get_by_role("menuitem", name="Show from here on").click(timeout=PATIENCE_S * 1000)
        until(page, lambda: plot(page, REWARD, SHOWN)[0] == menu_step and "x=25-" in page.url)


def test_curves_over_hours_keep_zoom_and_menu(browser, url: str) -> None:
    hour = 0.4 / 3600  # of one step
    with opened(browser, f"{url}/run?run=ict-s0&over=hours") as page:
        until(page, lambda: plot(page, REWARD, "p.data.length"))
        assert plot(page, REWARD, "Array.from(p._fullData[0].x).pop()") == pytest.approx(40 * hour)
        zoomed = drag(page, "Mean entropy")
        until(page, lambda: plot(page, REWARD, SHOWN) == zoomed)
        until(page, lambda: re.search(r"[?&]x=0\.00\d+-0\.00\d+(&|$)", page.url))
        emit(page, REWARD, clicked(17 * hour))
        menu = page.get_by_role("menu", name=re.compile("0.00189 hours of training"))
        menu.get_by_role("menuitem", name="Pin its distribution").click(timeout=PATIENCE_S * 1000)
        until(page, lambda: "pin=ict-s0%4017" in page.url)
        page.get_by_role("button", name="View").click()
        page.get_by_role("radio", name="step", exact=True).click()
        until(page, lambda: (plot(page, REWARD, SHOWN) or [0, 0])[1] > 40)  # another axis is another chart
        until(page, lambda: "x=" not in page.url.replace("axis=", "") and "over=step" in page.url)


def test_the_sentence_leads_to_its_evidence(browser, url: str) -> None:
    with opened(browser, f"{url}/run?run=uniform-s0") as page:
        until(page, lambda: plot(page, REWARD, "p.data.length"))
        assert page.title() == "uniform-s0 · rlvr monitor"
        since = page.get_by_role("link", name="Show the fall since step")
        step = int(re.search(r"\d+", since.inner_text()).group())
        since.click()
        until(page, lambda: plot(page, REWARD, SHOWN)[0] == step)
        page.get_by_role("link", name="where the alert fired").click()
        page.wait_for_selector(".rlvr-tokens", timeout=PATIENCE_S * 1000)
        until(page, lambda: "step=25" in page.url)
