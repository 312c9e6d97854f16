"""How the dashboard's Streamlit server is set up; `.streamlit/config.toml` says the same for `streamlit run`."""

from __future__ import annotations

from collections.abc import Sequence

OPTIONS: dict[str, str | int | list[str]] = {
    "server.headless": True,
    "server.enableStaticServing": True,
    "server.enableCORS": True,
    "server.enableXsrfProtection": True,
    "server.fileWatcherType": "none",
    "server.showEmailPrompt": False,
    "browser.gatherUsageStats": False,
    "runner.postScriptGC": False,  # a full collection after each check for news took 20 times what the check takes
    "global.minCachedMessageSize": 1000,  # bytes from which what the browser already has is not sent again
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "type",
    "theme.light.primaryColor": "#0072b2",
    "theme.light.backgroundColor": "#ffffff",
    "theme.light.secondaryBackgroundColor": "#f5f6f8",
    "theme.light.textColor": "#262b33",
    "theme.dark.primaryColor": "#56b4e9",
    "theme.dark.backgroundColor": "#0e1117",
    "theme.dark.secondaryBackgroundColor": "#191e27",
    "theme.dark.textColor": "#e6e9ee",
}


def flags(host: str, port: int, names: Sequence[str] = ()) -> list[str]:
    """Command-line flags, which override every config.toml that Streamlit may find.

    names: under which browsers reach the server, where that is not `host`. Under other names the server does not answer
    them, because a foreign page could have such a name lead here.
    """
    hosts = sorted({host, "127.0.0.1", "localhost", *names})
    chosen = OPTIONS | {"server.address": host, "server.port": str(port)}
    parts = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in chosen.items()]
    return parts + [f"--server.allowedHosts={name}" for name in hosts]
