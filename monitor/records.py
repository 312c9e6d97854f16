"""The frozen values that flow into the store: RunInfo, StepRecord, Histogram, TokenTable, SampleTable, Alert."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np

from monitor.metrics import cell_bounds, n_cells

Severity = Literal["info", "warning", "critical"]
SEVERITY_RANK = {severity: rank for rank, severity in enumerate(get_args(Severity))}
AlertState = Literal["pending", "firing", "resolved"]
RunStatus = Literal["running", "finished", "stopped", "stalled", "crashed", "failed"]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What identifies a run. It is written once, as run.json, before the first step.

    Example: RunInfo(name="ict-s0", model="builtin", task="chain", weighting="ict", seed=0,
    comparison="demo-1", config={...}, environment={"commit": ..., "packages": {...}, "device": ...}).
    Runs with equal `comparison` and `seed` started from the same policy and prompts and can be paired.
    """

    name: str
    model: str = ""
    task: str = ""
    weighting: str = "uniform"
    seed: int = 0
    comparison: str = ""
    warmup_steps: int = 0  # steps before alerts take their baseline
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counts of one metric over one split of a step's tokens, on fixed shared cells (monitor.metrics).

    counts: int64 [n_cells(edges_id)], sum(counts) = n. sum, sumsq, min and max are float64 over the n finite values;
    if n = 0, min = inf and max = -inf. n_nonfinite: values that are not finite, which are not in counts. `a + b` is
    exactly the histogram of the joined data.
    """

    metric: str
    split: str
    edges_id: str
    counts: np.ndarray
    n: int
    n_nonfinite: int = 0
    sum: float = 0.0
    sumsq: float = 0.0
    min: float = float("inf")
    max: float = float("-inf")

    def __post_init__(self) -> None:
        if self.counts.shape != (n_cells(self.edges_id),):
            raise ValueError(
                f"Histogram {self.metric}/{self.split}: counts have shape {self.counts.shape}, "
                f"expected ({n_cells(self.edges_id)},) for edges {self.edges_id!r}."
            )

    def __add__(self, other: Histogram) -> Histogram:
        mine, theirs = (self.metric, self.split, self.edges_id), (other.metric, other.split, other.edges_id)
        if mine != theirs:
            raise ValueError(f"Cannot add histograms of different (metric, split, edges): {mine} and {theirs}.")
        return Histogram(
            *mine,
            counts=self.counts + other.counts,
            n=self.n + other.n,
            n_nonfinite=self.n_nonfinite + other.n_nonfinite,
            sum=self.sum + other.sum,
            sumsq=self.sumsq + other.sumsq,
            min=min(self.min, other.min),
            max=max(self.max, other.max),
        )

    @property
    def mean(self) -> float:
        return self.sum / self.n if self.n else float("nan")

    def quantiles(self, qs: np.ndarray | list[float]) -> np.ndarray:
        """Quantiles from counts, float64 [len(qs)]; see `quantiles_from_counts`."""
        return quantiles_from_counts(self.counts, self.edges_id, qs, low=self.min, high=self.max)


def quantiles_from_counts(
    counts: np.ndarray,
    edges_id: str,
    qs: Sequence[float] | np.ndarray,
    *,
    low: float | np.ndarray,
    high: float | np.ndarray,
) -> np.ndarray:
    """Quantiles of binned data: linear inside the cell that holds rank q * n. hist_quantile in SQL does the same.

    The outermost cells are open; they are closed with the data's own min (`low`) and max (`high`), so no quantile
    leaves the data's range.
    One histogram: counts [cells], low and high scalars -> float64 [len(qs)]. Several: counts [S, cells], low and high
    [S] -> float64 [S, len(qs)]. The result is nan where there is no data. The error is at most the width of one cell
    (12.3 % of the value on the 96 log-spaced cells of entropy, 15.0 % for deviation).
    """
    table = np.atleast_2d(counts)
    lows, highs = cell_bounds(edges_id)
    total, cumulative, row = table.sum(1), table.cumsum(1), np.arange(len(table))
    low, high = np.where(total > 0, low, 0.0), np.where(total > 0, high, 0.0)  # an empty histogram has infinite bounds
    out = np.full((len(table), len(qs)), np.nan)
    for column, q in enumerate(qs):
        rank = q * total
        cell = np.minimum((cumulative < rank[:, None]).sum(1), table.shape[1] - 1)
        cell = np.where(table[row, cell] == 0, np.argmax(table > 0, axis=1), cell)  # q = 0: the first filled cell
        inside = (rank - (cumulative[row, cell] - table[row, cell])) / np.maximum(table[row, cell], 1)
        bottom, top = np.clip(lows[cell], low, high), np.clip(highs[cell], low, high)
        out[:, column] = np.where(total > 0, bottom + np.clip(inside, 0.0, 1.0) * (top - bottom), np.nan)
    return out if np.ndim(counts) == 2 else out[0]


@dataclass(frozen=True, slots=True, eq=False)
class StepRecord:
    """Scalars and histograms of one training step.

    Keys of `scalars` are those of monitor.metrics.metric, or names of one's own, which no rule and no chart but the
    list of other series looks at. ts: when the step ended, seconds since 1970; None: now.
    """

    step: int
    scalars: Mapping[str, float]
    histograms: tuple[Histogram, ...] = ()
    ts: float | None = None


def _check_columns(table: Any, lengths_of: str) -> None:
    expected = len(getattr(table, lengths_of))
    for spec in fields(table):
        column = getattr(table, spec.name)
        if len(column) != expected:
            raise ValueError(
                f"{type(table).__name__}.{spec.name} has {len(column)} rows, expected {expected} like {lengths_of}."
            )


@dataclass(frozen=True, slots=True, eq=False)
class TokenTable:
    """One row for each response token of a step. Columns are [rows], in nats; `sample` and `position` count from 0.

    A column may be a list with None for what is not known.
    """

    sample: np.ndarray  # int32, index into the step's SampleTable
    position: np.ndarray  # int32, response position
    token_id: np.ndarray  # int32
    logprob: np.ndarray  # float32
    entropy: np.ndarray  # float32
    renyi2: np.ndarray  # float32
    deviation: np.ndarray  # float32, group Jensen-Shannon
    alive: np.ndarray  # int32, rollouts of the group alive at this position
    weight: np.ndarray  # float32

    def __post_init__(self) -> None:
        _check_columns(self, "sample")

    def __len__(self) -> int:
        return len(self.sample)


@dataclass(frozen=True, slots=True, eq=False)
class SampleTable:
    """One row for each rollout of a step. Columns [rows], lists with None for what is not known."""

    sample: np.ndarray  # int32
    group_id: np.ndarray  # int32
    prompt_id: list[str]
    split: list[str]
    reward: np.ndarray  # float32
    correct: np.ndarray  # bool
    advantage: np.ndarray  # float32
    n_tokens: np.ndarray  # int32
    truncated: np.ndarray  # bool
    prompt: list[str]
    completion: list[str]
    token_texts: list[list[str]]  # one string for each response token

    def __post_init__(self) -> None:
        _check_columns(self, "sample")

    def __len__(self) -> int:
        return len(self.sample)


@dataclass(frozen=True, slots=True)
class Alert:
    """One transition of one alert. `step`: when this transition happened. `first_step`: when the alert first fired."""

    rule: str
    severity: Severity
    state: AlertState
    step: int
    first_step: int
    value: float
    baseline: float
    threshold: float
    message: str
    action: str = ""  # what to do about it


def finite(value: Any) -> Any:
    """The value in a form that JSON can hold: nan and infinity become None, also inside dicts, lists and tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
