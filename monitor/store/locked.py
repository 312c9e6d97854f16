"""A locked store: queries of untrusted text run in a process of their own.

DuckDB's own limits do not always hold: while it folds constants, `range(1000000000)` takes 20 GB and minutes, whatever
`memory_limit` and `max_execution_time` say. So the system limits the process's memory and time. Where the kernel has
Landlock (Linux 5.13 and later), it also forbids the process to write any file. Inside the process the text must pass
`require_select`, DuckDB may read only the store's files, and its configuration is locked.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa

from monitor.errors import StoreError
from monitor.store.listing import Unreadable
from monitor.store.select_only import require_select
from monitor.store.session import Session

_SPARE_BYTES = 256 << 20  # what Python, Arrow and the allocators hold beside DuckDB's own memory
_SPARE_S = 1  # DuckDB mostly ends a query at the limit itself; the system ends the process this much later
_HEADER = struct.Struct("<QQ")  # bytes of the JSON and of the Arrow stream that follow


@dataclass(frozen=True, slots=True)
class Limits:
    """What one query may use."""

    seconds: int = 10
    memory_mb: int = 1000
    rows: int = 100_000


class LockedSession:
    """Sends queries to the locked process. Starts it with the first query, and again after it had to be ended."""

    def __init__(self, root: Path, limits: Limits) -> None:
        self.root, self.limits = root, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._unreadable: list[Unreadable] = []
        self._lock = threading.Lock()

    def run(self, query: str, params: Sequence[Any]) -> pa.Table:
        """The rows of a query. Raises duckdb.Error or StoreError."""
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                _send(process.stdin, pickle.dumps((str(query), list(params))), b"")
                said, rows = _receive(process.stdout)
            except (EOFError, BrokenPipeError):
                raise StoreError(self._why_it_ended()) from None
            except BaseException:  # on Ctrl-C too, or its late answer would be taken for the next query's
                self._end()
                raise
            answer = json.loads(said)
            if answer.get("broken"):  # the next query starts another
                self._end()
        self._unreadable = [Unreadable(run, Path(path), reason) for run, path, reason in answer["unreadable"]]
        if "error" in answer:
            kind = getattr(duckdb, str(answer["kind"]), None)
            raise (kind if isinstance(kind, type) and issubclass(kind, duckdb.Error) else StoreError)(answer["error"])
        return pa.ipc.open_stream(rows).read_all()

    def unreadable(self) -> list[Unreadable]:
        """What the queries so far had to leave out."""
        return self._unreadable

    def close(self) -> None:
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        code = "from monitor.store.locked import serve; serve()"
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        limits = (self.limits.seconds, self.limits.memory_mb, self.limits.rows)
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                code,
                str(self.root),
                *map(str, limits),
            ],  # -P: nothing of the working folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C reaches only the parent, which ends it
        )
        return self._process

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return process.wait()

    def _why_it_ended(self) -> str:
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its pipes, so it is about to end by itself
            process.wait(1.0)
        code = self._end() or 0
        if code == -signal.SIGALRM:
            return _too_slow(self.limits)
        if code < 0:  # it was killed, or it aborted when memory was refused
            return _too_big(self.limits)
        return f"The process that answers for a locked store ended by itself (exit code {code}). Ask again."


def serve() -> None:
    """Main function of the locked process: answers the queries on stdin until it is closed."""
    root, limits = Path(sys.argv[1]), Limits(*map(int, sys.argv[2:5]))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    with contextlib.suppress(OSError, AttributeError):
        _forbid_writes()  # before DuckDB starts threads of its own, which inherit it
    session = Session(root)
    _lock_up(session.con, root, limits)
    while True:
        try:
            query, params = pickle.loads(_receive(requests)[0])
        except EOFError:
            return
        signal.alarm(limits.seconds + _SPARE_S)  # ends this process, whatever it is doing
        rows, answer = b"", dict[str, object]()
        try:
            require_select(session.con, query)
            rows = session.run(query, params, lambda relation: _limited(relation, limits)) or b""
        except duckdb.InterruptException:
            answer = {"kind": "StoreError", "error": _too_slow(limits)}
        except (duckdb.OutOfMemoryException, MemoryError):
            answer = {"kind": "StoreError", "error": _too_big(limits)}
        except (duckdb.InternalException, duckdb.FatalException):  # from now on this DuckDB refuses every query
            answer = {"kind": "StoreError", "error": _broken(limits), "broken": True}
        except (duckdb.Error, StoreError, pa.ArrowException, RuntimeError) as error:
            answer = {"kind": type(error).__name__, "error": str(error)}
        signal.alarm(0)
        left_out = [(one.run, str(one.path), one.reason) for one in session.unreadable()]
        _send(answers, json.dumps(answer | {"unreadable": left_out}).encode(), rows)


def _lock_up(con: duckdb.DuckDBPyConnection, root: Path, limits: Limits) -> None:
    for setting in (
        f"memory_limit = '{limits.memory_mb}MB'",
        f"max_execution_time = {1000 * limits.seconds}",
        "temp_directory = ''",  # nothing spills to a disk
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
        "allow_persistent_secrets = false",
    ):
        con.execute(f"SET {setting}")
    con.execute("SET allowed_directories = [?]", [str(root / "runs")])
    con.execute("SET enable_external_access = false")
    con.execute("SET lock_configuration = true")
    held = _private_bytes()
    allowed = held + (limits.memory_mb << 20) + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA if held else resource.RLIMIT_AS, (allowed, allowed))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _private_bytes() -> int:
    """What RLIMIT_DATA counts of this process; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
    except (OSError, StopIteration):
        return 0


def _forbid_writes() -> None:
    """Give up, by Landlock, the right to write, make, rename or remove files and to connect. Raises OSError."""
    if sys.platform != "linux":
        return
    create_ruleset, restrict_self, no_new_privileges = 444, 446, 38
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(create_ruleset, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise OSError(ctypes.get_errno(), "Landlock is not available.")
    writes = 1 << 1 | sum(1 << right for right in range(4, 13))  # write a file; remove and make anything
    writes |= (version >= 2) << 13 | (version >= 3) << 14  # move between folders; truncate
    rights = struct.pack("<QQ", writes, 3 if version >= 4 else 0)  # and no TCP
    ruleset = libc.syscall(create_ruleset, rights, ctypes.c_size_t(16 if version >= 4 else 8), 0)
    if ruleset < 0 or libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.syscall(restrict_self, ruleset, 0):
        raise OSError(ctypes.get_errno(), "Landlock refused.")
    os.close(ruleset)


def _limited(relation: duckdb.DuckDBPyRelation, limits: Limits) -> bytes:
    """The rows of a query as an Arrow stream."""
    sink = pa.BufferOutputStream()
    reader = relation.to_arrow_reader(10_000)
    n_rows = 0
    with pa.ipc.new_stream(sink, reader.schema) as stream:
        for batch in reader:
            n_rows += batch.num_rows
            if n_rows > limits.rows:
                raise StoreError(
                    f"The query has more than {limits.rows:,} rows, which is the most a locked store gives. "
                    "Add a LIMIT or aggregate."
                )
            stream.write_batch(batch)
            if sink.tell() > limits.memory_mb << 20:
                raise StoreError(_too_big(limits))
    return sink.getvalue().to_pybytes()


def _too_slow(limits: Limits) -> str:
    return (
        f"The query took longer than {limits.seconds} s, which is the most a locked store gives. "
        "Ask for fewer runs or steps."
    )


def _too_big(limits: Limits) -> str:
    return (
        f"The query needs more than {limits.memory_mb} MB of memory, which is the most a locked store gives. "
        "Ask for fewer runs or steps."
    )


def _broken(limits: Limits) -> str:
    return (
        f"DuckDB fails on this query, as on some that need more than {limits.memory_mb} MB of memory, which is "
        "the most a locked store gives. Ask for fewer runs or steps."
    )


def _send(pipe: BinaryIO | Any, head: bytes, body: bytes) -> None:
    pipe.write(_HEADER.pack(len(head), len(body)) + head)
    pipe.write(body)
    pipe.flush()


def _receive(pipe: BinaryIO | Any) -> tuple[bytes, bytes]:
    header = pipe.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise EOFError
    lengths = _HEADER.unpack(header)
    head, body = (pipe.read(length) for length in lengths)
    if (len(head), len(body)) != lengths:
        raise EOFError
    return head, body
