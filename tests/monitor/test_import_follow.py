"""`rlvr import --follow`: files that are being written, torn, rotated, and an importer that is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_files_formats import wandb_folder, write_events  # noqa: F401  # a fixture
from test_import import names, rows, series, verl_lines

from monitor.errors import MonitorError
from monitor.integrations.files.importing import Importer
from monitor.store.runs import get_run


@contextmanager
def following(source: Path, store: Path, **options: Any) -> Iterator[tuple[Importer, list[str]]]:
    """A live importer of the run "r", and what it says; stopped at the end."""
    said: list[str] = []
    importer = Importer(str(source), str(store), "r", {}, live=True, say=said.append, **options)
    try:
        yield importer, said
    finally:
        importer.close("stopped")


def settle(importer: Importer) -> None:
    """Look until nothing waits: for its rows a step waits one look longer."""
    for _ in range(3):
        importer.look()
    if importer._recorder is not None:
        assert importer._recorder.flush()


def test_rows_are_recorded_as_they_come(tmp_path: Path) -> None:
    path, store = tmp_path / "a.jsonl", tmp_path / "s"
    with following(path, store) as (importer, said):
        assert importer.look() == 0 == importer.look()
        assert said == [f"There is no {path} yet. Waiting for it."] and not store.exists()
        first, second, third = verl_lines(range(1, 4)).splitlines(keepends=True)
        path.write_text(first + second[:9])
        assert importer.look() == 0  # step 1 may not be complete
        assert importer.look() == 1 and get_run(store, "r").status == "running"
        with path.open("a") as file:
            file.write(second[9:] + third)
        assert importer.look() == 1  # step 2; step 3 may not be complete
        with path.open("a") as file:
            file.write('{"step": 3, "kl": 0.25}\n')
        assert importer.look() == 0
        settle(importer)
        assert series(store, "entropy") == {1: 1.0, 2: 1 / 2, 3: 1 / 3} and series(store, "kl") == {3: 0.25}
        with path.open("a") as file:
            file.write('{"step": 3, "eval/heldout/pass@1": 0.5}\n{"step": 2, "eval/heldout/pass@1": 0.75}\n')
        settle(importer)
        assert series(store, "eval/heldout/pass@1") == {3: 0.5}
    assert said[-1] == "1 values came for steps before the last one and are not recorded."
    assert rows(store, "SELECT kind FROM events WHERE kind <> 'verdict' ORDER BY ts") == [
        ("attempt",),
        ("late_values",),
    ]
    assert get_run(store, "r").status == "stopped" and rows(store, "SELECT max(attempt) FROM steps_all") == [(1,)]


def test_a_damaged_line_costs_that_line(tmp_path: Path) -> None:
    path, store = tmp_path / "a.jsonl", tmp_path / "s"
    with following(path, store) as (importer, said):
        path.write_text(verl_lines(range(1, 3)) + '{"step": 3, "da' + verl_lines(range(4, 5)) + "7\n")
        with path.open("ab") as file:
            file.write(b'{"step": 4.5, "actor/entropy": 1}\n\xff\n' + verl_lines(range(5, 6)).encode())
        settle(importer)
    assert series(store, "entropy").keys() == {1, 2, 5}  # a process died in the line of step 3, the next went on in it
    assert [text.split(" line ")[1][:20] for text in said if " line " in text] == [
        "3 is not JSON: Expec", "4 is '7', expected a", "6 is not JSON: Expec", "5: step is 4.5, expe",
    ]  # fmt: skip


def test_a_file_that_is_begun_anew_while_it_is_followed(tmp_path: Path) -> None:
    path, store = tmp_path / "a.jsonl", tmp_path / "s"
    with following(path, store) as (importer, said):
        path.write_text(verl_lines(range(1, 9)))
        settle(importer)
        path.write_text(verl_lines(range(1, 4), scale=2.0))  # verl opens its log with "wb"
        settle(importer)
        assert said == [f"{path} was begun anew: attempt 2 of the run."]
        assert series(store, "entropy") == {step: 2.0 / step for step in (1, 2, 3)}
        path.unlink()
        settle(importer)
        path.write_text(verl_lines(range(1, 20), scale=3.0))  # rotated, and longer than before
        settle(importer)
        with path.open("a") as file:
            file.write(verl_lines(range(11, 13), scale=4.0))  # resumed from step 10, appended
        settle(importer)
    found = series(store, "entropy")
    assert found == {step: (3.0 if step < 11 else 4.0) / step for step in range(1, 13)}
    assert said[1] == f"{path} is gone. Waiting for it to come back."
    attempts = rows(store, "SELECT attempt, count(DISTINCT step) FROM steps_all GROUP BY 1 ORDER BY 1")
    assert attempts == [(1, 8), (2, 3), (3, 19), (4, 2)]


def test_a_csv_that_gets_a_column_is_written_anew_and_goes_on(tmp_path: Path) -> None:
    path, store = tmp_path / "metrics.csv", tmp_path / "s"  # as Lightning's CSVLogger does it
    with following(path, store) as (importer, said):
        path.write_text("step,entropy\n1,0.5\n2,0.4\n3,0.")
        settle(importer)
        assert series(store, "entropy") == {1: 0.5, 2: 0.4}
        path.write_text("step,entropy,kl\n1,0.5,\n2,0.4,\n3,0.3,0.1\n")
        settle(importer)
    assert series(store, "entropy") == {1: 0.5, 2: 0.4, 3: 0.3} and series(store, "kl") == {3: 0.1}
    assert rows(store, "SELECT max(attempt) FROM steps_all") == [(1,)] and not said


def test_a_state_that_is_just_being_written(tmp_path: Path) -> None:
    state = json.loads((Path(__file__).parent / "files" / "trainer_state.json").read_text())
    path, store = tmp_path / "checkpoint-2" / "trainer_state.json", tmp_path / "s"
    with following(tmp_path, store) as (importer, said):
        settle(importer)
        path.parent.mkdir()
        for n in (2, 4):
            text = json.dumps(state | {"log_history": [row for row in state["log_history"] if row["step"] <= n]})
            path.write_text(text[: len(text) // 2])
            settle(importer)
            path.write_text(text)
            settle(importer)
            assert series(store, "entropy").keys() == set(range(1, n + 1))
    assert "is a folder without trainer_state.json, .wandb or event files, so far. Waiting for one." in said[0]
    assert "is not JSON" in said[1] and said[1].endswith("Reading it again when it has changed.")
    assert rows(store, "SELECT max(attempt) FROM steps_all") == [(1,)]


def test_event_files_are_read_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    source = write_events(tmp_path / "written", range(6), 0.5).read_bytes()
    path, store = tmp_path / "live" / "events.out.tfevents.1.host", tmp_path / "s"
    with following(path.parent, store) as (importer, _):
        path.parent.mkdir()
        for end in range(0, len(source) + 1, 37):  # torn at any byte
            path.write_bytes(source[:end])
            importer.look()
        path.write_bytes(source)
        settle(importer)
        assert series(store, "reward") == {step: step / 8 for step in range(6)}
        assert series(store, "entropy") == dict.fromkeys(range(6), 0.5)
        second = write_events(tmp_path / "written2", range(3, 5), 0.25)  # a restart
        second.rename(path.with_name("events.out.tfevents.2.host"))
        settle(importer)
    assert list(series(store, "entropy").values()) == [0.5, 0.5, 0.5, 0.25, 0.25]
    assert rows(store, "SELECT attempt, count(DISTINCT step) FROM steps_all GROUP BY 1 ORDER BY 1") == [(1, 6), (2, 2)]


def test_a_run_of_wandb_is_read_on(wandb_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    (source,) = wandb_folder.glob("*.wandb")
    data, generator = source.read_bytes(), random.Random(0)
    path, store = tmp_path / "run-x.wandb", tmp_path / "s"
    with following(tmp_path, store) as (importer, _):
        for end in sorted([0, 3, 7, *(generator.randrange(len(data)) for _ in range(60)), len(data)]):
            path.write_bytes(data[:end])
            importer.look()
        settle(importer)
    found = series(store, "entropy")
    assert [found[10 * step] for step in range(300)] == [0.5 + step for step in range(300)]
    assert names(store) == {"entropy", "nested.a"} and len(found) == 301
    assert rows(store, "SELECT max(attempt) FROM steps_all") == [(1,)]


def test_several_processes_that_write_one_log(tmp_path: Path) -> None:
    path, store = tmp_path / "metrics.jsonl", tmp_path / "s"  # prime-rl: the orchestrator is ahead of the trainer
    path.touch()
    with following(path, store) as (importer, _):
        for step in range(1, 21):
            rows_now = [{"step": step, "time": 1.7e9 + step, "reward/all/mean": 0.5, "producer": "orchestrator"}]
            if step > 2:
                row = {"step": step - 2, "time": 1.7e9 + step, "entropy/all/mean": 1.0 / step, "producer": "trainer"}
                rows_now.append(row)
            with path.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows_now))
            settle(importer)
        assert acknowledged(store) == 18
    assert series(store, "reward").keys() == set(range(1, 21))
    assert series(store, "entropy") == {step: 1.0 / (step + 2) for step in range(4, 19)}  # once it is known to come
    assert rows(store, "SELECT max(attempt) FROM steps_all") == [(1,)]


def test_a_later_column_does_not_change_what_is_recorded(tmp_path: Path) -> None:
    path, store = tmp_path / "a.jsonl", tmp_path / "s"
    with following(path, store) as (importer, said):
        path.write_text('{"step": 1, "actor/entropy": 0.5}\n')
        settle(importer)
        with path.open("a") as file:
            file.write('{"step": 2, "actor/entropy": 0.4, "entropy": 9, "train/kl": 1, "actor/kl_loss": 2, "x": 3}\n')
        settle(importer)
    assert series(store, "entropy") == {1: 0.5, 2: 0.4}
    assert "kl could be 'train/kl' or 'actor/kl_loss'. Choose one: --map" in said[0]
    assert names(store) == {"entropy", "train/kl", "actor/kl_loss", "x"}


def test_following_a_file_of_no_known_kind_is_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with following(tmp_path / "a.txt", tmp_path / "s") as (importer, _), pytest.raises(MonitorError, match="ends in"):
        importer.look()


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> float:
    """Seconds until the condition holds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "it never came"
        time.sleep(0.02)
    return time.monotonic() - started


def start(source: Path, store: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "monitor.cli", "import", str(source), "--store", str(store), "--run", "r"]
    home = Path(__file__).parents[2]
    return subprocess.Popen(
        [*command, "--follow"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=home,
        env=os.environ | {"PYTHONPATH": str(home)},
    )  # fmt: skip


def acknowledged(store: Path) -> int:
    """The newest durable step."""
    segments = store.glob("runs/r/data/steps/**/a*-s*.parquet")
    return max((int(path.name.split("-")[3]) for path in segments), default=0)


def test_an_importer_that_is_killed_goes_on_without_a_gap_or_a_double(tmp_path: Path) -> None:
    path, store = tmp_path / "a.jsonl", tmp_path / "s"
    lines = verl_lines(range(1, 401)).splitlines(keepends=True)
    path.write_text("")
    for first in (0, 100, 200):
        process = start(path, store)
        for at in range(first, first + 100, 4):
            with path.open("a") as file:  # in pieces that do not end with lines
                text = "".join(lines[at : at + 4])
                for piece in (text[:-5], text[-5:]):
                    file.write(piece)
                    file.flush()
                    time.sleep(0.01)
        until(lambda first=first: acknowledged(store) > first + 20)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert get_run(store, "r").status == "crashed"
    with path.open("a") as file:
        file.write("".join(lines[300:]))
    process = start(path, store)
    until(lambda: acknowledged(store) == 400)
    assert get_run(store, "r").status == "running"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and f", {400}." not in out and " to 400." in out
    assert get_run(store, "r").status == "stopped"
    assert series(store, "entropy") == {step: 1.0 / step for step in range(1, 401)}
    doubles = "SELECT step, name FROM steps_all GROUP BY step, name HAVING count(*) > 1"
    assert rows(store, doubles) == []
    assert rows(store, "SELECT max(attempt) FROM steps_all") == [(4,)]


def test_a_row_is_durable_about_a_second_after_it_was_written(tmp_path: Path) -> None:
    path, store = tmp_path / "a.jsonl", tmp_path / "s"
    process = start(path, store)
    path.write_text(verl_lines(range(1, 3)))
    until(lambda: acknowledged(store) == 2)
    waits = []
    for step in range(3, 9):
        with path.open("a") as file:
            file.write(verl_lines(range(step, step + 1)))
        waits.append(until(lambda step=step: acknowledged(store) == step))  # type: ignore[misc]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    # 0.3 s to see it, 0.3 s for its other rows, 0.2 s between two writes; a busy machine takes longer
    assert sorted(waits)[2] < 4.0, waits
    assert "r: 8 new steps, 1 to 8." in out
