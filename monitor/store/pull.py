"""Pulling: a local folder is kept equal to what the manifests of an object store name.

A segment is fetched beside the run's data, its CRC is checked, and it is renamed into place in the order in which a
recorder writes, steps last. Where a manifest names other segments for the same rows, after a merge, the next generation
is built and swapped in (monitor/store/compact.py). So no reader of the folder sees half a file, or a row twice or not
at all. An object that is damaged or gone is left out and named; what it was to replace stays.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monitor.errors import StoreError
from monitor.store.catalog import ensure_catalog
from monitor.store.compact import GRACE_S, PRUNED, drop_replaced, pruned_rows, swap_generation
from monitor.store.locks import share_data, take_compaction
from monitor.store.manifest import Key, Manifest, manifest_name, manifest_rank
from monitor.store.push import PULLED, TEXTS, each, pulled_attempt
from monitor.store.remote import Remote, RemoteDamaged, RemoteError, RemoteMissing
from monitor.store.reserve import told as told_error
from monitor.store.runs import heartbeat_files, heartbeat_of, is_run_name, later_version, read_json
from monitor.store.schema import TABLES, WRITE_ORDER, SegmentName, run_dir, table_dir
from monitor.store.segments import crc32_of, fsync_folder, list_segments, replace_text, write_seeds

_LANES = 8  # requests at once
_AGAIN_S = 60.0  # a damaged object is fetched again after that time
_QUIET = 0.1  # a run that was quiet for 100 s is looked at each 10 s, and so on
_LONGEST_S = 60.0  # up to this
_STAGED = "incoming.tmp"  # in a run's folder: what was fetched and is not in place yet
Group = tuple[str, int, int]  # table, attempt, rank


@dataclass(slots=True)
class Pulled:
    """What one look did. replaced: runs whose generation was swapped. refused: what was left out, and why."""

    runs: list[str] = field(default_factory=list)
    segments: int = 0
    bytes: int = 0
    replaced: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


class _Moved(Exception):
    """The manifests are others by now: begin the run anew."""


class Puller:
    """Keeps runs of a store equal to those at a URL, as often as `look` is called.

    runs: only these; None for all. The store is made if missing. Raises StoreError for a faulty URL or a folder that
    cannot be written.
    """

    def __init__(
        self, url: str, store: str | Path, *, runs: Collection[str] | None = None, lanes: int = _LANES
    ) -> None:
        self.remote = Remote(url)
        self._store = Path(store).expanduser().absolute()
        self._runs, self._lanes = runs, lanes
        self._damaged: dict[tuple[str, Key], tuple[float, str]] = {}
        self._changed: dict[str, float] = {}  # when a run last had something new, monotonic
        self._looked: dict[str, float] = {}
        try:
            (self._store / "runs").mkdir(parents=True, exist_ok=True)
            write_seeds(self._store)
            ensure_catalog(self._store)
        except OSError as error:
            raise StoreError(f"Cannot write to store {str(self._store)!r}: {error}. Choose another folder.") from error

    def look(self, told: Callable[[int, int], None] | None = None) -> Pulled:
        """Fetch what is new. Raises RemoteError; what was not fetched then is fetched by the next look.

        A run that has had no news for a while is looked at less often, at least once a minute. told: is called with the
        segments that were fetched and those to fetch of a run.
        """
        done = Pulled()
        for run in self._due():
            for last in (False, False, True):
                try:
                    self._pull_run(run, done, told)
                    self._looked[run] = time.monotonic()
                    break
                except _Moved:
                    if last:  # it is merged faster than it is fetched: the next look goes on
                        break
                except BlockingIOError:
                    done.refused.append(f"Run {run!r} is in use by another pull or compaction.")
                    break
                except OSError as error:
                    text = f"Cannot write run {run!r}: {told_error(error)}. Nothing is lost: free some space there."
                    raise StoreError(text) from error
        return done

    def _due(self) -> list[str]:
        now = time.monotonic()
        runs = sorted(filter(is_run_name, self.remote.folder("runs")[1])) if self._runs is None else self._runs
        found = []
        for run in runs:
            quiet = now - self._changed.setdefault(run, now)
            if now - self._looked.get(run, -_LONGEST_S) >= min(_LONGEST_S, _QUIET * quiet):
                found.append(run)
        return found

    def _pull_run(self, run: str, done: Pulled, told: Callable[[int, int], None] | None) -> None:
        folder = run_dir(self._store, run)
        objects, _ = self.remote.folder(f"runs/{run}")
        if self._runs is not None and not objects:
            done.refused.append(f"{self.remote.url} holds no run {run!r}.")
            return
        state = read_json(folder / PULLED) or {}
        if reason := self._why_not(folder, state):
            done.refused.append(f"Run {run!r} is left alone: {reason}")
            return
        seen = state.get("seen") or {}
        marks = {name: _mark(one) for name, one in objects.items() if _is_known(name)}
        news = {name for name, mark in marks.items() if seen.get(name) != mark}
        if not news:
            self.tidy(run, older_than_s=GRACE_S)
            return
        texts, manifests, unseen = self._read(run, marks, news, done)
        if later := later_version(_parsed(texts.get("run.json", b"{}")) or {}):
            done.refused.append(f"Run {run!r} is left alone. {later}")
            return
        self._open_folder(folder, state, manifests, texts)
        with take_compaction(folder):
            unseen |= {manifest_name(rank) for rank in self._apply(run, manifests, done, told)}
            for name, data in texts.items():
                _write_text(folder / name, data)
            state["seen"] = {name: mark for name, mark in marks.items() if name not in unseen}
            _save(folder, state)
        self._changed[run] = time.monotonic()
        done.runs.append(run)

    def tidy(self, run: str, *, older_than_s: float) -> None:
        """Remove the files of a run that were replaced longer ago than that."""
        if len(list(run_dir(self._store, run).glob("data.g*"))) > 1:
            drop_replaced(self._store, run, older_than_s=older_than_s)

    def _read(
        self, run: str, marks: dict[str, str], news: set[str], done: Pulled
    ) -> tuple[dict[str, bytes], dict[int, Manifest], set[str]]:
        """(small files, manifests, names that are to be read again) of what is new.

        A heartbeat is read before the manifest of its rank, so that all rows that it counts are named there.
        """
        texts: dict[str, bytes] = {}
        manifests: dict[int, Manifest] = {}
        unseen: set[str] = set()
        beating = {manifest_name(beat[0]) for name in news if (beat := heartbeat_of(name))}
        for name in sorted(news | beating & marks.keys()):  # heartbeat-* comes before manifest-*
            beat, rank = heartbeat_of(name), manifest_rank(name)
            if beat is not None and manifest_name(beat[0]) not in marks:
                unseen.add(name)
                continue
            try:
                data, _ = self.remote.get(f"runs/{run}/{name}")
                if rank is None:
                    texts[name] = data
                else:
                    manifests[rank] = Manifest.decode(data, f"{self.remote.url}/runs/{run}/{name}", run, rank)
            except RemoteMissing:
                unseen.add(name)
            except RemoteError:
                raise
            except StoreError as error:
                done.refused.append(str(error))
                unseen.add(name)
        return texts, manifests, unseen

    def _why_not(self, folder: Path, state: dict[str, Any]) -> str:
        """Why a run is not pulled; "" if it may be."""
        if not folder.exists():
            return ""
        if not state:
            return "a run of that name is there already, and was not pulled. Pull into another store."
        if state.get("url") != self.remote.url:
            return f"it was pulled from {state.get('url')}. Pull into another store."
        for rank, attempt, _ in heartbeat_files(folder):
            if attempt > pulled_attempt(folder, rank):
                return f"it was resumed here (attempt {attempt}, rank {rank})."
        return ""

    def _open_folder(
        self, folder: Path, state: dict[str, Any], manifests: dict[int, Manifest], texts: dict[str, bytes]
    ) -> None:
        """Note which attempts come from there, in a folder that appears with that note."""
        attempts = state.get("attempts") or {}
        newest = [(rank, manifest.attempt) for rank, manifest in manifests.items()]
        newest += [found for name in texts if (found := heartbeat_of(name)) is not None]
        for rank, attempt in newest:
            attempts[str(rank)] = max(attempt, attempts.get(str(rank), 0))
        state |= {"url": self.remote.url, "attempts": attempts}
        if folder.exists():
            _save(folder, state)
            return
        staged = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(staged, ignore_errors=True)
        for table in TABLES:
            (staged / "data.g0" / table / "g0").mkdir(parents=True)
        (staged / "data").symlink_to("data.g0")
        _save(staged, state)
        os.rename(staged, folder)
        fsync_folder(folder.parent)

    # ---- segments ----------------------------------------------------------------------------------------------

    def _apply(
        self, run: str, manifests: dict[int, Manifest], done: Pulled, told: Callable[[int, int], None] | None
    ) -> set[int]:
        """Make the segments of these ranks those that the manifests name. Returns the ranks that are not whole."""
        folder = run_dir(self._store, run)
        wanted = {key: size for manifest in manifests.values() for key, size in manifest.segments.items()}
        have = {
            (table, path.name)
            for table in TABLES
            for name, path in list_segments(self._store, run, table)
            if name.rank in manifests
        }
        missing, extra = wanted.keys() - have, have - wanted.keys()
        damaged = self._fetch(run, manifests, {key: wanted[key] for key in missing}, told)
        kept, waits = _held(damaged.keys(), extra, missing)
        arrived = sorted(missing - damaged.keys() - waits, key=lambda key: WRITE_ORDER.index(key[0]))
        before = pruned_rows(folder)
        pruned = {_pruned_name(key): rows for key, rows in before.items() if key[2] not in manifests}
        pruned |= {name: rows for manifest in manifests.values() for name, rows in manifest.pruned.items()}
        gone = extra - kept
        if gone or pruned != {_pruned_name(key): rows for key, rows in before.items()}:
            self._replace(run, gone, arrived, pruned)
            done.replaced.append(run)
        else:
            with share_data(folder):
                for table in WRITE_ORDER:
                    into = table_dir(self._store, run, table)
                    names = [name for of, name in arrived if of == table]
                    for name in names:
                        os.rename(folder / _STAGED / table / name, into / name)
                    if names:
                        fsync_folder(into)
        if not waits:
            shutil.rmtree(folder / _STAGED, ignore_errors=True)
        done.segments += len(arrived)
        done.bytes += sum(wanted[key] for key in arrived)
        done.refused += [damaged[key] for key in sorted(damaged)]
        return {SegmentName.parse(name).rank for _, name in damaged}  # type: ignore[union-attr]

    def _fetch(
        self, run: str, manifests: dict[int, Manifest], todo: dict[Key, int], told: Callable[[int, int], None] | None
    ) -> dict[Key, str]:
        """Fetch segments into the staging folder; {those that are damaged: why}. Raises RemoteError and _Moved."""
        staged = run_dir(self._store, run) / _STAGED
        for table in {table for table, _ in todo}:
            (staged / table).mkdir(parents=True, exist_ok=True)
        count = 0
        absent: set[int] = set()

        def fetch(key: Key) -> tuple[Key, str]:
            nonlocal count
            (table, name), parsed = key, SegmentName.parse(key[1])
            assert parsed is not None
            into, path = staged / table / name, f"runs/{run}/{table}/{name}"
            when, reason = self._damaged.get((run, key), (0.0, ""))
            if reason and time.monotonic() - when < _AGAIN_S:
                return key, reason
            self._damaged.pop((run, key), None)
            if not (into.exists() and crc32_of(into) == parsed.crc32):
                for again in (True, False):
                    try:
                        self.remote.fetch(path, todo[key], parsed.crc32, into)
                        break
                    except RemoteMissing:
                        absent.add(parsed.rank)
                        reason = f"{self.remote.url}/{path} is not there, but its manifest names it."
                        break
                    except RemoteDamaged as error:
                        reason = f"{error} It is left out."
                        if again:  # the connection may be at fault
                            reason = ""
            if reason:
                self._damaged[run, key] = time.monotonic(), reason
            count += 1
            if told is not None:
                told(count, len(todo))
            return key, reason

        found = each(fetch, sorted(todo), self._lanes)
        for rank in absent:  # deleted in the meantime, if the manifest is another by now
            name = manifest_name(rank)
            data, _ = self.remote.get(f"runs/{run}/{name}")
            if Manifest.decode(data, f"{self.remote.url}/runs/{run}/{name}", run, rank) != manifests[rank]:
                for key in [key for key in self._damaged if key[0] == run]:
                    del self._damaged[key]
                raise _Moved
        return {key: reason for key, reason in found if reason}

    def _replace(self, run: str, gone: set[Key], arrived: list[Key], pruned: dict[str, int]) -> None:
        folder = run_dir(self._store, run)

        def fill(building: Path, inner: str) -> None:
            for table in TABLES:
                (building / table / inner).mkdir(parents=True)
                for of, name in arrived:
                    if of == table:
                        os.link(folder / _STAGED / table / name, building / table / inner / name)
                fsync_folder(building / table / inner)
                fsync_folder(building / table)
            if pruned:
                replace_text(building / PRUNED, json.dumps(pruned), sync=True)
            fsync_folder(building)

        by_table = {table: {name for of, name in gone if of == table} for table in TABLES}
        swap_generation(self._store, run, by_table, fill)


def _held(damaged: Collection[Key], extra: set[Key], missing: set[Key]) -> tuple[set[Key], set[Key]]:
    """(segments that stay because what replaces them is damaged, those that wait because these hold their rows)."""
    kept: set[Key] = set()
    waits: set[Key] = set()
    for group in {_group(key) for key in damaged}:
        old = {key for key in extra if _group(key) == group}
        if old:
            kept |= old
            spans = [SegmentName.parse(name) for _, name in old]
            first, last = min(one.first_step for one in spans if one), max(one.last_step for one in spans if one)
            for key in missing:
                name = SegmentName.parse(key[1])
                if name and _group(key) == group and name.first_step <= last and name.last_step >= first:
                    waits.add(key)
    return kept, waits


def _group(key: Key) -> Group:
    name = SegmentName.parse(key[1])
    assert name is not None
    return key[0], name.attempt, name.rank


def _pruned_name(key: Group) -> str:
    return f"a{key[1]:03d}-r{key[2]:03d}"


def _is_known(name: str) -> bool:
    return name in TEXTS or manifest_rank(name) is not None or heartbeat_of(name) is not None


def _mark(found: dict[str, Any]) -> str:
    """What tells one version of an object from another."""
    return f"{found.get('e_tag')} {found['last_modified'].isoformat()} {found['size']}"


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _write_text(path: Path, data: bytes) -> None:
    """A small file as it is there. A heartbeat also says that its writer is not on this machine."""
    content = _parsed(data)
    if content is not None and heartbeat_of(path.name) is not None:
        content["pulled"] = True
    replace_text(path, data.decode("utf-8", "replace") if content is None else json.dumps(content))


def _save(folder: Path, state: dict[str, Any]) -> None:
    replace_text(folder / PULLED, json.dumps(state))
