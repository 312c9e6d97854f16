"""Recorder: takes the records of a training run and makes them durable from one background thread.

A recorder that cannot start raises. Once it has started, none of its errors reaches training. If writing is too slow,
steps wait, queued or being written, and the recorder gives parts of new steps up, depending on how much waits:

| waiting | given up for a new step |
|---|---|
| 8,192 x queue_steps raw tokens | raw tokens |
| queue_steps steps, or the disk is full | raw tokens and rollout texts |
| 4 x queue_steps steps | histograms too |
| 256 x queue_steps steps | the step |

Every such gap is an event in the store with its steps and counts, and the heartbeat holds the counts too. By default at
most 2.1 million raw tokens wait in memory (75 MB), histograms of 1,024 steps (some 50 KB each) and scalars of 65,536
steps (some 4 KB each).

Raw tokens and texts that are left out because of `tokens_every`, `max_gb` or a busy writer stay in memory for a few
steps, up to 4.2 million tokens (150 MB). They are written after all if an alert begins or gets worse near their step
(see monitor/store/evidence.py). Such tokens may take a tenth of `max_gb` beyond it.

On a full disk scalars and alerts go into a reserve that the recorder keeps for them. They wait in memory only when the
reserve is used up.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from monitor.errors import StoreError
from monitor.metrics import MOST_OTHERS, NAME_LENGTH, can_be_named, is_known
from monitor.records import Alert, RunInfo, SampleTable, StepRecord, TokenTable
from monitor.store.batch import Item
from monitor.store.mirror import Mirror
from monitor.store.pipeline import Pipeline
from monitor.store.writer import Fsync, RunWriter

_log = logging.getLogger("rlvr.monitor")
_TOKENS_AT = 8_192  # raw tokens are given up once this many for each of queue_steps wait
_HISTOGRAMS_AT = 4  # histograms are given up once this many times queue_steps steps wait
_STEPS_AT = 256
_STEP_END = 2**63
_CLOSE_S = 60.0  # the longest that close() waits for the writer


class Engine(Protocol):
    """Judges each step; returns the transitions of its alerts."""

    def observe(self, step: int, scalars: Mapping[str, float]) -> list[Alert]: ...


class Sink(Protocol):
    """Gets every step of a run, for wandb or a terminal, say. `start` and `close` run in the caller's thread.

    A sink may also have `verdict(sentence)`, which gets what there is to say of the run: as soon as it can be judged,
    when an alert fires or ends, and when the recorder closes.
    """

    def start(self, info: RunInfo) -> None: ...

    def step(self, record: StepRecord, alerts: Sequence[Alert]) -> None: ...

    def close(self, status: str) -> None: ...


class Recorder:
    """Records one rank of one run into a store.

    store: the folder, made if missing.
    run: a RunInfo, or just a name of letters, digits, '.', '_' and '-'. The name must be new unless `resume` is True.
    resume: opens the next attempt of a run that exists.
    attempt: its number, by default one more than this rank's last. All ranks of a resumed run must give the same, one
        more than `monitor.get_run(store, run).attempt`, where their number may have changed: steps of an earlier
        attempt give way to a later one of any rank.
    engine: judges each step in the writer thread. Its alerts are committed with the step and given to `on_alert` and
        the sinks.
    queue_steps: how many steps may wait before parts of new ones are given up (see the module's docstring).
    max_gb: no raw tokens are recorded once this rank's segments hold this many GB, except around alerts.
    tokens_every: raw tokens are recorded of every n-th step, and of the steps around alerts.
    flush_s: shortest time between two writes, seconds, so that tiny steps do not make thousands of files.
    mirror: URL of an object store, s3://BUCKET/PREFIX say, to which a thread copies what is durable here (see "Beyond
        one disk" in docs/store.md). While it cannot be reached only the copies wait; `close` tries for a minute.
    fsync: what survives a power cut: every acknowledged step ("every-step"), all but those of about the last five
        seconds ("interval"), or what the system has written by itself ("none"). A step that is acknowledged survives
        the end of the process, however it ends, under each of them.
    mantissa_bits: round logprob, entropy, renyi2 and deviation of raw tokens to the nearest number with that many bits
        of mantissa, 1 to 22, so that they take less room: each is off by at most 2^-(mantissa_bits + 1) of itself.
        Weights stay exact, and so do histograms, scalars and alerts, which are made before. None: nothing is rounded.

    Raises StoreError if the store or the run cannot be opened. Afterwards nothing raises into training.

    Example:
        with Recorder("runs", RunInfo(name="ict-s0", task="chain")) as recorder:
            recorder.record(StepRecord(1, {"reward": 0.2, "entropy": 1.1}))
    """

    def __init__(
        self,
        store: str | Path,
        run: RunInfo | str,
        *,
        rank: int = 0,
        resume: bool = False,
        attempt: int | None = None,
        engine: Engine | None = None,
        sinks: Sequence[Sink] = (),
        on_alert: Callable[[Alert], None] | None = None,
        queue_steps: int = 256,
        max_gb: float | None = None,
        tokens_every: int = 1,
        flush_s: float = 0.2,
        mirror: str | None = None,
        fsync: Fsync = "every-step",
        mantissa_bits: int | None = None,
    ) -> None:
        for name, value, ok in (
            ("queue_steps", queue_steps, queue_steps >= 1),
            ("tokens_every", tokens_every, tokens_every >= 1),
            ("flush_s", flush_s, flush_s >= 0),
            ("max_gb", max_gb, max_gb is None or max_gb > 0),
        ):
            if not ok:
                raise StoreError(f"{name} is {value}, expected a positive number. Change it or leave it out.")
        run = RunInfo(name=run) if isinstance(run, str) else run
        self._queue_steps, self._tokens_every = queue_steps, tokens_every
        self._seen: set[str] = set()  # names of scalars that are recorded
        self._others = 0  # how many of them METRICS does not know
        self._step_keys: set[str] = set()  # scalars recorded for the last step
        self._warned: set[str] = set()
        self._closed = False
        self._owner = os.getpid()
        writer = RunWriter(
            store, run, rank=rank, resume=resume, attempt=attempt, fsync=fsync, mantissa_bits=mantissa_bits
        )
        self._last: int | None = None  # of this attempt: a resumed one may go back to its checkpoint
        try:
            self._pipe = Pipeline(
                writer,
                engine=engine,
                on_alert=on_alert,
                max_bytes=max_gb and max_gb * 1e9,
                flush_s=flush_s,
            )
            since = f", resumed after step {writer.last_step()}" if resume else ""
            self._pipe.note("attempt", f"Attempt {writer.attempt}{since}.", None)
            if mantissa_bits is not None:
                bound = f"off by at most 2^-{mantissa_bits + 1} of itself"
                told = f"Raw tokens keep {mantissa_bits} bits of mantissa: a value is {bound}."
                self._pipe.note("tokens_rounded", told, None)
            copies = Mirror(writer.store, mirror, run.name, rank, self.event) if mirror else None
            self._pipe.start()
        except BaseException as error:
            writer.abandon()
            if isinstance(error, OSError | RuntimeError):
                raise StoreError(f"Cannot start recording run {run.name!r} in {str(store)!r}: {error}.") from error
            raise
        self._mirror = copies if copies and self._guarded("mirror_error", copies.start) else None
        self._sinks = [sink for sink in sinks if self._guarded("sink_error", partial(sink.start, run))]
        self._pipe.sinks = self._sinks  # those that could start; no step has been recorded yet
        atexit.register(self.close, "stopped")

    def record(self, record: StepRecord, tokens: TokenTable | None = None, samples: SampleTable | None = None) -> None:
        """Hand over a step. Returns at once and never raises.

        The arrays are not copied, so do not change them afterwards. Scalars that METRICS does not know are recorded
        under their own names: printable texts of at most 200 characters, at most 2,000 of them. What else is called
        unknown, and steps below the last one, are left out with an event. The last step may be handed over again with
        further scalars, of an evaluation say.
        """
        self._guarded("record_error", lambda: self._record(record, tokens, samples))

    def event(self, kind: str, message: str, step: int | None = None) -> None:
        """Record something that happened to the run. Returns at once and never raises."""
        if not self._closed and os.getpid() == self._owner:
            self._guarded("record_error", lambda: self._pipe.note(str(kind), str(message), step))

    @property
    def acknowledged(self) -> int | None:
        """The last durable step of this attempt, or None."""
        return self._pipe.acknowledged

    @property
    def queue_depth(self) -> int:
        """Steps that are not durable yet."""
        return self._pipe.waiting

    @property
    def lost_steps(self) -> int:
        """How many steps were handed over but given up for good. If there are any, `close` marks the run failed."""
        return self._pipe.lost_steps

    def busy(self, what: str) -> AbstractContextManager[None]:
        """A `with` block in which the trainer does no steps, but an evaluation say: the run does not count as stalled.

        Example: with recorder.busy("evaluation"): scalars = evaluate(policy)
        """
        if self._closed or os.getpid() != self._owner:
            return nullcontext()
        return self._pipe.busy(str(what))

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until no step waits. True if all steps handed over so far are durable: none is late or given up."""
        return self._pipe.flush(timeout_s)

    def close(self, status: str = "finished") -> None:
        """Write all that waits, then a final heartbeat with `status`: "finished", "stopped" or "failed".

        It is safe to call this twice.

        A run with `lost_steps` is marked failed, whatever `status` says.
        """
        if self._closed or os.getpid() != self._owner:  # a forked child must not end its parent's run
            return
        self._closed = True
        atexit.unregister(self.close)
        written = self._pipe.close(status, _CLOSE_S)
        if written is None:
            _log.error("The recorder did not finish writing within %.0f s; waiting steps may be lost.", _CLOSE_S)
        status = written or "failed"
        if self._mirror is not None:
            self._guarded("mirror_error", self._mirror.close)
        for sink in self._sinks:
            self._guarded("sink_error", partial(sink.close, status))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.close("finished")
        else:
            self.close("failed" if issubclass(kind, Exception) else "stopped")

    def _record(self, record: StepRecord, tokens: TokenTable | None, samples: SampleTable | None) -> None:
        if self._closed or os.getpid() != self._owner:
            self._warn("closed", "A closed recorder, or one of a parent process, was given a step: not recorded.")
            return
        step = int(record.step)
        if step >= _STEP_END:
            self._refuse("step_order", f"Step {step} was not recorded: expected one below 2^63.", None)
            return
        if step < 0 or (self._last is not None and step < self._last):
            self._refuse("step_order", f"Step {step} came after step {self._last}: steps must not go back.", step)
            return
        again = step == self._last and bool(self._step_keys)
        record = replace(record, step=step, scalars=self._scalars(record, again), histograms=self._histograms(record))
        if again and (record.histograms or tokens is not None or samples is not None):
            self._refuse("step_again", f"Step {step} came again: only its new scalars were recorded.", step)
            record, tokens, samples = replace(record, histograms=()), None, None
        if again and not record.scalars:
            return
        self._step_keys = (self._step_keys if again else set()) | set(record.scalars)
        self._last = step
        item = Item(record, tokens, samples, time.time() if record.ts is None else float(record.ts), again)
        if step % self._tokens_every:
            item.tokens, item.held_tokens = None, tokens
        self._enqueue(item)

    def _scalars(self, record: StepRecord, again: bool) -> dict[str, float]:
        scalars = {"perf/queue": float(self._pipe.waiting)} if not again else {}  # no step is without a commit row
        for key, value in record.scalars.items():
            if not self._is_recorded(key, record.step) or (again and key in self._step_keys):
                continue
            try:
                scalars[key] = float(value)
            except (TypeError, ValueError):
                self._refuse(f"value of {key}", f"{key} is {value!r} in step {record.step}, not a number.", record.step)
        return scalars

    def _histograms(self, record: StepRecord) -> tuple[Any, ...]:
        """Those of known metrics: the cells of others would have no meaning."""
        for one in record.histograms:
            if not is_known(one.metric):
                told = f"{one.metric!r} is no known metric. Its histogram is not recorded."
                self._refuse_name(one.metric, told, record.step)
        return tuple(histogram for histogram in record.histograms if is_known(histogram.metric))

    def _is_recorded(self, key: str, step: int) -> bool:
        """Whether a scalar of this name is recorded: under its own name if METRICS does not know it."""
        if key in self._seen:
            return True
        if not can_be_named(key):
            expected = f"expected printable text of 1 to {NAME_LENGTH} characters"
            self._refuse_name(key, f"{str(key)[:60]!r} cannot be the name of a scalar: {expected}.", step)
            return False
        if not is_known(key):
            if self._others >= MOST_OTHERS:
                told = f"{key!r} and later new names are not recorded: the run has {MOST_OTHERS:,} unknown ones."
                self._refuse("unknown_metric", told, step)
                return False
            self._others += 1
        self._seen.add(key)
        return True

    def _refuse_name(self, key: object, message: str, step: int) -> None:
        self._refuse(f"unknown_metric {key}", message, step, kind="unknown_metric")

    def _enqueue(self, item: Item) -> None:
        waiting, queue, full = self._pipe.waiting, self._queue_steps, self._pipe.disk_full
        if waiting >= _STEPS_AT * queue:
            self._pipe.give_up(item, "steps", waiting)
            return
        if self._pipe.histogram_steps >= _HISTOGRAMS_AT * queue and item.record.histograms:
            self._pipe.give_up(item, "histograms", waiting)
            item.record = replace(item.record, histograms=())
        if (waiting >= queue or full) and item.samples is not None:
            self._pipe.give_up(item, "samples", waiting)
            item.samples, item.held_samples = None, item.samples
        behind = waiting >= queue or self._pipe.token_rows >= _TOKENS_AT * queue
        if (behind or full) and item.tokens is not None:
            self._pipe.give_up(item, "tokens", waiting)
            item.tokens, item.held_tokens = None, item.tokens
        self._pipe.put(item)

    def _refuse(self, key: str, message: str, step: int | None, kind: str | None = None) -> None:
        """Make an event and a warning, but only the first time: a fault in every step must not fill the store."""
        if self._warn(key, message):
            self._pipe.note(kind or key.split(" ")[0], message, step)

    def _warn(self, key: str, message: str) -> bool:
        if key in self._warned:
            return False
        self._warned.add(key)
        _log.warning(message)
        return True

    def _guarded(self, kind: str, action: Callable[[], object]) -> bool:
        try:
            action()
            return True
        except Exception as error:  # monitoring must not take training down
            try:
                self._pipe.fault(kind, error, None)
            except Exception:
                _log.exception("The recorder failed: %s", kind)
            return False
