"""The recorder's writer thread: takes what waits, judges it and publishes it in order.

A step is acknowledged when its rows in `steps` are durable, and never otherwise: whatever stands in the way, they wait.
What a full disk changes: raw tokens and rollout texts are given up, histograms wait in memory, and scalars, alerts and
events are written at once, if need be into the reserve, the more steps to a file the longer it lasts.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import duckdb
import pyarrow as pa

from monitor.records import Alert
from monitor.store.background import Compactor
from monitor.store.batch import Batch, Item, batch_of, joined
from monitor.store.evidence import Evidence
from monitor.store.gaps import PARTS, Event, Gaps
from monitor.store.heart import Heart
from monitor.store.reserve import Room, no_space
from monitor.store.writer import RunWriter

_log = logging.getLogger("rlvr.monitor")
_RETRY_S = 0.5  # between tries on a disk that refuses
_LAST_TRIES_S = 10.0  # how long a closing recorder goes on trying
_DISK_ERRORS = (OSError, duckdb.IOException, duckdb.OutOfMemoryException)
_LAST_EVENTS = 64 << 10  # bytes of the reserve that are kept for the events of the end
_EVIDENCE_SHARE = 0.1  # of max_bytes: raw tokens that are written beyond it, as evidence
_WHY = 200  # characters of a reason in the heartbeat


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
        self._wake = threading.Condition()  # guards all that follows, up to the writer thread's own
        self.acknowledged: int | None = None
        self.waiting = 0  # hand-overs that are neither durable nor given up
        self.token_rows = 0  # raw tokens that are neither durable nor given up
        self._lost_steps = 0
        self.errors = 0
        self._lost_why = ""
        self._items: deque[Item] = deque()
        self._events: list[Event] = []
        self._gaps = Gaps()
        self._evidence = Evidence()
        self._warned: set[str] = set()
        self._step_times: deque[float] = deque(maxlen=64)
        self._busy: list[tuple[str, float]] = []
        self._active: float | None = None  # when the trainer last was busy with something else than steps
        self._flushes = 0  # callers that wait for the disk
        self._status: str | None = None
        self._overdue = False  # the caller of close() has gone: what still waits counts as lost
        # the writer thread's own
        self._backlog: deque[Batch] = deque()
        self._late: deque[Batch] = deque()  # histograms of committed steps, for a disk that has room again
        self._late_steps = 0
        self._light_files = 0  # segments of steps since the disk filled
        self._room = Room(writer.folder)
        self._tokens_in_budget: int | None = None  # bytes of raw tokens when max_bytes was reached
        self._judged = False  # a verdict has been noted: the engine has seen enough
        self._concluded = False  # the last verdict has been noted
        self._started = time.time()
        self._heart = Heart(self._try_beat)
        self._compactor = Compactor(writer.store, writer.info.name, writer.rank, self.fault)
        self._thread = threading.Thread(target=self._run, name="rlvr-recorder", daemon=True)

    @property
    def disk_full(self) -> bool:
        """From a write that was refused until there is clearly room again."""
        return self._room.full

    @property
    def histogram_steps(self) -> int:
        """Steps whose histograms wait in memory."""
        return self.waiting + self._late_steps

    @property
    def lost_steps(self) -> int:
        """Hand-overs that were given up for good."""
        return self._lost_steps + (self.waiting if self._overdue else 0)

    def start(self) -> None:
        """Start the threads. Raises OSError or RuntimeError, and leaves none running."""
        pa.array([""])  # imports pandas, if there is one: too late for a first step when the interpreter is ending
        self._beat("running")
        self._heart.start()
        try:
            self._thread.start()
        except RuntimeError:
            self._heart.cancel()
            raise

    def put(self, item: Item) -> None:
        """Queue a step; a gap in something the step still carries ends here. What it holds may become evidence."""
        parts = {"tokens": item.tokens, "samples": item.samples, "histograms": item.record.histograms, "steps": item}
        carried = [what for what, part in parts.items() if part]
        with self._wake:
            self._events += self._gaps.end(carried)
            self._hold(item)
            self._items.append(item)
            self.waiting += 1
            self.token_rows += item.token_rows
            self._step_times.append(item.ts)
            self._wake.notify_all()

    def note(self, kind: str, message: str, step: int | None) -> None:
        """Queue an event."""
        with self._wake:
            self._events.append((time.time(), step, kind, message))
            self._wake.notify_all()

    def give_up(self, item: Item, what: str, waiting: int) -> None:
        """Count what is not recorded of a step; the event of the gap opens with its first step."""
        reason = "the disk is full" if self.disk_full else f"the writer is behind ({waiting} steps wait)"
        n_rows = 1
        if what == "tokens":
            n_rows = item.in_gap = item.token_rows
        self._widen_gap(what, item.record.step, item.record.step, n_rows, reason)

    def fault(self, kind: str, error: BaseException, step: int | None) -> None:
        """Count a fault of the monitor itself; the first of its kind is logged and becomes an event."""
        with self._wake:
            self.errors += 1
            known = kind in self._warned
            self._warned.add(kind)
        if not known:
            _log.warning(
                "%s: %s: %s. Training goes on; later ones are only counted.", kind, type(error).__name__, error
            )
            self.note(kind, f"{type(error).__name__}: {error}", step)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Inside, the heartbeat says what keeps the trainer from its next step."""
        entry = (what, time.time())
        with self._wake:
            self._busy.append(entry)
        self._heart.now()
        try:
            yield
        finally:
            with self._wake:
                self._busy.remove(entry)
                self._active = time.time()
            self._heart.now()

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits any more. True if every step that was handed over is durable."""
        with self._wake:
            self._flushes += 1
            self._wake.wait_for(lambda: not self.waiting, timeout_s)
            self._flushes -= 1
            return not self.waiting and not self.lost_steps

    def close(self, status: str, timeout_s: float) -> str | None:
        """Write all that waits and end the threads; the status that was written, None if that took too long.

        A run that lost steps has failed, whatever `status` says.
        """
        with self._wake:
            self._events += self._gaps.end(PARTS)
            self._status = status
            self._wake.notify_all()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            return self._status
        self._overdue = True
        self._lost_why = f"the disk did not take them within {timeout_s:.0f} s of closing"
        self._heart.now(wait_s=1.0)
        return None

    def _hold(self, item: Item) -> None:
        """Keep in memory what thinning left out of a step, if alerts are judged here and the disk is not full."""
        if item.held_tokens is None and item.held_samples is None:
            return
        try:
            if self._engine is not None and not self.disk_full:
                self._evidence.hold(item)
                return
        except Exception as error:
            self.fault("evidence_error", error, item.record.step)
        item.held_tokens = item.held_samples = None

    def _widen_gap(self, what: str, first: int, last: int, n_rows: int, reason: str) -> None:
        with self._wake:
            self._events += self._gaps.widen(what, first, last, n_rows, reason)
            if what == "steps":
                self._lost_steps += n_rows
                self._lost_why = reason[:_WHY]

    # ---- the writer thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        write_at = time.monotonic()
        closing_at: float | None = None
        while True:
            items, events, closing = self._take(write_at)
            try:
                self._process(items, events, closing)
            except Exception as error:  # a fault here must not end the thread
                self.fault("writer_error", error, None)
            if self._writer.sync_in_s() == 0:
                self._sync()
            now = time.monotonic()
            write_at = now + (_RETRY_S if self._backlog or self._room.full else self._flush_s)
            if closing:
                closing_at = closing_at or now
                waits = self._items or self._events or self._backlog or self._late
                if not waits or now - closing_at > _LAST_TRIES_S:
                    break
                time.sleep(0.05)
        self._end()

    def _take(self, write_at: float) -> tuple[list[Item], list[Event], bool]:
        """Everything that waits, as soon as it is time to write or to fsync, or the recorder closes."""
        with self._wake:
            while self._status is None:
                waits = self._items or self._events or self._backlog or self._room.full
                due = [write_at - time.monotonic()] if waits else []
                due += [left for left in (self._writer.sync_in_s(),) if left is not None]
                if due and min(due) <= 0:
                    break
                self._wake.wait(min(due, default=None))
            items, events = list(self._items), self._events
            self._items.clear()
            self._events = []
            return items, events, self._status is not None

    def _process(self, items: list[Item], events: list[Event], closing: bool) -> None:
        for item in items:
            if self._engine is not None:
                item.alerts = self._judge(item)
        if closing and self._engine is not None and not self._concluded:
            self._concluded = True
            self._note_verdict(even_early=True)
        judged = [item for item in items if item.alerts or not item.again]
        earlier = [one for item in judged for one in self._choose(item) if one not in items]
        if items or events:
            try:
                self._append(self._build(items, events, earlier))
            except Exception as error:
                if items:
                    steps = [item.record.step for item in items]
                    self._lose(len(items), steps[0], steps[-1], f"their rows cannot be made ({error})")
                raise
        if self._room.full and self._room.clear(closing=closing):
            self._try_everything()
        elif self._room.full:
            self._write_light(closing)
        while self._backlog and not self._room.full and self._publish(self._backlog[0]):
            self._backlog.popleft()
        for item in items:
            self._deliver(item)

    def _judge(self, item: Item) -> list[Alert]:
        try:
            alerts = list(self._engine.observe(item.record.step, item.record.scalars))
        except Exception as error:
            self.fault("engine_error", error, item.record.step)
            return []
        if not self._judged or any(getattr(alert, "state", "pending") != "pending" for alert in alerts):
            self._note_verdict()
        return alerts

    def _note_verdict(self, *, even_early: bool = False) -> None:
        """The engine's sentence on the run as an event: the newest one is what `rlvr ls` and the dashboard show.

        It is noted as soon as the run can be judged, when an alert fires or ends, and when the recorder closes.
        """
        judge = getattr(self._engine, "verdict", None)  # an engine of others may have none
        if judge is None:
            return
        try:
            found = judge(self._median_step_s())
            if found.step is not None and (even_early or found.health != "too early"):
                self._judged = True
                message = f"{found.health}: {found.sentence}"
                self.note("verdict", message, found.step)
                for sink in self.sinks:
                    getattr(sink, "verdict", lambda message: None)(message)
        except Exception as error:
            self.fault("engine_error", error, None)

    def _median_step_s(self) -> float | None:
        with self._wake:
            times = list(self._step_times)
        gaps = [b - a for a, b in pairwise(times) if b > a]  # steps of one moment were read from a file together
        return statistics.median(gaps) if gaps else None

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

    def _choose(self, item: Item) -> list[Item]:
        """Settle which raw tokens and texts are written now that a step is judged: the steps that this brings back."""
        if item.token_rows and self._max_bytes is not None and self._writer.bytes >= self._max_bytes:
            self._spare(item)
        try:
            with self._wake:
                back = self._evidence.judged(item)
        except Exception as error:
            self.fault("evidence_error", error, item.record.step)
            return []
        back = back if self._takes_evidence() else []
        for one in back:
            self._bring_back(one)
        return back

    def _takes_evidence(self) -> bool:
        """False once evidence takes its share beyond max_bytes."""
        if self._max_bytes is None or self._tokens_in_budget is None:
            return True
        return self._writer.token_bytes - self._tokens_in_budget < _EVIDENCE_SHARE * self._max_bytes

    def _bring_back(self, item: Item) -> None:
        """What thinning left out of a step is written after all."""
        with self._wake:
            if item.held_tokens is not None:
                item.tokens, item.held_tokens = item.held_tokens, None
                self.token_rows += item.token_rows
                self._gaps.take_back("tokens", item.in_gap)
            if item.held_samples is not None:
                item.samples, item.held_samples = item.held_samples, None
                self._gaps.take_back("samples", 1)

    def _build(self, items: list[Item], events: list[Event], earlier: list[Item]) -> Batch:
        def lost(step: int, error: Exception) -> None:
            self._lose(1, step, step, f"their rows cannot be made ({error})")
            self.fault("bad_steps", error, step)

        batch = batch_of(
            items,
            events,
            earlier=earlier,
            last_step=self.acknowledged or 0,
            mantissa_bits=self._writer.mantissa_bits,
            fault=self.fault,
            lost=lost,
        )
        for item in items:  # they are rows now: what a step still holds may be written later, these must not be again
            item.tokens = item.samples = None
        return batch

    def _spare(self, item: Item) -> None:
        """The run holds max_bytes: a step's raw tokens are left out, and the first such step makes an event."""
        step, n_rows = item.record.step, item.token_rows
        with self._wake:
            self._gaps.counts["tokens"] += n_rows
            self.token_rows -= n_rows
            item.held_tokens, item.tokens, item.in_gap = item.tokens, None, n_rows
            self._hold(item)
        if self._tokens_in_budget is None:
            self._tokens_in_budget = self._writer.token_bytes
            size = f"{self._writer.bytes / 1e9:.3f} GB of {(self._max_bytes or 0) / 1e9:.3f} GB"
            message = f"Raw tokens are not recorded from step {step} on, but around alerts: the run holds {size}."
            self.note("token_budget", message, step)

    def _append(self, batch: Batch) -> None:
        """Add to the backlog; what waits behind a batch that the disk refuses joins one batch."""
        if self._backlog and not self._backlog[-1].tried:
            batch = self._backlog.pop().join(batch)
        self._backlog.append(batch)
        if self._room.full:
            self._lighten(batch)

    def _publish(self, batch: Batch) -> bool:
        """True once all of the batch is durable; only then do its steps count as such."""
        bytes_before, failed = self._writer.bytes, ""
        while batch.tables:
            try:
                self._writer.publish(batch)
            except _DISK_ERRORS as error:
                self._refused(error)
                return False
            except Exception as error:
                table = self._writer.next_table(batch)
                if failed != table:  # the connection may be the fault, or gone with it: once more with a new one
                    failed = table
                    self.fault("connection_replaced", error, batch.first_step)
                    self._writer.reconnect()
                elif table == "steps":  # no step is acknowledged without its rows: they wait
                    self.fault("bad_steps", error, batch.first_step)
                    return False
                else:
                    self.fault(f"bad_{table}", error, batch.first_step)
                    self._drop(batch, table, f"they cannot be written ({error})")
        self._room.wrote(self._writer.bytes - bytes_before)
        if batch.n_steps and not self._room.full:
            self._compactor.wrote()
        self._commit(batch)
        return True

    def _commit(self, batch: Batch) -> None:
        with self._wake:
            if batch.n_steps:
                self.acknowledged = batch.last_step
            self.waiting -= batch.n_steps
            self.token_rows -= batch.token_rows
            self._wake.notify_all()
        batch.n_steps = batch.token_rows = 0

    def _drop(self, batch: Batch, table: str, reason: str) -> None:
        """Give up one table of a batch, `steps` never."""
        if table not in batch.tables:
            return
        first, last = batch.span(table)
        lost = batch.tables.pop(table)
        if table in PARTS:
            steps = max(1, len(lost["step"].unique()))
            n_rows = lost.num_rows if table == "tokens" else steps
            self._widen_gap(table, first, last, n_rows, reason)

    def _lose(self, n: int, first: int, last: int, reason: str) -> None:
        """Give up hand-overs for good."""
        self._widen_gap("steps", first, last, n, reason)
        with self._wake:
            self.waiting -= n
            self._wake.notify_all()

    def _sync(self) -> None:
        try:
            self._writer.sync()
        except OSError as error:
            self.fault("fsync_error", error, None)

    # ---- a full disk -------------------------------------------------------------------------------------------

    def _refused(self, error: Exception) -> None:
        """The disk has refused a write: all that waits is made light, until there is room again."""
        first = not self._room.full
        self._room.refuse(error)
        if first:
            with self._wake:
                self.errors += 1
            self._light_files = 0
            _log.error(
                "Cannot write to %s: %s. Raw tokens and texts are dropped, histograms wait. Free some space.",
                self._writer.folder,
                self._room.reason,
            )
        for batch in self._backlog:
            self._lighten(batch)

    def _lighten(self, batch: Batch) -> None:
        """Drop a batch's raw tokens and texts; its histograms wait for room beside it."""
        for table in ("tokens", "samples"):
            self._drop(batch, table, f"cannot write ({self._room.reason})")
        with self._wake:
            self.token_rows -= batch.token_rows
        batch.token_rows = 0
        histograms = batch.take("histograms")
        if histograms is not None:
            self._late.append(histograms)
            self._late_steps += batch.n_steps

    def _write_light(self, closing: bool) -> None:
        """Scalars, alerts and events of what waits, and late histograms while a batch of the largest size would fit."""
        waiting = sum(batch.n_steps for batch in self._backlog)
        alerts = any("alerts" in batch.tables for batch in self._backlog)
        asked = closing or alerts or self._flushes
        if asked or waiting > self._light_files // 2:  # the longer it lasts, the more steps to a file
            while self._backlog and self._publish_into_reserve(self._backlog[0]):
                self._light_files += 1
                self._backlog.popleft()
        if not self._backlog and self._late and self._room.fits(1):
            self._write_late()

    def _publish_into_reserve(self, batch: Batch) -> bool:
        """Like `_publish`; where there is no space, with blocks of the reserve, for as long as there are some."""
        while not self._publish(batch):
            try:
                if not batch.tables or not no_space(self._room.reason) or not self._writer.reserve.give():
                    return False
            except OSError as error:
                self.fault("reserve_error", error, None)
                return False
        return True

    def _write_late(self) -> bool:
        """Histograms that waited for room, in one segment. True if none is left."""
        self._late = deque(joined(list(self._late)))
        while self._late and self._publish(self._late[0]):
            self._late.popleft()
        self._late_steps = self._late_steps if self._late else 0
        return not self._late

    def _try_everything(self) -> None:
        """There may be room again: there is once all that waits is written and the reserve is full."""
        while self._backlog and self._publish(self._backlog[0]):
            self._backlog.popleft()
        if self._backlog or not self._write_late():
            return
        try:
            self._writer.reserve.fill()
        except OSError as error:
            self._refused(error)
            return
        self._room.back()
        _log.warning("The store can be written again.")
        self.note("disk_recovered", "The store can be written again.", self.acknowledged)

    # ---- the end -----------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Count what could not be written, say so as far as the disk allows, and write the last heartbeat."""
        try:
            self._write_last()
        except Exception as error:
            self.fault("writer_error", error, None)
        if self.lost_steps:
            _log.error("%d steps could not be written and are lost: %s.", self.lost_steps, self._lost_why)
            self._status = "failed"
        self._sync()
        self._compactor.stop()
        self._heart.stop(self._status or "stopped")
        self._writer.close()

    def _write_last(self) -> None:
        for batch in self._backlog:
            if batch.n_steps:
                reason = self._room.reason or "the store did not take them"
                self._lose(batch.n_steps, batch.first_step, batch.last_step, reason)
        if self._late and self._writer.reserve.give(keep=_LAST_EVENTS):  # nothing else needs it any more
            self._write_late()
        for batch in self._late:
            self._drop(batch, "histograms", f"cannot write ({self._room.reason})")
        with self._wake:
            events = [*self._events, *self._gaps.end(PARTS)]
        if events:
            self._publish_into_reserve(self._build([], events, []))

    # ---- the heartbeat -----------------------------------------------------------------------------------------

    def _try_beat(self, status: str) -> None:
        try:
            self._beat(status)
        except OSError as error:
            self.fault("heartbeat_error", error, None)

    def _beat(self, status: str) -> None:
        with self._wake:
            times = list(self._step_times)
            busy, since = self._busy[-1] if self._busy else (None, None)
            fields = {
                "status": status,
                "started": self._started,
                "acknowledged": self.acknowledged,
                "last_step_ts": times[-1] if times else None,
                "active_ts": self._active,
                "busy": busy and busy[:_WHY],
                "busy_since": since,
                "tokens_dropped": self._gaps.counts["tokens"],
                "dropped": dict(self._gaps.counts),
                "lost_steps": self.lost_steps,
                "lost_why": self._lost_why or None,
                "queue": self.waiting,
                "errors": self.errors,
                "judged": self._engine is not None,  # its alerts are all there: `rlvr watch` need not judge it
            }
        self._writer.heartbeat({**fields, "median_step_s": self._median_step_s()})
