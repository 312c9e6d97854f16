"""The recorder's writer thread: takes what waits, judges it, publishes it in order, keeps the heartbeat."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import duckdb

from monitor.records import Alert
from monitor.store.batch import Batch, Item, batch_of
from monitor.store.gaps import PARTS, Event, Gaps
from monitor.store.writer import RunWriter

_log = logging.getLogger("rlvr.monitor")
_BEAT_S = 1.0
_RETRY_S = 0.5  # between tries on a disk that refuses
_LAST_TRIES_S = 10.0  # how long a closing recorder goes on trying
_DISK_ERRORS = (OSError, duckdb.IOException, duckdb.OutOfMemoryException)


class Pipeline:
    """Owns the queue and the thread. All methods but the thread's own (`_`) may be called from any thread."""

    def __init__(
        self,
        writer: RunWriter,
        *,
        engine: Any,
        on_alert: Callable[[Alert], None] | None,
        max_bytes: float | None,
        flush_s: float,
    ) -> None:
        self._writer, self._engine, self._on_alert = writer, engine, on_alert
        self.sinks: list[Any] = []
        self._max_bytes, self._flush_s = max_bytes, flush_s
        self.acknowledged: int | None = None
        self.disk_full = False
        self.errors = 0
        self._wake = threading.Condition()
        self._items: deque[Item] = deque()
        self._events: list[Event] = []
        self._backlog: deque[Batch] = deque()
        self._in_flight = 0
        self._token_rows_in = self._token_rows_out = 0  # each counted by one thread only
        self._gaps = Gaps()
        self._tokens_dropped = 0
        self._warned: set[str] = set()
        self._started = time.time()
        self._step_times: deque[float] = deque(maxlen=64)
        self._status: str | None = None
        self._budget_spent = False
        self._thread = threading.Thread(target=self._run, name="rlvr-recorder", daemon=True)
        self._beat("running")  # the run is visible, and its name taken, before the first step

    @property
    def waiting(self) -> int:
        """Steps that are not durable yet."""
        return len(self._items) + self._in_flight

    @property
    def token_rows(self) -> int:
        """Raw tokens that are not durable yet."""
        return self._token_rows_in - self._token_rows_out

    def start(self) -> None:
        self._thread.start()

    def put(self, item: Item) -> None:
        """Queue a step; a gap in something the step still carries ends here."""
        parts = {"tokens": item.tokens, "samples": item.samples, "histograms": item.record.histograms, "steps": item}
        carried = [what for what, part in parts.items() if part]
        self._token_rows_in += item.token_rows
        with self._wake:
            self._events += self._gaps.end(carried)
            self._items.append(item)
            self._step_times.append(item.ts)
            self._wake.notify()

    def note(self, kind: str, message: str, step: int | None) -> None:
        """Queue an event."""
        with self._wake:
            self._events.append((time.time(), step, kind, message))
            self._wake.notify()

    def give_up(self, item: Item, what: str, waiting: int) -> None:
        """Count what is not recorded of a step; the event of the gap opens with its first step."""
        n_rows = item.token_rows if what == "tokens" else 1
        reason = "the disk is full" if self.disk_full else f"the writer is behind ({waiting} steps wait)"
        self._widen_gap(what, item.record.step, item.record.step, n_rows, reason)

    def fault(self, kind: str, error: BaseException, step: int | None) -> None:
        """Count a fault of the monitor itself; the first of its kind is logged and becomes an event."""
        self.errors += 1
        if kind not in self._warned:
            self._warned.add(kind)
            _log.warning(
                "%s: %s: %s. Training goes on; later ones are only counted.", kind, type(error).__name__, error
            )
            self.note(kind, f"{type(error).__name__}: {error}", step)

    def close(self, status: str, timeout_s: float) -> bool:
        """Write all that waits and end the thread. False if that took longer than timeout_s."""
        with self._wake:
            self._events += self._gaps.end(PARTS)
            self._status = status
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _widen_gap(self, what: str, first: int, last: int, n_rows: int, reason: str) -> None:
        with self._wake:
            self._tokens_dropped += n_rows if what == "tokens" else 0
            self._events += self._gaps.widen(what, first, last, n_rows, reason)

    # ---- the writer thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        write_at = beat_at = time.monotonic()
        closing_at: float | None = None
        while True:
            items, events, closing = self._take(write_at, beat_at)
            try:
                self._process(items, events)
            except Exception as error:  # a fault here must not end the thread
                self.fault("writer_error", error, None)
            now = time.monotonic()
            write_at = now + (_RETRY_S if self._backlog else self._flush_s)
            if closing:
                closing_at = closing_at or now
                if not (self._items or self._events or self._backlog) or now - closing_at > _LAST_TRIES_S:
                    break
                time.sleep(0.05)
            if now >= beat_at or closing:
                self._try_beat("running")
                beat_at = now + _BEAT_S
        if self._in_flight:
            _log.error("%d steps could not be written and are lost.", self._in_flight)
        self._try_beat(self._status or "stopped")
        self._writer.close()

    def _take(self, write_at: float, beat_at: float) -> tuple[list[Item], list[Event], bool]:
        """Wait until it is time to write or to beat; take everything that waits if it is time to write."""
        with self._wake:
            while self._status is None:
                now = time.monotonic()
                due = min(beat_at, write_at) if self._items or self._events or self._backlog else beat_at
                if now >= due:
                    break
                self._wake.wait(due - now)
            if self._status is None and time.monotonic() < write_at:
                return [], [], False
            items, events = list(self._items), self._events
            self._items.clear()
            self._events = []
            self._in_flight += len(items)
            return items, events, self._status is not None

    def _process(self, items: list[Item], events: list[Event]) -> None:
        for item in items:
            if self._engine is not None and not item.again:
                item.alerts = self._judge(item)
        if items or events:
            self._append(self._build(items, events))
        while self._backlog and self._publish(self._backlog[0]):
            self._backlog.popleft()
        for item in items:
            self._deliver(item)

    def _judge(self, item: Item) -> list[Alert]:
        try:
            return list(self._engine.observe(item.record.step, item.record.scalars))
        except Exception as error:
            self.fault("engine_error", error, item.record.step)
            return []

    def _deliver(self, item: Item) -> None:
        calls: list[tuple[str, Callable[[], Any]]] = []
        if self._on_alert is not None:
            calls += [("on_alert_error", lambda a=alert: self._on_alert(a)) for alert in item.alerts]  # type: ignore
        calls += [("sink_error", lambda s=sink: s.step(item.record, item.alerts)) for sink in self.sinks]  # type: ignore
        for kind, call in calls:
            try:
                call()
            except Exception as error:
                self.fault(kind, error, item.record.step)

    def _build(self, items: list[Item], events: list[Event]) -> Batch:
        last_step = self.acknowledged or 0
        return batch_of(items, events, keeps_tokens=self._keeps_tokens, last_step=last_step, fault=self.fault)

    def _keeps_tokens(self, step: int, n_rows: int) -> bool:
        """False once the run holds max_bytes, which the first such step makes an event."""
        if self._max_bytes is None or self._writer.bytes < self._max_bytes:
            return True
        self._tokens_dropped += n_rows
        if not self._budget_spent:
            self._budget_spent = True
            size = f"{self._writer.bytes / 1e9:.3f} GB of {self._max_bytes / 1e9:.3f} GB"
            self.note("token_budget", f"Raw tokens are not recorded from step {step} on: the run holds {size}.", step)
        return False

    def _append(self, batch: Batch) -> None:
        """Add to the backlog; what waits behind a batch that the disk refuses joins one batch."""
        if len(self._backlog) > 1:
            batch = self._backlog.pop().join(batch)
        self._backlog.append(batch)

    def _publish(self, batch: Batch) -> bool:
        """True once the batch is durable, or given up because the store can never take it."""
        while True:
            try:
                self._writer.publish(batch)
                break
            except _DISK_ERRORS as error:
                if not self._lighten(batch, error):
                    return False
            except Exception as error:
                table = self._writer.next_table(batch)
                self.fault(f"bad_{table}", error, batch.first_step)
                batch.tables.pop(table)
        if batch.n_steps:
            self.acknowledged = batch.last_step
            self._in_flight -= batch.n_steps
            self._token_rows_out += batch.token_rows
        if self.disk_full:
            self.disk_full = False
            _log.warning("The store can be written again.")
            self.note("disk_recovered", "The store can be written again.", batch.last_step)
        return True

    def _lighten(self, batch: Batch, error: Exception) -> bool:
        """Drop raw tokens, then texts, of a batch that the disk refuses. False if nothing is left to drop."""
        if not self.disk_full:
            self.disk_full = True
            self.errors += 1
            _log.error("Cannot write to the store: %s. Raw tokens are dropped, the rest waits. Free some space.", error)
        for table in ("tokens", "samples"):
            lost = batch.tables.pop(table, None)
            if lost is not None:
                self._widen_gap(table, batch.first_step, batch.last_step, lost.num_rows, f"cannot write ({error})")
                return True
        return False

    def _try_beat(self, status: str) -> None:
        try:
            self._beat(status)
        except OSError as error:
            self.fault("heartbeat_error", error, None)

    def _beat(self, status: str) -> None:
        gaps = [b - a for a, b in zip(list(self._step_times), list(self._step_times)[1:], strict=False)]
        self._writer.heartbeat(
            {
                "status": status,
                "started": self._started,
                "acknowledged": self.acknowledged,
                "last_step_ts": self._step_times[-1] if self._step_times else None,
                "median_step_s": statistics.median(gaps) if gaps else None,
                "tokens_dropped": self._tokens_dropped,
                "queue": self.waiting,
                "errors": self.errors,
            }
        )
