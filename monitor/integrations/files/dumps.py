"""Dumps of slime and miles: files of torch for each rollout step N, read without running what a pickle asks for.

    rollout_data/N.pt       {"rollout_id", "samples": [a Sample as a dict, ...]}, by --save-debug-rollout-data
    train_data/N.pt         {"format_version": 2, "samples": [the trainer's values, ...], "raw_reward": [...]}
    train_data/N_RANK.pt    {"rollout_id", "rank", "rollout_data": {name: [value of each sample of the rank, ...]}}

The folders are those of --dump-details. Without them all files may lie in one folder, and a word may stand before N, as
in rollout_N.pt. Evaluations (eval_N.pt) are left out: they do not tell whose they are.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from monitor.errors import MonitorError
from monitor.extras import require

TRAINING = "train_data"
_FOLDERS = ("", "rollout_data", TRAINING)
_NAME = re.compile(r"(?:(?P<word>[A-Za-z_-]*)[_-])?(?P<step>\d+)(?:_\d+)?")
_DTYPES = "?bBhHiIlLqQefdU"  # of arrays that a dump may hold: numbers and texts
_ASKED = re.compile(r"GLOBAL ([\w.]+)")  # what torch's refusal names
_PER_TOKEN = {"logprob": ("log_probs", "rollout_log_probs"), "entropy": ("entropy",), "advantage": ("advantages",)}


def dump_files(folder: Path, step: int) -> list[Path]:
    """The dumps of a step, those of the rollouts first."""
    return [path for name in _FOLDERS for path in sorted((folder / name).glob(f"*{step}*.pt")) if _step(path) == step]


def dump_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each rollout of a step, with lists for its response tokens. The response is what the loss mask selects.

    Values of the trainer are added to the rollouts by position, else by index. Raises MonitorError for a file that
    cannot be read, or that asks for more than numbers and texts; KeyError, TypeError or ValueError for another form.
    """
    require("reading the dumps of slime and miles", ["torch"], "torch")
    samples: list[Mapping[str, Any]] = []
    trained: list[dict[str, Any]] = []
    for path in paths:
        dump = _load(path)
        if not isinstance(dump, dict):
            raise ValueError(f"a {type(dump).__name__}, expected a dict with samples")
        if "rollout_data" in dump:
            trained += _by_rank(dump["rollout_data"])
        elif "format_version" in dump:
            trained += _with_rewards(dump)
        else:
            samples += dump["samples"]
    if not samples:
        return [_row({}, values) for values in _once(trained)]
    return [_row(sample, values) for sample, values in zip(samples, _joined(samples, trained), strict=True)]


def _step(path: Path) -> int | None:
    found = _NAME.fullmatch(path.stem)
    return None if found is None or "eval" in (found["word"] or "") else int(found["step"])


def _load(path: Path) -> Any:
    import torch

    try:
        with _plain_arrays():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = _ASKED.search(str(error))
        raise MonitorError(
            f"{str(path)!r} is refused, and nothing of it was run: it asks for {asked[1] if asked else 'code'}, "
            "expected numbers, texts, lists, tensors and arrays."
        ) from None
    except Exception as error:  # of a torn or foreign file, as which torch's reader may raise anything
        told = str(error).partition("\n")[0]
        raise MonitorError(f"{str(path)!r} cannot be read as a file of torch: {type(error).__name__}: {told}") from None


def _plain_arrays() -> AbstractContextManager[Any]:
    """torch then accepts numpy's arrays, which hold the experts of a mixture of experts in miles' dumps."""
    from torch.serialization import safe_globals

    make, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    named: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in _DTYPES}]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and since numpy 2
        named += [(make, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    return safe_globals(named)


def _by_rank(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The samples of one rank."""
    n = len(columns["response_lengths"])
    of_samples = {
        name: values
        for name, values in columns.items()
        if isinstance(values, list | tuple) and len(values) == n and name != "raw_reward"  # which is the whole step's
    }
    found = [{name: values[i] for name, values in of_samples.items()} for i in range(n)]
    return [values | {"sample_index": values.get("sample_indices")} for values in found]


def _with_rewards(dump: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The samples of format 2. Its raw rewards are those of the whole step, in the order of the rollouts."""
    found = [dict(values) for values in dump["samples"]]
    rewards = dump.get("raw_reward") or ()
    for values in found:
        position = values.get("rollout_position")
        if position is not None and len(rewards) == len(found):
            values["raw_reward"] = rewards[position]
    return found


def _once(trained: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each sample once: the ranks of a tensor or pipeline parallel group hold the same ones, some without values."""
    found: dict[Any, dict[str, Any]] = {}
    for values in sorted(trained, key=lambda values: "log_probs" not in values):
        index = values.get("sample_index")
        found.setdefault(id(values) if index is None else index, values)
    return list(found.values())


def _joined(samples: Sequence[Mapping[str, Any]], trained: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each sample what the trainer has of it, {} if nothing."""
    by_position = {values["rollout_position"]: values for values in trained if "rollout_position" in values}
    if by_position:
        return [by_position.get(position, {}) for position in range(len(samples))]
    indices = [sample.get("index") for sample in samples]
    if len(set(indices)) < len(indices):  # several samples of one rollout, which their index does not tell apart
        return [{} for _ in samples]
    by_index = {values["sample_index"]: values for values in _once(trained) if values.get("sample_index") is not None}
    return [by_index.get(index, {}) for index in indices]


def _row(sample: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """sample: a Sample as a dict, or {}. trained: the trainer's values of it, or {}."""
    tokens = sample["tokens"] if "tokens" in sample else trained["tokens"]
    n = int(sample["response_length"] if "response_length" in sample else trained["response_lengths"])
    n_prompt = len(tokens) - n
    mask = sample.get("loss_mask") if sample.get("loss_mask") is not None else trained.get("loss_masks")
    inside = np.ones(n, bool) if mask is None else _array(mask, bool)
    if len(inside) != n or n_prompt < 0:
        raise ValueError(f"a sample of {len(tokens)} tokens, {n} of its response, has a loss mask of {len(inside)}")
    values = {name: _values(sample, trained, names, n) for name, names in _PER_TOKEN.items()}
    picked = {name: None if found is None else found[inside] for name, found in values.items()}
    advantages = picked.pop("advantage")
    shared = set() if advantages is None else set(advantages.tolist())
    status, group = sample.get("status"), sample.get("group_index")
    ids = _array(tokens, np.int64)
    if group is None and not sample.get("prompt"):
        group = tuple(ids[:n_prompt].tolist())
    return {
        "group": group,
        "prompt": sample.get("prompt") or None,
        "completion": sample.get("response"),
        "reward": _number(sample.get("reward"), trained.get("raw_reward")),
        "advantage": shared.pop() if len(shared) == 1 else None,
        "n_tokens": int(inside.sum()),
        "truncated": _truncated(status, trained),
        "positions": np.flatnonzero(inside).tolist(),
        "token_id": ids[n_prompt:][inside].tolist(),
    } | {name: None if found is None else found.tolist() for name, found in picked.items()}


def _values(sample: Mapping[str, Any], trained: Mapping[str, Any], names: Sequence[str], n: int) -> np.ndarray | None:
    """The first of the named values that there is of all n response tokens; the trainer's go before the sampler's."""
    for name in names:
        found = trained[name] if trained.get(name) is not None else sample.get(name)
        if found is not None and len(found) == n:  # a part of a context-parallel group is shorter
            return _array(found, np.float64)
    return None


def _array(values: Any, kind: Any) -> np.ndarray:
    """Of a list, an array, or a tensor of any dtype."""
    return np.asarray(values.tolist() if hasattr(values, "tolist") else values, kind)


def _number(*values: Any) -> float | None:
    """The first that is a number; a reward of several parts is none."""
    return next((float(value) for value in values if isinstance(value, int | float)), None)


def _truncated(status: Any, trained: Mapping[str, Any]) -> bool | None:
    if status in (None, "pending"):
        told = trained.get("truncated")
        return None if told is None else bool(told)
    return bool(status == "truncated")
