"""Rollouts: what trainers dump of each step's rollouts, in a folder with files for each step.

    N.jsonl, N.parquet          a row for each rollout, as verl's trainer.rollout_data_dir has them, or for each token
    step_N/rank_R.jsonl         a row for each sequence with lists of its tokens' values, as prime-rl's
                                enable_token_export writes them; complete once step_N/STABLE is there
    stream/, annotations/       the traces of prime-rl's newer file monitor, see traces.py
    N.pt, rollout_data/N.pt     the dumps of slime and miles, see dumps.py; train_data/ beside adds what the trainer
                                has computed

What a row does not tell stays absent: its column is NULL in the store.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from monitor.errors import MonitorError
from monitor.integrations.files.dumps import TRAINING, dump_files, dump_rows
from monitor.integrations.files.traces import Traces
from monitor.metrics import METRICS, inner_edges, n_cells
from monitor.records import Histogram, SampleTable, TokenTable

_QUIET_S = 1.0  # a file that has not changed for as long is complete
_STABLE = "STABLE"
_OTHER_FORM = (AttributeError, IndexError, KeyError, TypeError, ValueError)  # what reading files of another form raises
_SAMPLE_NAMES = {  # a row's name for a column of `samples`, where they differ; of several the first that is there
    "prompt": ("prompt", "input"),
    "completion": ("completion", "output"),
    "reward": ("reward", "score"),
    "correct": ("correct", "acc"),
}
_TEXTS = ("prompt_id", "split", "prompt", "completion")
_TOKEN_NAMES = {"text": "token_texts"}
_HISTOGRAMS = {"entropy": "entropy", "surprisal": "logprob"}  # metric: the token's value that it is made of


@dataclass(frozen=True, slots=True)
class StepRollouts:
    """The rollouts of one step. tokens: None where the source has texts alone."""

    samples: SampleTable
    tokens: TokenTable | None
    histograms: tuple[Histogram, ...]


class Rollouts:
    """The rollouts in `folder`, step by step."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._traces = Traces(self.folder)

    def is_complete(self, step: int) -> bool:
        """Whether the files of a step are there and will not change any more."""
        if self._traces.exist:
            try:
                return self._traces.is_complete(step)
            except (MonitorError, *_OTHER_FORM):
                return True  # for `read`, which says what is wrong
        files = self._files(step)
        if not files or self.waits_for_training(step):
            return False
        if files[0].parent.name == f"step_{step}":
            return (files[0].parent / _STABLE).exists()
        return time.time() - max(path.stat().st_mtime for path in files) >= _QUIET_S

    def waits_for_training(self, step: int) -> bool:
        """Whether a step's rollouts are there, and what the trainer dumps of them, once it has scored them, is not."""
        if self._traces.exist:
            return self._traces.waits_for_training(step)
        parents = {path.parent.name for path in self._files(step)}
        return bool(parents) and TRAINING not in parents and (self.folder / TRAINING).is_dir()

    def read(self, step: int) -> StepRollouts | None:
        """The rollouts of a step, None if there are none. Raises MonitorError for files of another form."""
        files = [] if self._traces.exist else self._files(step)
        try:
            rows: Sequence[dict[str, Any]]
            if self._traces.exist:
                rows = self._traces.rows(step)
            elif files and files[0].suffix == ".pt":
                rows = dump_rows(files)
            else:
                rows = _rollouts([row for path in files for row in _rows(path)])
            return _tables(rows) if rows else None
        except _OTHER_FORM as error:
            named = str(files[0] if files else self.folder)
            raise MonitorError(f"{named!r} holds no rollouts of a known form: {error!r}.") from None

    def _files(self, step: int) -> list[Path]:
        whole = [path for end in ("jsonl", "parquet") if (path := self.folder / f"{step}.{end}").is_file()]
        exported = sorted((self.folder / f"step_{step}").glob("rank_*.jsonl"))
        return whole[:1] or exported or dump_files(self.folder, step)


def _rollouts(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Rows of rollouts, of rows in any of the forms of lines."""
    if not rows:
        return rows
    return _sequences(rows) if "loss_mask" in rows[0] else _by_token(rows) if "position" in rows[0] else rows


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_table(path).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise MonitorError(f"{str(path)!r} cannot be read as Parquet: {error}.") from None
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise MonitorError(f"{str(path)!r} is not JSON lines: {error}.") from None
    if not all(isinstance(row, dict) for row in rows):
        raise MonitorError(f"{str(path)!r} has lines that are no objects, expected one for each rollout or token.")
    return rows


def _sequences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples of prime-rl's sequences. The response is what the loss mask selects, the prompt all before it."""
    samples = []
    for row in rows:
        at = np.flatnonzero(row["loss_mask"])
        pick = {name: [row[name][i] for i in at] for name in ("token_ids", "trainer_logprobs", "entropy")}
        first = int(at[0]) if len(at) else len(row["token_ids"])
        samples.append(
            {
                "group": tuple(row["token_ids"][:first]),
                "reward": _only(row, "rewards", at),
                "advantage": _only(row, "advantages", at),
                "n_tokens": len(at),
                "token_id": pick["token_ids"],
                "logprob": pick["trainer_logprobs"],
                "entropy": pick["entropy"],
            }
        )
    return samples


def _only(row: Mapping[str, Any], name: str, at: np.ndarray) -> Any:
    """The value that all response tokens share; None if there is none."""
    values = {row[name][i] for i in at} if row.get(name) else set()
    return values.pop() if len(values) == 1 else None


def _by_token(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples of rows of tokens: `sample` and `position` say which one; other columns are the token's or the rollout's.

    A column of `tokens` becomes a list, with None where a row lacks it; so does `text`. Of others the first row counts.
    """
    per_token = {spec.name for spec in fields(TokenTable)} - {"sample", "position"} | {"text"}
    columns = [name for name in per_token if any(name in row for row in rows)]
    samples: dict[Any, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["sample"], row["position"])):
        own = {name: value for name, value in row.items() if name not in per_token and name != "position"}
        sample = samples.setdefault(row["sample"], own | {name: [] for name in columns} | {"positions": []})
        sample["positions"].append(row["position"])
        for name in columns:
            sample[name].append(row.get(name))
    return [{_TOKEN_NAMES.get(name, name): value for name, value in one.items()} for one in samples.values()]


def _tables(rows: Sequence[Mapping[str, Any]]) -> StepRollouts:
    """The tables of rows of rollouts, and histograms of the token values they have."""
    groups: dict[Any, int] = {}
    columns: dict[str, Any] = {spec.name: [] for spec in fields(SampleTable)}
    tokens: dict[str, Any] = {spec.name: [] for spec in fields(TokenTable)}
    for index, row in enumerate(rows):
        for name, values in columns.items():
            told = (row[key] for key in _SAMPLE_NAMES.get(name, (name,)) if row.get(key) is not None)
            values.append(next(told, None))
            if name in _TEXTS and not isinstance(values[-1], str | None):
                values[-1] = json.dumps(values[-1], ensure_ascii=False)
        columns["sample"][-1] = index
        columns["group_id"][-1] = groups.setdefault(_group(row), len(groups))
        columns["split"][-1] = columns["split"][-1] or "train"
        correct = columns["correct"][-1]
        columns["correct"][-1] = bool(correct) if correct in (0, 1) else None
        length = next((len(row[name]) for name in ("token_id", "logprob", "entropy") if row.get(name)), 0)
        if length:
            columns["n_tokens"][-1] = length
            tokens["sample"] += [index] * length
            tokens["position"] += row.get("positions") or range(length)
            for name in set(tokens) - {"sample", "position"}:
                tokens[name] += row.get(name) or [None] * length
    table = TokenTable(**tokens) if tokens["sample"] else None
    return StepRollouts(SampleTable(**columns), table, _histograms(tokens))


def _group(row: Mapping[str, Any]) -> Any:
    """What the rollouts of one prompt share: the group that the row tells, verl's uid before the rollout's number, or
    the prompt itself."""
    for name in ("group_id", "group", "prompt_id"):
        if row.get(name) is not None:
            return row[name]
    uid = row.get("uid")
    if isinstance(uid, str) and uid.count("_") >= 2:  # sample_rollout_output
        return uid.rsplit("_", 2)[0]
    prompt = next((row[name] for name in ("prompt", "input", "uid") if row.get(name) is not None), None)
    return json.dumps(prompt) if isinstance(prompt, list | dict) else prompt  # a conversation


def _histograms(tokens: Mapping[str, Sequence[Any]]) -> tuple[Histogram, ...]:
    found = []
    for metric, name in _HISTOGRAMS.items():
        present = [value for value in tokens[name] if value is not None]
        if present:
            values = np.asarray(present, np.float32) * (-1 if metric == "surprisal" else 1)
            found.append(_histogram(metric, values))
    return tuple(found)


def _histogram(metric: str, values: np.ndarray) -> Histogram:
    """Counts of float32 [n] values on the cells of the metric, split "all"."""
    edges = METRICS[metric].edges
    assert edges is not None, metric
    finite = values[np.isfinite(values)]
    cells = np.searchsorted(inner_edges(edges), finite, side="right")  # low <= value < high
    exact = finite.astype(np.float64)
    return Histogram(
        metric, "all", edges, np.bincount(cells, minlength=n_cells(edges)).astype(np.int64), len(finite),
        n_nonfinite=len(values) - len(finite), sum=float(exact.sum()), sumsq=float((exact**2).sum()),
        min=float(exact.min(initial=np.inf)), max=float(exact.max(initial=-np.inf)),
    )  # fmt: skip
