"""Receiver: sends one message to one address through apprise (Slack, Discord, e-mail, webhooks and a hundred others).

The address is a secret. Nothing that apprise, requests or an exception says of it leaves this file: their records are
kept out of every log while a message is sent, and a failure is told in words of our own.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from monitor.errors import MonitorError
from monitor.extras import require_extras

_TALKERS = ("apprise", "urllib3.connectionpool", "urllib3.util.retry", "requests_oauthlib.oauth1_auth")
_TYPES = {"info": "info", "warning": "warning", "critical": "failure", "resolved": "success"}


_said: ContextVar[list[str] | None] = ContextVar("rlvr_apprise_said", default=None)  # apprise's threads inherit it


class _Quiet(logging.Filter):
    """Keeps what is logged `within` from every handler; texts of warnings and worse are collected."""

    def filter(self, record: logging.LogRecord) -> bool:
        said = _said.get()
        if said is None:
            return True  # the program's own use of apprise
        if record.levelno >= logging.WARNING:
            said.append(record.getMessage())
        return False

    @contextmanager
    def within(self) -> Iterator[list[str]]:
        for name in _TALKERS:
            logging.getLogger(name).addFilter(self)  # added once, however often
        said: list[str] = []
        token = _said.set(said)
        try:
            yield said
        finally:
            _said.reset(token)


_quiet = _Quiet()


class Receiver:
    """One address. Raises MissingPackageError without apprise, MonitorError for an address that it does not know.

    source: where the address came from; what messages call it.
    """

    def __init__(self, source: str, address: str) -> None:
        require_extras("Delivery of alerts", "notify")
        self.source = source
        with _quiet.within(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a plugin says of this Python
            import apprise

            # in the caller's thread: those of apprise's pool are waited for when the interpreter ends
            self._apprise: Any = apprise.Apprise(asset=apprise.AppriseAsset(service_timeout=0))
            try:
                known = self._apprise.add(address)
            except Exception:  # a fault of a plugin must not show the address either
                known = False
        if not known:
            raise MonitorError(
                f"The address in {source} is not one that apprise knows (it is not shown, because it is a secret). "
                "Expected e.g. slack://..., mailto://... or json://...: `rlvr alerts test-fire` tries it."
            )

    def send(self, title: str, body: str, severity: str) -> str:
        """Send one message; "" if the receiver took it, else why not, without a word of the address. Never raises.

        severity: info, warning, critical or resolved. apprise waits at most 4 s to connect and 4 s between two bytes
        of an answer, for a mail server 15 s each, unless the address says otherwise (?cto=...&rto=..., mail: cto).
        """
        with _quiet.within() as said:
            try:
                sent = self._apprise.notify(
                    title=title, body=body, notify_type=_TYPES[severity], body_format="text", interpret_escapes=False
                )
            except Exception as error:  # whatever a plugin throws: its text may hold the address, its type does not
                return f"{type(error).__name__} while sending"
            return "" if sent else _reason(said)


def _reason(said: list[str]) -> str:
    """What apprise's warnings say, in our own words: its texts may hold parts of the address."""
    text = " ".join(said)
    status = re.search(r"\berror=(\d{3})\b", text)
    if status:
        return f"the receiver answered with status {status[1]}"
    return "no connection, or no answer in time" if re.search(r"(?i)connection|socket|timeout", text) else "refused"
