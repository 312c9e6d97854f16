"""A login in front of the dashboard: a real browser, Streamlit's client, and a provider on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from oidc import CLIENT, provider
from test_browser import PATIENCE_S, opened, until

from dashboard.launch import check_port, start, stop
from dashboard.login import is_among


def test_nothing_is_shown_before_a_login_and_only_those_allowed_get_in(
    browser, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = {"email": "mallory@elsewhere.org", "email_verified": True, "name": "Mallory"}
    port = check_port("127.0.0.1", 0)
    with provider(account) as issuer:
        (tmp_path / ".streamlit").mkdir()
        (tmp_path / ".streamlit/secrets.toml").write_text(
            f'[auth]\nredirect_uri = "http://localhost:{port}/oauth2callback"\ncookie_secret = "{"x" * 40}"\n'
            f'client_id = "{CLIENT}"\nclient_secret = "s"\n'
            f'server_metadata_url = "{issuer}/.well-known/openid-configuration"\n'
            '[rlvr]\nallowed = ["@lab.example.org"]\n'
        )
        monkeypatch.chdir(tmp_path)  # where `rlvr dashboard` starts
        process, _ = start(store, port=port)
        hosts = (f"http://localhost:{port}", f"ws://localhost:{port}", issuer)
        try:
            address = f"http://localhost:{port}/run?run=ict-s0"
            with opened(browser, address, hosts=hosts) as page:
                page.get_by_role("button", name="Log in").wait_for(timeout=PATIENCE_S * 1000)
                assert "ict-s0" not in page.inner_text("body")
                page.get_by_role("button", name="Log in").click()
                page.get_by_text("elsewhere.org is not allowed to see this dashboard").wait_for(
                    timeout=PATIENCE_S * 1000
                )
                assert "ict-s0" not in page.inner_text("body")
                account |= {"email": "Ann@Lab.example.org", "name": "Ann"}
                page.get_by_role("button", name="Log out").click()
                page.get_by_role("button", name="Log in").wait_for(timeout=PATIENCE_S * 1000)
                page.get_by_role("button", name="Log in").click()
                page.wait_for_selector(".rlvr-runs tbody tr", timeout=PATIENCE_S * 1000)
                page.goto(address)
                page.wait_for_selector(".rlvr-chart .main-svg", timeout=PATIENCE_S * 1000)
                page.wait_for_timeout(1500)  # a click while a page is being made may be lost
                until(page, lambda: not page.locator("[data-testid=stStatusWidget]").count())
                page.get_by_role("button", name="Log out").click()
                page.get_by_role("button", name="Log in").wait_for(timeout=PATIENCE_S * 1000)
        finally:
            stop(process)


@pytest.mark.parametrize(
    ("who", "allowed", "expected"),
    [
        ({"email": "ann@lab.org"}, ["ann@lab.org"], True),
        ({"email": "Ann@Lab.org"}, ["@LAB.org"], True),
        ({"email": "ann@lab.org", "email_verified": False}, ["ann@lab.org"], False),
        ({"email": "ann@evil.lab.org"}, ["@lab.org"], False),
        ({"email": "ann@notlab.org"}, ["@lab.org"], False),
        ({"email": "@lab.org@evil.org"}, ["@lab.org"], False),
        ({"email": "lab.org"}, ["lab.org", "@lab.org"], False),
        ({"email": None}, [""], False),
        ({}, ["@"], False),
        ({"email": "ann@lab.org"}, [], False),
        ({"email": "ann@lab.org"}, "ann@lab.org", False),  # a text, not a list
    ],
)
def test_who_is_allowed(who, allowed, expected) -> None:
    assert is_among(who, allowed) == expected
