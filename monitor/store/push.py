"""Pushing: what is durable in a store is copied to an object store, segments first, then the manifest that names them.

The local folder stays the truth. Nothing in it is changed, and whatever fails is done again at the next look. An object
that no manifest names any more is deleted after `GRACE_S`: until then a reader with the manifest before can fetch it.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from monitor.errors import StoreError
from monitor.store.compact import pruned_rows
from monitor.store.manifest import Key, Manifest, manifest_name, succeed
from monitor.store.remote import Remote, RemoteChanged, RemoteError, RemoteMissing
from monitor.store.runs import heartbeat_files, later_version, read_heartbeat, read_info, read_json, run_names
from monitor.store.schema import TABLES, WRITE_ORDER, SegmentName, run_dir
from monitor.store.segments import crc32_of, list_segments

GRACE_S = 600.0  # how long replaced objects stay for readers that have the manifest before
LONGEST_S = 30.0  # between two looks while the object store does not answer
PULLED = "pulled.json"  # in the folder of a run that was pulled: where from, and how far
TEXTS = ("run.json", "alerts.json")  # beside the heartbeats
_BEAT_S = 5.0  # the shortest time between two heartbeats of a rank that has nothing new to tell
_SETTLED_S = 3.0  # a run whose files are that old has had its last heartbeat, whatever grain their times have
_REFUSED_S = 60.0  # how long a rank that was refused is left alone
_LANES = 8  # requests at once


@dataclass(slots=True)
class Pushed:
    """What one look did. refused: what was left out, and why, in the order in which it was met."""

    runs: list[str] = field(default_factory=list)
    segments: int = 0
    bytes: int = 0
    refused: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Rank:
    """What the object store holds of one rank. version: of its manifest, None if there is none."""

    manifest: Manifest
    version: dict[str, Any] | None
    refused: str = ""
    refused_at: float = 0.0
    beat_at: float = 0.0


@dataclass(frozen=True, slots=True)
class _Beat:
    """A heartbeat file. writer: the process that records this attempt."""

    name: str
    attempt: int
    writer: str
    status: str
    data: bytes


class Pusher:
    """Copies runs of a store to a URL, as often as `look` is called.

    runs, ranks: only these; None for all that were recorded into this folder. lanes: requests at once, 1 to use no
    threads, as a recorder that closes while the interpreter ends. Raises StoreError for a faulty URL.
    """

    def __init__(
        self,
        store: Path,
        url: str,
        *,
        runs: Collection[str] | None = None,
        ranks: Collection[int] | None = None,
        grace_s: float = GRACE_S,
        lanes: int = _LANES,
    ) -> None:
        self.remote = Remote(url)
        self._store, self._runs, self._chosen = store, runs, ranks
        self._grace_s, self._lanes = grace_s, lanes
        self._ranks: dict[tuple[str, int], _Rank] = {}
        self._texts: dict[str, int] = {}  # CRC of the small files as they were last put, by path
        self._damaged: dict[Path, str] = {}
        self._seen: dict[str, list[int]] = {}

    def look(self, told: Callable[[int, int], None] | None = None) -> Pushed:
        """Copy what is new. Raises RemoteError; what was not copied then is copied by the next look.

        told: is called with the segments that were copied and those to copy of a run.
        """
        done = Pushed()
        for run in run_names(self._store) if self._runs is None else self._runs:
            marks = self._marks(run)
            if self._is_quiet(run, marks):
                continue
            refused = len(done.refused)
            for last in (False, False, True):
                try:
                    self._push_run(run, done, told)
                    break
                except FileNotFoundError:  # merged away while it was read
                    if last:
                        done.refused.append(f"Run {run!r} changes too fast to be read: push it again.")
                except RemoteChanged:  # by another push of this folder, or by another recorder: read it again
                    if last:
                        raise
            if len(done.refused) == refused:
                self._seen[run] = marks
        return done

    def _marks(self, run: str) -> list[int]:
        """Times of a run's folder and heartbeats, one of which changes with everything that is recorded."""
        folder = run_dir(self._store, run)
        paths = [folder, *(path for *_, path in heartbeat_files(folder))]
        return [path.stat().st_mtime_ns for path in paths if path.exists()]

    def _is_quiet(self, run: str, marks: list[int]) -> bool:
        """Whether nothing has changed in a run since it was last copied whole, and no object is to be deleted."""
        settled = time.time() - max(marks, default=0) / 1e9 > _SETTLED_S
        waits = any(of == run and state.manifest.dropped for (of, _), state in self._ranks.items())
        return settled and not waits and self._seen.get(run) == marks

    def _push_run(self, run: str, done: Pushed, told: Callable[[int, int], None] | None) -> None:
        folder = run_dir(self._store, run)
        if later := later_version(read_info(folder / "run.json") or {}):
            done.refused.append(f"Run {run!r} is left alone. {later}")
            return
        beats, texts = _beats(folder), _texts(folder)  # before the segments: what heartbeats count is there then
        found = _segments(self._store, run)
        moved = False
        for rank in sorted(beats.keys() | found.keys()):
            writers = dict.fromkeys((SegmentName.parse(name).attempt for _, name in found.get(rank, {})), "")  # type: ignore[union-attr]
            writers |= {beat.attempt: beat.writer for beat in beats.get(rank, [])}
            chosen = self._chosen is None or rank in self._chosen
            if not chosen or max(writers, default=0) <= pulled_attempt(folder, rank):  # it came from elsewhere
                continue
            state = self._state(run, rank, writers)
            if state.refused:
                done.refused.append(state.refused)
                continue
            new = self._push_rank(state, writers, found.get(rank, {}), _pruned(folder, rank), done, told)
            moved |= new
            self._put_texts(run, state, beats.get(rank, []), texts if rank == 0 else {}, new)
        if moved:
            done.runs.append(run)

    def _state(self, run: str, rank: int, writers: dict[int, str]) -> _Rank:
        """What is there of a rank, `refused` if it is another recorder's. Raises RemoteError."""
        known = self._ranks.get((run, rank))
        if known is not None and (not known.refused or time.monotonic() - known.refused_at < _REFUSED_S):
            return known
        path = f"runs/{run}/{manifest_name(rank)}"
        state = _Rank(Manifest(run, rank), None)
        try:
            data, state.version = self.remote.get(path)
        except RemoteMissing:
            data = None
        if data is not None:
            try:
                state.manifest = Manifest.decode(data, f"{self.remote.url}/{path}", run, rank)
                self._require_own(state.manifest, writers)
                state.manifest = replace(state.manifest, dropped=state.manifest.dropped | self._strays(state.manifest))
            except RemoteError:
                raise
            except StoreError as error:
                state.refused, state.refused_at = str(error), time.monotonic()
        self._ranks[run, rank] = state
        return state

    def _require_own(self, there: Manifest, writers: dict[int, str]) -> None:
        """Every attempt that the object store holds must be one of this folder. Raises StoreError."""
        for attempt, writer in there.writers.items():
            if attempt not in writers or (writers[attempt] and writer and writers[attempt] != writer):
                raise StoreError(
                    f"Run {there.run!r}, rank {there.rank}: {self.remote.url} holds one of that name with an attempt "
                    f"{attempt} that was recorded elsewhere (host, process, start: {writer}). Give another URL."
                )

    def _strays(self, manifest: Manifest) -> dict[Key, float]:
        """Objects of a rank that a push, killed before its manifest, has left: {which: now}. Raises RemoteError."""
        there = [(table, name) for table in TABLES for name in self.remote.folder(f"runs/{manifest.run}/{table}")[0]]
        named = manifest.segments.keys() | manifest.dropped.keys()
        own = [key for key in there if (name := SegmentName.parse(key[1])) and name.rank == manifest.rank]
        return {key: time.time() for key in own if key not in named}

    def _push_rank(
        self,
        state: _Rank,
        writers: dict[int, str],
        found: dict[Key, Path],
        pruned: dict[str, int],
        done: Pushed,
        told: Callable[[int, int], None] | None,
    ) -> bool:
        """Put a rank's new segments and then the manifest that names them. True if there was something new."""
        before = state.manifest
        whole = {key: path.stat().st_size for key, path in found.items() if path not in self._damaged}
        segments, gone = succeed(before.segments, whole, pruned)
        new = [key for key in segments if key not in before.segments]
        refused = set(self._put_segments(before.run, {key: found[key] for key in new}, told))
        if refused:  # what they would replace stays
            done.refused += [self._damaged[found[key]] for key in sorted(refused)]
            segments, gone = succeed(before.segments, {k: n for k, n in whole.items() if k not in refused}, pruned)
        now = time.time()
        writers = {attempt: writer or before.writers.get(attempt, "") for attempt, writer in writers.items()}
        dropped = {key: ts for key, ts in before.dropped.items() if key not in segments} | dict.fromkeys(gone, now)
        due = [key for key, ts in dropped.items() if now - ts > self._grace_s]
        self.remote.delete([f"runs/{before.run}/{table}/{name}" for table, name in due])
        dropped = {key: ts for key, ts in dropped.items() if key not in due}
        manifest = Manifest(before.run, before.rank, writers, segments, pruned, dropped)
        if state.version is not None and manifest == before:
            return False
        self._commit(state, manifest)
        added = [key for key in new if key not in refused]
        done.segments += len(added)
        done.bytes += sum(segments[key] for key in added if key in segments)
        return True

    def _put_segments(self, run: str, todo: dict[Key, Path], told: Callable[[int, int], None] | None) -> list[Key]:
        """Put segments; those that are damaged here are returned. Raises RemoteError and FileNotFoundError."""
        count = 0

        def put(item: tuple[Key, Path]) -> Key | None:
            nonlocal count
            (table, name), path = item
            crc = crc32_of(path)
            if crc != SegmentName.parse(name).crc32:  # type: ignore[union-attr]
                reason = f"{path} is damaged, and not pushed: its bytes have CRC-32 {crc:08x}. See `rlvr store check`."
                self._damaged[path] = reason
                return table, name
            self.remote.put(f"runs/{run}/{table}/{name}", path)
            count += 1
            if told is not None:
                told(count, len(todo))
            return None

        items = sorted(todo.items(), key=lambda item: WRITE_ORDER.index(item[0][0]))
        return [key for key in each(put, items, self._lanes) if key is not None]

    def _commit(self, state: _Rank, manifest: Manifest) -> None:
        """Put a manifest in the place of the one that is known. Raises RemoteError if another has come between."""
        path, data = f"runs/{manifest.run}/{manifest_name(manifest.rank)}", manifest.encode()
        try:
            version = self.remote.put(path, data, replaces=state.version or "create")
        except RemoteChanged:
            there, version = self.remote.get(path)
            if there != data:  # else it was put, and only the answer was lost
                del self._ranks[manifest.run, manifest.rank]  # it is read again by the next look
                raise
        state.manifest, state.version = manifest, version

    def _put_texts(self, run: str, state: _Rank, beats: list[_Beat], texts: dict[str, bytes], new: bool) -> None:
        """Put small files that changed; the heartbeat of a rank that goes on without news only now and then."""
        for name, data in texts.items():
            self._put_text(f"runs/{run}/{name}", data)
        rested = time.monotonic() - state.beat_at >= _BEAT_S
        for beat in beats:
            due = new or rested or beat.status != "running"
            if due and self._put_text(f"runs/{run}/{beat.name}", beat.data):
                state.beat_at = time.monotonic()

    def _put_text(self, path: str, data: bytes) -> bool:
        crc = zlib.crc32(data)
        if self._texts.get(path) == crc:
            return False
        self.remote.put(path, data)
        self._texts[path] = crc
        return True


def pulled_attempt(folder: Path, rank: int) -> int:
    """The newest attempt of a rank that was pulled into a run's folder, 0 for none."""
    attempts = (read_json(folder / PULLED) or {}).get("attempts")
    found = attempts.get(str(rank)) if isinstance(attempts, dict) else None
    return found if isinstance(found, int) else 0


def pause_s(every_s: float, failed: int) -> float:
    """Seconds to the next look: longer, up to `LONGEST_S`, the more looks have failed one after the other."""
    return max(every_s, min(LONGEST_S, every_s * 2.0 ** min(failed, 16))) if failed else every_s


def each(work: Callable[[Any], Any], items: list[Any], lanes: int) -> list[Any]:
    """The outcomes of `work` for each item, `lanes` at once. After an error none is begun, and it is raised."""
    if lanes == 1 or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(lanes) as pool:
        try:
            return list(pool.map(work, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _segments(store: Path, run: str) -> dict[int, dict[Key, Path]]:
    """{rank: {(table, name): path}}. `steps` is listed first: all else of the steps listed there is on disk then."""
    found: dict[int, dict[Key, Path]] = {}
    for table in reversed(WRITE_ORDER):
        for name, path in list_segments(store, run, table):
            found.setdefault(name.rank, {})[table, path.name] = path
    return found


def _beats(folder: Path) -> dict[int, list[_Beat]]:
    """The heartbeats that can be read, by rank. A writer is told by its host, process and start."""
    found: dict[int, list[_Beat]] = {}
    for rank, _, path in heartbeat_files(folder):
        beat = read_heartbeat(path)
        if beat is not None:
            writer = f"{beat.get('host')} {beat.get('pid')} {beat.get('started')}"
            data = json.dumps(beat).encode()
            found.setdefault(rank, []).append(_Beat(path.name, beat["attempt"], writer, str(beat.get("status")), data))
    return found


def _texts(folder: Path) -> dict[str, bytes]:
    """The other small files of a run that readers need, by name."""
    found = {name: read_json(folder / name) for name in TEXTS}
    return {name: json.dumps(content).encode() for name, content in found.items() if content is not None}


def _pruned(folder: Path, rank: int) -> dict[str, int]:
    return {f"a{attempt:03d}-r{of:03d}": rows for (_, attempt, of), rows in pruned_rows(folder).items() if of == rank}
