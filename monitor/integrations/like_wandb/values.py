"""What callers hand to `wandb.log`: numbers, nested dicts, Histogram, Table, and what is not recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from monitor.metrics import METRICS, inner_edges, n_cells
from monitor.records import Histogram as Recorded
from monitor.records import SampleTable

PROMPTS = ("prompt", "prompts", "input")
COMPLETIONS = ("completion", "completions", "response", "output", "text")
REWARDS = ("reward", "rewards", "score")
COUNTS = ("step", "global_step")


class Histogram:
    """As wandb.Histogram. One made of values, under a key of METRICS that has cells, is recorded on those cells."""

    def __init__(self, sequence: Any = None, np_histogram: Any = None, num_bins: int = 64) -> None:
        self.values = None if sequence is None else np.asarray(_on_host(sequence), np.float64).ravel()
        if self.values is not None:
            finite = self.values[np.isfinite(self.values)]
            counts, bins = np.histogram(finite, bins=num_bins)
        else:
            counts, bins = np_histogram if np_histogram is not None else ([], [])
        self.histogram, self.bins = list(map(int, counts)), list(map(float, bins))


class Table:
    """As wandb.Table: columns and rows. One with a column of prompts and one of completions becomes samples."""

    def __init__(
        self, columns: Sequence[str] | None = None, data: Any = None, rows: Any = None, dataframe: Any = None, **_: Any
    ) -> None:
        if dataframe is None and hasattr(data, "to_dict") and hasattr(data, "columns"):
            dataframe = data
        if dataframe is not None:
            columns, data = list(dataframe.columns), dataframe.values.tolist()
        data = rows if data is None else data
        self.columns: list[str] = list(columns) if columns is not None else ["Input", "Output", "Expected"]
        self.data: list[list[Any]] = [list(row) for row in (_on_host(data) if data is not None else [])]

    def add_data(self, *values: Any) -> None:
        if len(values) != len(self.columns):
            raise ValueError(f"The row has {len(values)} values, expected {len(self.columns)}: {self.columns}.")
        self.data.append(list(values))

    def add_row(self, *values: Any) -> None:
        self.add_data(*values)

    def add_column(self, name: str, data: Any, optional: bool = False) -> None:
        values = list(_on_host(data))
        if not self.data and not self.columns:
            self.data = [[] for _ in values]
        if len(values) != len(self.data):
            raise ValueError(f"Column {name!r} has {len(values)} values, expected {len(self.data)}, one for each row.")
        self.columns.append(name)
        for row, value in zip(self.data, values, strict=True):
            row.append(value)

    def get_column(self, name: str, convert_to: str | None = None) -> Any:
        place = self.columns.index(name)
        found = [row[place] for row in self.data]
        return np.array(found) if convert_to == "numpy" else found

    def iterrows(self) -> Any:
        return enumerate(self.data)


def flat(data: Mapping[Any, Any]) -> dict[str, Any]:
    """Nested dicts with their keys joined by dots, as W&B shows them."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in flat(value).items()}
        else:
            found[str(key)] = value
    return found


def number(value: Any) -> float | None:
    """A number, bool, or array or tensor of one value as a float; None for anything else."""
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str | bytes) or value is None:
        return None
    try:
        return float(value.item()) if hasattr(type(value), "item") else None
    except (TypeError, ValueError, RuntimeError):  # several values, or text
        return None


def recorded_histogram(key: str, value: Any) -> Recorded | None:
    """The values of a Histogram under a key of METRICS on that key's cells; None where it has no values or cells."""
    values = getattr(value, "values", None)
    spec = METRICS.get(key)
    if spec is None or spec.edges is None or "*" in spec.edges or not isinstance(values, np.ndarray):
        return None
    finite = values[np.isfinite(values)]
    cells = np.searchsorted(inner_edges(spec.edges), finite.astype(np.float32), side="right")
    return Recorded(
        metric=key,
        split="all",
        edges_id=spec.edges,
        counts=np.bincount(cells, minlength=n_cells(spec.edges)).astype(np.int64),
        n=len(finite),
        n_nonfinite=len(values) - len(finite),
        sum=float(finite.sum()),
        sumsq=float((finite**2).sum()),
        min=float(finite.min()) if len(finite) else math.inf,
        max=float(finite.max()) if len(finite) else -math.inf,
    )


def is_table(value: Any) -> bool:
    return isinstance(getattr(value, "columns", None), list) and isinstance(getattr(value, "data", None), list)


def step_of(table: Any) -> Any:
    """What a Table has in the last row of a column that counts steps; None without one."""
    names = [str(column).lower() for column in table.columns]
    place = next((names.index(name) for name in COUNTS if name in names), None)
    return None if place is None or not table.data else table.data[-1][place]


def samples_of(table: Any, correct_at: float = 1.0) -> SampleTable | None:
    """Rollouts of a Table with completions and prompts or rewards; None for other tables.

    Callers log a growing table again and again: of one with a column of steps only the rows of the newest are taken.
    """
    names = [str(column).lower() for column in table.columns]

    def column(known: Sequence[str]) -> int | None:
        return next((names.index(name) for name in known if name in names), None)

    prompt, completion, reward = column(PROMPTS), column(COMPLETIONS), column(REWARDS)
    counted, advantage = column(COUNTS), column(("advantage", "advantages"))
    if completion is None or (prompt is None and reward is None):
        return None
    rows = list(table.data)
    if counted is not None and rows:
        rows = [row for row in rows if row[counted] == rows[-1][counted]]
    prompts = ["" if prompt is None else _text(row[prompt]) for row in rows]
    groups = {text: number_ for number_, text in enumerate(dict.fromkeys(prompts))}
    rewards = [None if reward is None else number(row[reward]) for row in rows]
    n = len(rows)
    columns: dict[str, Any] = {  # None is NULL in the store
        "reward": rewards,
        "correct": [None if value is None else value >= correct_at for value in rewards],
        "advantage": [None if advantage is None else number(row[advantage]) for row in rows],
        "n_tokens": [None] * n,
        "truncated": [None] * n,
    }
    return SampleTable(
        sample=np.arange(n, dtype=np.int32),
        group_id=np.array([groups[text] for text in prompts], np.int32),
        prompt_id=[str(groups[text]) for text in prompts],
        split=["train"] * n,
        **columns,
        prompt=prompts,
        completion=[_text(row[completion]) for row in rows],
        token_texts=[[] for _ in rows],
    )


def _text(value: Any) -> str:
    """A text; of a conversation its messages, one after another."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(message, Mapping) and "content" in message for message in value):
        return "\n".join(f"{message.get('role', '')}: {message['content']}" for message in value)
    return str(value)


def _on_host(value: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    detach: Callable[[], Any] | None = getattr(value, "detach", None)
    return detach().cpu().float().numpy() if detach is not None else value
