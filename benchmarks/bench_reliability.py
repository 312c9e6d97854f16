"""The long form of the store's tests: many kills, flipped bits, writers beside readers and compaction, full disks.

Every probe counts what it checked, and as a fault whatever breaks a promise of docs/store.md. Writers are real, forked
processes. Disks that fill are real too (tmpfs), and left out where mounting is not allowed.

    nice python benchmarks/bench_reliability.py [--kills 150] [--flips 400] [--seconds 60]
        [--out benchmarks/results/reliability.csv]        then: python -m docs.make_reliability
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
from harness import RESULTS, write_rows

sys.path.append(str(Path(__file__).parent.parent / "tests" / "monitor"))
from store_data import N_SAMPLES, N_TOKENS, record_run, samples, step_record, tokens

from monitor.errors import StoreError
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store import background, compact
from monitor.store.check import check_store
from monitor.store.compact import compact_run
from monitor.store.reader import open_store
from monitor.store.runs import get_run, list_runs
from monitor.store.schema import TABLES
from monitor.store.segments import list_segments

PER_STEP = {"steps": 5, "tokens": N_TOKENS, "samples": N_SAMPLES, "histograms": 2}  # rows of a step in each table
Row = dict[str, object]


def row(probe: str, setting: str, rounds: int, checked: int, of: str, faults: int, began: float) -> Row:
    made = {"probe": probe, "setting": setting, "rounds": rounds, "checked": checked, "of": of, "faults": faults}
    made["seconds"] = round(time.monotonic() - began, 1)
    print(made, flush=True)
    return made


@contextmanager
def child(work: Callable[[int], object]) -> Iterator[tuple[int, int]]:
    """(pid, pipe to read from) of a forked process that calls work(pipe to write to); killed at the end."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        code = 1
        try:
            work(into)
            code = 0
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(into)
    try:
        yield pid, out
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(out)


def words(pipe: int) -> list[str]:
    """All that came through a pipe until its writer ended."""
    parts = []
    while part := os.read(pipe, 1 << 16):
        parts.append(part)
    return b"".join(parts).decode().split()


def record_forever(store: Path, run: str, resume: bool, first: int, pause_s: float, pipe: int) -> None:
    """Record complete steps and tell each acknowledged one."""
    recorder = Recorder(store, RunInfo(run), resume=resume, flush_s=0.0)
    told = None
    for step in range(first, 1_000_000):
        recorder.record(step_record(step), tokens(step), samples(step))
        until = time.monotonic() + pause_s
        while True:
            if recorder.acknowledged != told:
                told = recorder.acknowledged
                os.write(pipe, f"{told} ".encode())
            if time.monotonic() >= until:
                break
            time.sleep(0.001)


def kills(folder: Path, rate: float, n: int) -> Row:
    """SIGKILL at random moments. Every second writer resumes the run of the writer before it."""
    began, rng, last = time.monotonic(), random.Random(1), dict[str, int]()
    store, run, merged = folder / f"kills-{rate:g}", "", 0
    for number in range(n):
        resume = number % 2 == 1 and bool(last.get(run))
        run = run if resume else f"r{number:04d}"
        first = last.get(run, 0) + 1

        def work(pipe: int, run: str = run, resume: bool = resume, first: int = first) -> None:
            record_forever(store, run, resume, first, 1 / rate, pipe)

        with child(work) as (pid, pipe):
            told = os.read(pipe, 64)  # it has begun for sure
            time.sleep(rng.uniform(0, 5 / rate + 0.3))
            os.kill(pid, signal.SIGKILL)
            seen = [*told.decode().split(), *words(pipe)]
        last[run] = max(map(int, seen))
        merged += (store / "runs" / run / "data").readlink().name != "data.g0"
    lost = 0
    with open_store(store) as opened:
        for table, rows in PER_STEP.items():
            found = opened.sql(f"SELECT run, step, count(*) FROM {table} GROUP BY run, step").rows
            whole = {(run, step) for run, step, count in found if count == rows}
            lost += sum((run, step) not in whole for run, end in last.items() for step in range(1, end + 1))
            lost += sum(count != rows for _, _, count in found)  # what is shown is whole, acknowledged or not
    lost += sum(finding.damage for finding in check_store(store))
    lost += sum(state.status != "crashed" for state in list_runs(store))
    setting = f"{rate:g} steps a second, {merged} of them after or during merging"
    return row("SIGKILL", setting, n, sum(last.values()), "acknowledged steps, in four tables", lost, began)


def resumes(folder: Path, n: int) -> Row:
    """Six processes resume one run at the same moment: one may, and no attempt is shared."""
    began, store, faults = time.monotonic(), folder / "resumes", 0
    record_run(store, steps=range(1, 2))
    for _ in range(n):
        moment = time.time() + 0.15

        def work(pipe: int, moment: float = moment) -> None:
            while time.time() < moment:
                time.sleep(0.0005)
            try:
                recorder = Recorder(store, RunInfo("a"), resume=True)
            except StoreError:
                os.write(pipe, b"refused")
                return
            os.write(pipe, b"opened")
            time.sleep(0.4)
            recorder.close()

        pids, pipes = [], []
        for _ in range(6):
            out, into = os.pipe()
            if (pid := os.fork()) == 0:
                work(into)
                os._exit(0)
            os.close(into)
            pids.append(pid)
            pipes.append(out)
        said = [words(pipe) for pipe in pipes]
        for pid, pipe in zip(pids, pipes, strict=True):
            os.waitpid(pid, 0)
            os.close(pipe)
        faults += sorted(said) != [["opened"], *[["refused"]] * 5]
    marks = [mark["attempt"] for mark in get_run(store, "a").info["attempts"]]
    faults += marks != list(range(1, n + 2))
    return row("six resumes at once", "", n, 6 * n, "resumes", faults, began)


def crowd(folder: Path, seconds: float) -> list[Row]:
    """Four writers that merge as they go, two readers, two plain DuckDB clients, and compaction of what has ended."""
    began, store, until = time.monotonic(), folder / "crowd", time.monotonic() + seconds
    record_run(store, "first", range(1, 3))

    def write(writer: int) -> Callable[[int], None]:
        def work(pipe: int) -> None:
            number = 0
            while time.monotonic() < until:
                with Recorder(store, RunInfo(f"w{writer}-{number:03d}"), flush_s=0.0) as recorder:
                    for step in range(1, 41):
                        recorder.record(step_record(step), tokens(step), samples(step))
                        time.sleep(0.02)
                os.write(pipe, f"{recorder.acknowledged} ".encode())
                number += 1

        return work

    def read(pipe: int, native: bool = False) -> None:
        seen = dict[str, int]()
        asked = wrong = 0
        with open_store(store) as opened:
            con = duckdb.connect(str(store / "store.duckdb"), read_only=True)
            while time.monotonic() < until:
                query = (
                    "SELECT run, step, count(*), "
                    "(SELECT count(*) FROM steps s WHERE (s.run, s.step) = (t.run, t.step)) "
                    "FROM tokens t GROUP BY run, step"
                )
                try:
                    found = con.execute(query).fetchall() if native else opened.sql(query).rows
                except Exception as error:
                    print(f"reader: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    wrong += 1
                    continue
                wrong += any(n_tokens != N_TOKENS or n_steps != 5 for _, _, n_tokens, n_steps in found)
                counted = dict[str, int]()
                for run, *_ in found:
                    counted[run] = counted.get(run, 0) + 1
                wrong += any(counted.get(run, 0) < before for run, before in seen.items())  # nothing goes away
                seen, asked = counted, asked + 1
        os.write(pipe, f"{asked} {wrong}".encode())

    compactions = refused = 0
    with (
        child(write(0)) as a, child(write(1)) as b, child(write(2)) as c, child(write(3)) as d,
        child(read) as x, child(read) as y,
        child(lambda pipe: read(pipe, native=True)) as z,
    ):  # fmt: skip
        done = set[str]()
        while time.monotonic() < until:
            for state in list_runs(store):
                if state.status == "finished" and state.name not in done:
                    try:
                        compact_run(store, state.name)
                        compactions += 1
                    except StoreError:
                        refused += 1  # its writer had written its last word and still held the lock
                        continue
                    done.add(state.name)
            time.sleep(0.1)
        written = [int(step) for _, pipe in (a, b, c, d) for step in words(pipe)]
        answers = [[int(word) for word in words(pipe)] for _, pipe in (x, y, z)]
        swaps = sum(int(os.readlink(link).removeprefix("data.g")) for link in store.glob("runs/w*/data"))
    setting = f"4 writers of 40 steps a second, {swaps} swaps, {compactions} compactions after the end"
    with open_store(store) as opened:
        found = opened.sql("SELECT run, count(DISTINCT step) FROM steps WHERE run != 'first' GROUP BY run").rows
    faults = sum(step != 40 for step in written) + sum(steps != 40 for _, steps in found)
    faults += len(found) != len(written)
    faults += sum(finding.damage for finding in check_store(store))
    faults += sum(len(answer) != 2 for answer in answers)
    *ours, native = answers
    wrong = sum(answer[1] for answer in ours)
    return [
        row("writers beside readers", setting, len(written), sum(written), "steps, in the end", faults, began),
        row("readers beside writers", setting, 2, sum(answer[0] for answer in ours), "answers", wrong, began),
        row("a plain DuckDB client beside writers", setting, 1, native[0], "answers", native[1], began),
    ]


def flips(folder: Path, n: int) -> Row:
    """One bit of one segment flipped: check names the file, and the rest stays readable and right."""
    began, rng, store, faults = time.monotonic(), random.Random(2), folder / "flips", 0
    record_run(store, "a", range(1, 9))
    record_run(store, "b", range(1, 9))
    paths = [path for table in TABLES for _, path in list_segments(store, "a", table)]
    for _ in range(n):
        path = rng.choice(paths)
        content = path.read_bytes()
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            damaged = [finding.path for finding in check_store(store) if finding.damage]
            with open_store(store) as opened:
                right = opened.sql("SELECT count(*) FROM tokens WHERE run = 'b'").rows == [(8 * N_TOKENS,)]
                right &= opened.sql("SELECT count(*) FROM steps WHERE run = 'b'").rows == [(8 * 5,)]
                right &= opened.sql("SELECT count(*) FROM histograms WHERE run = 'b'").rows == [(8 * 2,)]
            faults += damaged != [str(path)] or not right
        except Exception as error:
            print(f"flip in {path.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            faults += 1
        for other in path.parent.glob(f"{path.name}*"):  # also where a reader has set it aside
            other.unlink()
        path.write_bytes(content)
    return row("a flipped bit", "in any table of one of two runs", n, n, "flips", faults, began)


def full_disks(folder: Path, n: int) -> list[Row]:
    """A disk of 8 MB fills at a random step and stays full: no step scalar is lost, and every gap is reported."""
    began, rng, steps, faults = time.monotonic(), random.Random(3), 400, 0
    disk = folder / "disk"
    disk.mkdir()
    for _ in range(n):
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            print("full disks: mounting a tmpfs is not allowed here, left out")
            return []
        try:
            fills = rng.randrange(1, steps // 2)
            with Recorder(disk / "store", RunInfo("a"), flush_s=0.0) as recorder:
                for step in range(1, steps + 1):
                    recorder.record(step_record(step), tokens(step), samples(step))
                    if step >= fills:  # and takes whatever becomes free again
                        with open(disk / "ballast", "ab", buffering=0) as ballast:
                            _fill(ballast.fileno())
                    time.sleep(0.002)
            with open_store(disk / "store") as opened:
                found = opened.sql("SELECT count(DISTINCT step) FROM steps WHERE name = 'reward'").rows[0][0]
            state = get_run(disk / "store", "a")
            faults += steps - found - state.lost_steps
            faults += state.lost_steps
            faults += sum(finding.damage for finding in check_store(disk / "store"))
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
    return [row("a disk that stays full", "8 MB, a reserve of 1 MB", n, n * steps, "steps", faults, began)]


def _fill(fd: int) -> None:
    try:
        while True:
            os.write(fd, b"x" * 4096)
    except OSError:
        return


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=150, help="kills at each rate")
    parser.add_argument("--resumes", type=int, default=30, help="rounds of six resumes at once")
    parser.add_argument("--flips", type=int, default=400, help="flipped bits")
    parser.add_argument("--disks", type=int, default=10, help="disks that fill")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for writers beside readers")
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability.csv")
    args = parser.parse_args()
    logging.getLogger("rlvr.monitor").setLevel(logging.CRITICAL)  # refusals are the point here
    compact.TOGETHER = background.TOGETHER = 3  # instead of 64, so that there is merging all the time
    background._PAUSE_S = 0.1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [resumes(folder, args.resumes)]  # forks come before this process has threads of its own
        rows += [kills(folder, rate, args.kills) for rate in (5, 100)]
        rows += crowd(folder, args.seconds)
        rows += [flips(folder, args.flips), *full_disks(folder, args.disks)]
    write_rows(args.out, rows, packages=("duckdb", "numpy", "pyarrow"))
    if any(made["faults"] for made in rows):
        raise SystemExit("There were faults.")


if __name__ == "__main__":
    main()
