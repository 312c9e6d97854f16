"""Delivery of alerts to their routes, from threads of its own: whatever a receiver does, training does not notice.

One thread for each receiver takes what waits for it in the outbox. A message that is not taken is tried again after 1,
2, 4, ... and at most 300 s, the others in between, and given up a day after it was written.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from monitor.alerts.marks import read_marks
from monitor.alerts.outbox import NAME, Message, Outbox
from monitor.alerts.settings import Route
from monitor.integrations.apprise import Receiver
from monitor.queries.alerts import to_alert
from monitor.records import Alert, RunInfo, StepRecord
from monitor.store.reader import open_store
from monitor.store.runs import heartbeat_files
from monitor.store.schema import run_dir

_log = logging.getLogger("rlvr.monitor")
CLOSE_S = 10.0  # longest wait of close() for receivers
TEST_S = 30.0  # longest wait for all receivers of a test
GIVE_UP_S = 24 * 3600.0
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0


def receivers(routes: Iterable[Route]) -> dict[str, Receiver]:
    """A receiver for each address, by source: several routes may share one. Raises MonitorError."""
    found: dict[str, Receiver] = {}
    for route in routes:
        if route.source not in found:
            found[route.source] = Receiver(route.source, route.address())
    return found


def send_test(routes: Iterable[Route], title: str, wait_s: float = TEST_S) -> dict[str, str]:
    """Send a test message to every receiver at once; {source: "" if it arrived, else why not}.

    Neither a result nor an error holds an address. Raises MonitorError where an address is missing or unknown.
    """
    found = receivers(routes)
    why: dict[str, str] = {}
    body = "This is a test of rlvr-monitor. Nothing has happened."

    def send(source: str) -> None:
        why[source] = found[source].send(title, body, "info")

    threads = [threading.Thread(target=send, args=(source,), daemon=True) for source in found]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + wait_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return {source: why.get(source, f"no answer within {wait_s:.0f} s") for source in found}


class Delivery:
    """Delivers what is put into an outbox. `store`: where the marks of muted rules lie."""

    def __init__(self, store: Path, routes: Sequence[Route], to: dict[str, Receiver], outbox: Outbox) -> None:
        self.outbox = outbox
        self._store, self._routes, self._to = store, routes, to
        self._stop = threading.Event()
        outbox.keep_only(to)
        for receiver in to.values():
            name = f"rlvr-alerts {receiver.source}"
            threading.Thread(target=self._work, args=(receiver,), name=name, daemon=True).start()

    def wanted(self, run: str, alert: Alert) -> list[str]:
        """Sources whose routes want a transition."""
        return [route.source for route in self._routes if route.wants(run, alert)]

    def close(self, wait_s: float = CLOSE_S) -> int:
        """Wait so long for what is under way; the number of messages that stay in the outbox for the next start."""
        self.outbox.wait_empty(wait_s)
        self._stop.set()
        left = len(self.outbox.waiting)
        self.outbox.close()
        if left:
            _log.warning(
                "%d alerts could not be delivered. They wait in %s for the next start.", left, self.outbox.path
            )
        return left

    def _work(self, receiver: Receiver) -> None:
        index = fails = 0
        warned = ""
        while not self._stop.is_set():
            message = self.outbox.next(receiver.source, index, 0.5)
            if message is None:
                continue
            how = self._unwanted(message)
            if self._stop.is_set():  # what is sent from now on could not be noted
                return
            if not how:
                why = receiver.send(*texts(message), severity_of(message.alert))
                if self._stop.is_set() and why:
                    return
                how = "" if why else "sent"
                if why and not fails and message.id != warned:
                    warned = message.id
                    _log.warning("Alert %s did not reach %s: %s. It is tried again.", message.id, receiver.source, why)
            if how:
                self.outbox.done(receiver.source, message, how)
                index = fails = 0
            else:
                self._stop.wait(min(FIRST_WAIT_S * 2**fails, LONGEST_WAIT_S))
                index, fails = index + 1, min(fails + 1, 30)

    def _unwanted(self, message: Message) -> str:
        if read_marks(self._store, message.run).is_muted(message.alert.rule, message.alert.step):
            return "muted"
        if time.time() - message.ts > GIVE_UP_S:
            _log.warning("Alert %s could not be delivered for a day and is given up.", message.id)
            return "given_up"
        return ""


class AlertSink:
    """Delivers a run's alerts; a Sink of the Recorder. Raises MonitorError where an address is missing or unknown."""

    def __init__(self, store: str | Path, routes: Sequence[Route]) -> None:
        self._store, self._routes, self._to = Path(store).expanduser().absolute(), routes, receivers(routes)
        self._delivery: Delivery | None = None
        self._run = self._verdict = ""

    def start(self, info: RunInfo) -> None:
        """Open the outbox; a resumed run delivers what its last attempt could not."""
        self._run = info.name
        folder = run_dir(self._store, info.name)
        outbox = Outbox(folder / NAME)
        recorded: list[Alert] = []
        if len(heartbeat_files(folder)) > 1:
            with open_store(self._store) as store:
                query = "SELECT * FROM alerts WHERE run = ? ORDER BY step, ts"
                found = store.sql(query, [info.name])
                recorded = [to_alert(dict(zip(found.columns, row, strict=True))) for row in found.rows]
        self._delivery = Delivery(self._store, self._routes, self._to, outbox)
        if outbox.knows(info.name):  # what was committed, but not put here before the process was killed
            outbox.put(info.name, recorded, self._delivery.wanted)
        else:
            outbox.skip(info.name, recorded)

    def step(self, record: StepRecord, alerts: Sequence[Alert]) -> None:
        """Write the news down; delivery follows from another thread."""
        if alerts and self._delivery is not None:
            if self._verdict:
                alerts = [replace(alert, message=f"{alert.message}\n{self._verdict}") for alert in alerts]
            self._delivery.outbox.put(self._run, alerts, self._delivery.wanted)

    def verdict(self, sentence: str) -> None:
        """What there is to say of the run now; the messages of the next step carry it."""
        self._verdict = f"The run is {sentence}"

    def close(self, status: str) -> None:
        """Wait a bounded time for what is under way."""
        if self._delivery is not None:
            self._delivery.close()


def severity_of(alert: Alert) -> str:
    """How a receiver shows a transition."""
    return "resolved" if alert.state == "resolved" else alert.severity


def texts(message: Message) -> tuple[str, str]:
    """(title, body) of a message."""
    alert = message.alert
    head = "RESOLVED" if alert.state == "resolved" else alert.severity.upper()
    title = f"{head}: {alert.rule} in run {message.run} at step {alert.step}"
    lines = [alert.message, *([f"What to do: {alert.action}"] if alert.action else []), f"Alert {message.id}"]
    return title, "\n".join(lines)
