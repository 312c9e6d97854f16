"""Arrow rows of every table, from the records of one step. Runs in the recorder's writer thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa

from monitor.records import Alert, Histogram, SampleTable, TokenTable
from monitor.store.schema import TABLES

_ARROW = {
    "VARCHAR": pa.string(),
    "SMALLINT": pa.int16(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "FLOAT": pa.float32(),
    "DOUBLE": pa.float64(),
    "BOOLEAN": pa.bool_(),
    "VARCHAR[]": pa.list_(pa.string()),
    "BIGINT[]": pa.list_(pa.int64()),
}
_BLOCK = 64  # rows of Python values that are converted at once
ROUNDED = ("logprob", "entropy", "renyi2", "deviation")  # columns of `tokens` that may be rounded; `weight` never
_MANTISSA, _EXPONENT = 23, np.uint32(0x7F80_0000)  # bits of a float32's mantissa; where its exponent stands
_CONSTANT = ("run", "attempt", "rank")  # added by the segment writer
SCHEMAS = {
    table: pa.schema([(name, _ARROW[kind]) for name, kind in columns.items() if name not in _CONSTANT])
    for table, columns in TABLES.items()
}
_ALERT_COLUMNS = tuple(name for name in SCHEMAS["alerts"].names if name not in ("step", "ts"))


def _printable(value: Any) -> Any:
    """Text that UTF-8 can hold: a lone surrogate, which is half a character, becomes '?'."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return [_printable(item) for item in value]


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    if isinstance(values, np.ndarray):
        return pa.array(np.ascontiguousarray(values)).cast(kind)
    # In blocks, because Arrow holds the interpreter lock while it reads Python strings, and the trainer needs it too.
    blocks = [values[start : start + _BLOCK] for start in range(0, len(values), _BLOCK)]
    return pa.concat_arrays([_texts(block, kind) for block in blocks] or [pa.array([], kind)])


def _texts(values: Any, kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return pa.array(_printable(values), kind)


def _table(table: str, n: int, step: int | None, columns: Mapping[str, Any]) -> pa.Table:
    schema = SCHEMAS[table]
    filled = {"step": np.full(n, step, np.int64), **columns} if step is not None else columns
    return pa.Table.from_arrays([_column(filled[spec.name], spec.type) for spec in schema], schema=schema)


def token_rows(step: int, tokens: TokenTable, mantissa_bits: int | None = None) -> pa.Table:
    """Rows of `tokens`, with the columns `ROUNDED` rounded to `mantissa_bits` where that is given.

    Raises pa.ArrowException or ValueError if a column does not fit the schema.
    """
    table = _table("tokens", len(tokens), step, {spec.name: getattr(tokens, spec.name) for spec in fields(tokens)})
    if mantissa_bits is None:
        return table
    for name in ROUNDED:
        column = table[name].combine_chunks()
        values = round_mantissa(column.fill_null(0.0).to_numpy(), mantissa_bits)
        absent = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, mask=absent))
    return table


def round_mantissa(values: np.ndarray, bits: int) -> np.ndarray:
    """The nearest float32 whose mantissa needs only `bits` of its 23 bits, ties to even; of any shape.

    1 <= bits <= 22. |rounded - value| <= 2^-(bits + 1) |value|. What this bound could not be kept for stays as it is:
    zero and numbers below 2^-126, numbers that would round to infinity, infinite ones and nan.
    """
    held = np.ascontiguousarray(values, np.float32).view(np.uint32)
    dropped = np.uint32(_MANTISSA - bits)
    half = np.uint32((1 << (_MANTISSA - bits - 1)) - 1)
    near = (held + half + ((held >> dropped) & np.uint32(1))) >> dropped << dropped
    exponent = held & _EXPONENT
    keeps = (exponent == 0) | (exponent == _EXPONENT) | ((near & _EXPONENT) == _EXPONENT)
    return np.where(keeps, held, near).view(np.float32)


def sample_rows(step: int, samples: SampleTable) -> pa.Table:
    """Rows of `samples`. Raises like `token_rows`."""
    return _table("samples", len(samples), step, {spec.name: getattr(samples, spec.name) for spec in fields(samples)})


def histogram_rows(step: int, histograms: Sequence[Histogram]) -> pa.Table:
    """Rows of `histograms`, one for each (metric, split). Raises like `token_rows`."""
    columns: dict[str, Any] = {
        name: [getattr(histogram, name) for histogram in histograms]
        for name in ("metric", "split", "edges_id", "n", "n_nonfinite", "sum", "sumsq", "min", "max")
    }
    offsets = np.concatenate([[0], np.cumsum([len(histogram.counts) for histogram in histograms])])
    flat = np.concatenate([np.asarray(histogram.counts, np.int64) for histogram in histograms])
    columns["counts"] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat))
    return _table("histograms", len(histograms), step, columns)


def alert_rows(ts: float, alerts: Sequence[Alert]) -> pa.Table:
    """Rows of `alerts`; the step is each alert's own."""
    columns: dict[str, Any] = {name: [getattr(alert, name) for alert in alerts] for name in _ALERT_COLUMNS}
    columns["step"] = [alert.step for alert in alerts]
    columns["ts"] = [ts] * len(alerts)
    return _table("alerts", len(alerts), None, columns)


def event_rows(events: Sequence[tuple[float, int | None, str, str]]) -> pa.Table:
    """Rows of `events` from (ts, step or None, kind, message)."""
    ts, step, kind, message = zip(*events, strict=True)
    columns = {"ts": list(ts), "step": list(step), "kind": list(kind), "message": list(message)}
    return _table("events", len(ts), None, columns)


def step_rows(steps: Sequence[tuple[int, float, Mapping[str, float]]]) -> pa.Table:
    """Rows of `steps`, one for each scalar, of all these (step, ts, scalars) at once: tables of one each cost more."""
    lengths = [len(scalars) for _, _, scalars in steps]
    columns: dict[str, Any] = {
        "step": np.repeat(np.array([step for step, _, _ in steps], np.int64), lengths),
        "ts": np.repeat(np.array([ts for _, ts, _ in steps], np.float64), lengths),
        "name": [name for _, _, scalars in steps for name in scalars],
        "value": np.array([value for _, _, scalars in steps for value in scalars.values()], np.float64),
    }
    return _table("steps", sum(lengths), None, columns)
