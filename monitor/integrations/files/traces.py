"""Traces of prime-rl's file monitor: every episode in one stream, and what was learnt of it later in others.

    stream/00000.jsonl, .zst            episodes, each with its traces; a chunk that is full is compressed
    stream.index.jsonl                  a line for each episode: its traces' ids, and where it lies
    annotations/PRODUCER/00000.jsonl    updates of traces: which step's batch took them, and values of tokens
    annotations/PRODUCER.index.jsonl    a line for each update: the trace's id, facts, and where it lies

A step's rollouts are the traces that its batch took. Streams may be files as well, stream.jsonl, without chunks. Only
the indices are read as a whole, and each line of them once.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from monitor.errors import MonitorError

_QUIET_S = 1.0  # a step that no update has joined for as long is complete
_INDEX = ".index.jsonl"
# why verifiers stops a rollout before its end
_STOPS = ("max_turns", "max_input_tokens", "max_output_tokens", "max_total_tokens", "compaction_failed")
_VALUES = {"logprob": "trainer_logprobs", "entropy": "entropies", "advantage": "advantages"}


@dataclass(frozen=True, order=True, slots=True)
class _Place:
    """Where a line lies: byte `offset` of chunk `chunk` of a stream; chunk -1: the stream is a file."""

    chunk: int
    offset: int


@dataclass(slots=True)
class _Stream:
    """A stream and how far its index was read."""

    path: Path  # the folder of its chunks
    read: int = 0  # bytes of the index
    places: dict[str, list[_Place]] = field(default_factory=dict)  # of each trace


class Traces:
    """The traces in `folder`, step by step, while they are written or afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._episodes = _Stream(folder / "stream")
        self._updates: dict[str, _Stream] = {}
        self._steps: dict[int, list[str]] = {}  # the ids of the traces that a step's batch took
        self._taken: set[str] = set()  # producers that say so
        self._grown = 0.0  # when a step last got a trace

    @property
    def exist(self) -> bool:
        return self.folder.joinpath(f"stream{_INDEX}").is_file()

    def is_complete(self, step: int) -> bool:
        """Whether the step's batch is known, and what the trainer has computed of it, if it tells that at all."""
        self._look()
        if step not in self._steps or self.waits_for_training(step):
            return False
        return step < max(self._steps) or time.time() - self._grown >= _QUIET_S

    def waits_for_training(self, step: int) -> bool:
        """Whether a step's batch is known, and the trainer, who told of other batches, has not told of this one."""
        ids = self._steps.get(step, [])
        trainers = [stream for name, stream in self._updates.items() if name not in self._taken and stream.places]
        return bool(ids) and any(not any(id in trainer.places for id in ids) for trainer in trainers)

    def rows(self, step: int) -> list[dict[str, Any]]:
        """A row for each branch of the step's traces that trains the policy, lists for the tokens that it sampled.

        Raises MonitorError for lines that cannot be read, KeyError, TypeError or ValueError for another form.
        """
        self._look()
        ids = dict.fromkeys(self._steps.get(step, []))
        updates: dict[str, list[Mapping[str, Any]]] = {}
        for stream in self._updates.values():
            for update in _records(stream, ids):
                updates.setdefault(update["trace_id"], []).append(update)
        return [
            row
            for episode in _records(self._episodes, ids)
            for trace in episode["traces"]
            if trace["id"] in ids
            for row in _branches(trace, updates.get(trace["id"], []), (episode.get("group") or {}).get("id"))
        ]

    def _look(self) -> None:
        """Read what is new of the indices."""
        for row in _new_lines(self._episodes):
            for id in row["trace_ids"]:
                self._episodes.places[id] = [_place(row)]
        for index in sorted(self.folder.glob(f"annotations/*{_INDEX}")):
            name = index.name.removesuffix(_INDEX)
            stream = self._updates.setdefault(name, _Stream(index.with_name(name)))
            for row in _new_lines(stream):
                stream.places.setdefault(row["trace_id"], []).append(_place(row))
                step = ((row.get("info") or {}).get("ship") or {}).get("step")
                if step is not None:
                    self._taken.add(name)
                    self._take(int(step), row["trace_id"])

    def _take(self, step: int, id: str) -> None:
        if self._steps and step < next(reversed(self._steps)):  # a training that went on from a checkpoint
            self._steps = {other: ids for other, ids in self._steps.items() if other < step}
        self._steps.setdefault(step, []).append(id)
        self._grown = time.time()


def _new_lines(stream: _Stream) -> Iterator[dict[str, Any]]:
    """The whole lines of a stream's index that were not read yet."""
    path = stream.path.with_name(stream.path.name + _INDEX)
    with path.open("rb") as file:
        file.seek(stream.read)
        for line in file:
            if not line.endswith(b"\n"):  # it is being written
                return
            stream.read += len(line)
            yield _parsed(line, path)


def _place(row: Mapping[str, Any]) -> _Place:
    chunk = row.get("chunk")
    return _Place(-1 if chunk is None else int(chunk), int(row["offset"]))


def _records(stream: _Stream, ids: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The lines of a stream that are about these traces, each once, in the order they were written."""
    places = sorted({place for id in ids for place in stream.places.get(id, [])})
    for chunk in dict.fromkeys(place.chunk for place in places):
        path, opened = _opened(stream.path, chunk)
        with opened as file:
            at = 0
            for place in places:
                if place.chunk == chunk:
                    at = _skipped_to(file, at, place.offset)
                    line = file.readline()
                    at += len(line)
                    yield _parsed(line, path)


def _opened(stream: Path, chunk: int) -> tuple[Path, AbstractContextManager[IO[bytes]]]:
    path = stream.with_name(f"{stream.name}.jsonl") if chunk < 0 else stream / f"{chunk:05d}.jsonl"
    try:
        return path, path.open("rb")
    except FileNotFoundError:
        import pyarrow as pa

        packed = path.with_name(f"{path.name}.zst")
        try:
            return packed, io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(packed)), "zstd"))
        except (OSError, pa.ArrowInvalid) as error:
            raise MonitorError(f"{str(path)!r} is not there, and {str(packed)!r} cannot be read: {error}.") from None


def _skipped_to(file: IO[bytes], at: int, offset: int) -> int:
    """Read on from `at` to `offset`, as a compressed file has no other way to get there."""
    while at < offset:
        found = len(file.read(min(offset - at, 1 << 22)))
        if not found:
            break
        at += found
    return at


def _parsed(line: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise MonitorError(f"{str(path)!r} has a line that is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise MonitorError(f"{str(path)!r} has a line that is no object, but a {type(found).__name__}.")
    return found


def _branches(trace: Mapping[str, Any], updates: Sequence[Mapping[str, Any]], group: Any) -> list[dict[str, Any]]:
    """Rows of a trace's branches: paths from a root of its messages to a leaf, of which each is a sequence to train."""
    if (trace.get("agent") or {}).get("trainable") is False:
        return []
    nodes: Sequence[Mapping[str, Any]] = trace["nodes"]
    parents = {node.get("parent") for node in nodes}
    info = dict(trace.get("info") or {})
    streams: dict[int, dict[str, Any]] = {}
    for update in updates:
        info |= update.get("info") or {}
        for branch in update.get("branches") or []:
            streams.setdefault(branch["index"], {}).update(branch)
    rows = []
    for index, leaf in enumerate(at for at in range(len(nodes)) if at not in parents):
        path: list[Mapping[str, Any]] = []
        at: int | None = leaf
        while at is not None:
            path.insert(0, nodes[at])
            parent = nodes[at].get("parent")
            if parent is not None and not 0 <= parent < at:
                raise ValueError(f"message {at} follows message {parent}")
            at = parent
        row = _row(path, streams.get(index, {}))
        if row["n_tokens"]:
            advantage = info.get("advantage")
            rows.append(
                row
                | {"group": group or row["group"], "reward": _reward(trace), "truncated": _is_truncated(trace)}
                | ({} if advantage is None else {"advantage": float(advantage)})
            )
    return rows


def _row(path: Sequence[Mapping[str, Any]], streams: Mapping[str, Any]) -> dict[str, Any]:
    ids = [token for node in path for token in node["token_ids"]]
    mask = [bool(inside) for node in path for inside in node["mask"]]
    if len(mask) != len(ids):
        raise ValueError(f"a branch has {len(ids)} tokens and a mask of {len(mask)}")
    at = [i for i, inside in enumerate(mask) if inside]
    first = at[0] if at else len(ids)
    sampled = [value for node in path for value in node.get("logprobs") or []]
    values: dict[str, Any] = {"logprob": sampled if len(sampled) == len(at) else None}
    for name, stream in _VALUES.items():
        found = streams.get(stream) or []
        if len(found) == len(ids) and all(found[i] is not None for i in at):
            values[name] = [float(found[i]) for i in at]
    credits = set(values.pop("advantage", []))
    begins = next((i for i, node in enumerate(path) if node.get("sampled") or any(node["mask"])), len(path))
    return {
        "group": tuple(ids[:first]),
        "prompt": _text([node.get("message") for node in path[:begins]]),
        "completion": _text([node.get("message") for node in path[begins:]]),
        "advantage": credits.pop() if len(credits) == 1 else None,
        "n_tokens": len(at),
        "positions": [i - first for i in at],
        "token_id": [ids[i] for i in at],
    } | values


def _text(messages: Sequence[Any]) -> Any:
    """The text of a single message that has nothing else, or the messages themselves."""
    if not messages or None in messages:
        return None
    only = messages[0]
    plain = len(messages) == 1 and not any(value for name, value in only.items() if name not in ("role", "content"))
    return only["content"] if plain and isinstance(only.get("content"), str) else list(messages)


def _reward(trace: Mapping[str, Any]) -> float | None:
    """The weighted sum of its scores, None without any."""
    scores = [reward for reward in (trace.get("rewards") or {}).values() if reward is not None]
    if not scores:
        return None
    return float(sum(one["score"] * (1.0 if one.get("weight") is None else one["weight"]) for one in scores))


def _is_truncated(trace: Mapping[str, Any]) -> bool:
    """Whether a limit stopped it, or the last call that succeeded ran out of tokens."""
    last: Mapping[str, Any] = next(
        (call for call in reversed(trace.get("calls") or []) if call.get("error") is None), {}
    )
    return trace.get("stop_condition") in _STOPS or last.get("finish_reason") == "length"
