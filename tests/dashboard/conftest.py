"""A store of simulated runs, and a server with a browser in front of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import simulated

from dashboard.launch import start, stop

CHROMIUM = os.environ.get("RLVR_CHROMIUM") or "/usr/bin/chromium"  # .ci/browser finds or installs one
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    """Two finished runs of one comparison: uniform with an alert that fires, ict with one that resolved."""
    path = tmp_path_factory.mktemp("store")
    simulated.record_run(path, "uniform-s0", "uniform", steps=40, fire=25)
    simulated.record_run(path, "ict-s0", "ict", steps=40, fire=12, resolve=20)
    return path


@pytest.fixture(scope="session")
def url(store: Path) -> Iterator[str]:
    process, address = start(store)
    yield address
    stop(process)


@pytest.fixture(scope="session")
def browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        options = {"executable_path": CHROMIUM}
        opened = driver.chromium.launch(args=FLAGS, **options)
        for scheme, width in (("light", 1400), ("dark", 480)):
            opened.new_context(color_scheme=scheme, viewport={"width": width, "height": 1000})
        yield opened
        opened.close()
