"""From handed-over steps to tables that wait to be published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import pyarrow as pa

from monitor.records import Alert, SampleTable, StepRecord, TokenTable
from monitor.store import rows
from monitor.store.gaps import Event

Fault = Callable[[str, Exception, int | None], None]  # kind, error, step
Lost = Callable[[int, Exception], None]  # step, error


@dataclass(slots=True, eq=False)
class Item:
    """One handed-over step on its way to the disk."""

    record: StepRecord
    tokens: TokenTable | None
    samples: SampleTable | None
    ts: float
    again: bool = False  # further scalars of a step that was handed over before
    alerts: list[Alert] = field(default_factory=list)
    held_tokens: TokenTable | None = None  # left out by thinning, but in memory for as long as an alert may ask for it
    held_samples: SampleTable | None = None
    in_gap: int = 0  # rows of held_tokens that were counted as given up

    @property
    def token_rows(self) -> int:
        return 0 if self.tokens is None else len(self.tokens)

    @property
    def held_rows(self) -> int:
        """Rows of held_tokens, and texts of tokens in held_samples, which take as much memory."""
        rows = 0 if self.held_tokens is None else len(self.held_tokens)
        if self.held_samples is None:
            return rows
        lengths = np.asarray(self.held_samples.n_tokens, np.float64)  # None, which is nan here, where it is not known
        return rows + int(np.nansum(lengths))


@dataclass(slots=True)
class Batch:
    """Rows that wait to be published. `tables` loses each table once it is durable, so a retry writes no row twice."""

    first_step: int
    last_step: int
    tables: dict[str, pa.Table]
    n_steps: int = 0  # hand-overs whose rows are in `steps`; 0: events alone
    token_rows: int = 0  # raw tokens handed over, until they are durable or given up
    tried: bool = False  # a table of it may be on disk under its name: it joins no other

    def join(self, later: Batch) -> Batch:
        """Both batches as one."""
        names = {**self.tables, **later.tables}
        both = {name: [batch.tables[name] for batch in (self, later) if name in batch.tables] for name in names}
        tables = {name: pa.concat_tables(parts) for name, parts in both.items()}
        spans = [batch for batch in (self, later) if batch.n_steps] or [later]
        first, last = min(span.first_step for span in spans), max(span.last_step for span in spans)
        return Batch(first, last, tables, self.n_steps + later.n_steps, self.token_rows + later.token_rows)

    def span(self, table: str) -> tuple[int, int]:
        """First and last step of a table's segment: tokens and samples may be of steps before the batch's own."""
        if table not in ("tokens", "samples"):
            return self.first_step, self.last_step
        steps = self.tables[table]["step"].to_numpy()
        return int(steps.min()), int(steps.max())

    def take(self, table: str) -> Batch | None:
        """One table of the batch as a batch of its own, which commits no step; None if there is none."""
        rows_of = self.tables.pop(table, None)
        return None if rows_of is None else Batch(self.first_step, self.last_step, {table: rows_of})


def joined(batches: Sequence[Batch]) -> list[Batch]:
    """The batches as one, or none."""
    return [reduce(Batch.join, batches)] if batches else []


def batch_of(
    items: Sequence[Item],
    events: Sequence[Event],
    *,
    earlier: Sequence[Item] = (),
    last_step: int,
    mantissa_bits: int | None = None,
    fault: Fault,
    lost: Lost,
) -> Batch:
    """One batch of steps and events. last_step dates events alone.

    earlier: steps of earlier batches, committed there, whose tokens and samples are written with this one.
    mantissa_bits: what raw tokens are rounded to (`rows.round_mantissa`); None: they are exact.

    Rows that do not fit their table go to `fault` and hold up no others. A step without rows in `steps` could never be
    committed: all of it goes to `lost`, and the batch does not count it.
    """
    parts: dict[str, list[pa.Table]] = {}

    def add(table: str, step: int | None, make: Callable[..., pa.Table], *args: object) -> None:
        try:
            parts.setdefault(table, []).append(make(*args))
        except Exception as error:
            fault(f"bad_{table}", error, step)

    def add_raw(item: Item) -> None:
        step = item.record.step
        if item.token_rows:
            add("tokens", step, rows.token_rows, step, item.tokens, mantissa_bits)
        if item.samples is not None and len(item.samples):
            add("samples", step, rows.sample_rows, step, item.samples)

    for item in earlier:
        add_raw(item)
    kept, commits = _committed(items, lost)
    for item in kept:
        step = item.record.step
        add_raw(item)
        if item.record.histograms:
            add("histograms", step, rows.histogram_rows, step, item.record.histograms)
        if item.alerts:
            add("alerts", step, rows.alert_rows, item.ts, item.alerts)
    if kept:
        parts["steps"] = commits
    if events:
        add("events", None, rows.event_rows, events)
    tables = {table: pa.concat_tables(some) for table, some in parts.items() if some}
    token_rows = sum(item.token_rows for item in [*earlier, *items])
    if not kept:
        return Batch(last_step, last_step, tables, 0, token_rows)
    return Batch(kept[0].record.step, kept[-1].record.step, tables, len(kept), token_rows)


def _committed(items: Sequence[Item], lost: Lost) -> tuple[list[Item], list[pa.Table]]:
    """The steps that have rows in `steps`, and these; the others go to `lost`."""
    try:
        return list(items), [rows.step_rows([(item.record.step, item.ts, item.record.scalars) for item in items])]
    except Exception:
        kept, commits = [], []
        for item in items:  # one of them is the fault
            try:
                commits.append(rows.step_rows([(item.record.step, item.ts, item.record.scalars)]))
                kept.append(item)
            except Exception as error:
                lost(item.record.step, error)
        return kept, commits
