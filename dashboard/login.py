"""Who may see the dashboard: everyone who reaches it, or, where a login is set up, those who are allowed.

The login is Streamlit's own OpenID Connect client. It is set up by `.streamlit/secrets.toml` in the folder where
`rlvr dashboard` starts, or in the home folder: section [auth] as Streamlit describes it, and

    [rlvr]
    allowed = ["ann@example.org", "@lab.example.org"]    # addresses, or all of a domain

Without `allowed` nobody gets in: an identity provider may know many people.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from dashboard.escape import markdown


def is_allowed() -> bool:
    """Whether this visitor may see the pages. Otherwise says why, and offers to log in or out."""
    secrets = _secrets()
    if "auth" not in secrets:
        return True
    if not st.user.is_logged_in:
        st.title("rlvr monitor")
        st.button("Log in", on_click=st.login, type="primary", icon=":material/login:")
        return False
    who, allowed = st.user.to_dict(), (secrets.get("rlvr") or {}).get("allowed") or ()
    if is_among(who, allowed):
        return True
    st.error(
        markdown(
            "{} is not allowed to see this dashboard. Whoever runs it can add the address to `allowed` in section "
            "`[rlvr]` of secrets.toml.",
            str(who.get("email") or "This account"),
        ),
        icon=":material/block:",
    )
    st.button("Log out", on_click=st.logout, icon=":material/logout:")
    return False


def offer_logout() -> None:
    """Below a page, where a login is set up: who is logged in, and the way out."""
    if "auth" in _secrets():
        with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="right"):
            st.caption(markdown("{}", str(st.user.to_dict().get("email"))), width="content")
            st.button("Log out", on_click=st.logout, icon=":material/logout:")


def is_among(who: dict[str, Any], allowed: Sequence[str]) -> bool:
    """Whether an account is one of those allowed, by an address that its provider has not left unverified.

    who: the claims. Addresses are compared without regard to case; "@lab.example.org" stands for all of that domain.
    """
    address = str(who.get("email") or "").casefold()
    domain = address.rpartition("@")[2]
    if "@" not in address or who.get("email_verified") is False or isinstance(allowed, str):
        return False
    return any(one.casefold() in (address, f"@{domain}") for one in allowed)


def _secrets() -> dict[str, Any]:
    try:
        return st.secrets.to_dict()
    except FileNotFoundError:
        return {}
