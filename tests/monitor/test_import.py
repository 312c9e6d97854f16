"""`rlvr import`, once: files of other trainers become runs of the store, and importing again adds what is new."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_files_formats import wandb_folder, write_events  # noqa: F401  # a fixture

from monitor.alerts.replay import fired, replay
from monitor.commands.imports import main
from monitor.integrations.files.columns import Values
from monitor.integrations.files.history import MOST_RESTARTS, History, Step, Stored, already_held
from monitor.integrations.files.series import read_series
from monitor.queries.alerts import to_alert
from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord
from monitor.store.reader import open_store
from monitor.store.runs import get_run


def import_(source: Path | str, store: Path, *options: str, run: str = "r", expect: int = 0) -> None:
    assert main([str(source), "--store", str(store), "--run", run, *options]) == expect


def rows(store: Path, query: str, *values: Any) -> list[Any]:
    with open_store(store) as opened:
        return opened.sql(query, list(values)).rows


def series(store: Path, name: str, run: str = "r") -> dict[int, float]:
    """{step: value} of the run's line of history."""
    return dict(rows(store, "SELECT step, value FROM steps WHERE run = ? AND name = ? ORDER BY step", run, name))


def names(store: Path) -> set[str]:
    return {name for (name,) in rows(store, "SELECT DISTINCT name FROM steps")} - {"perf/queue"}


def tree(folder: Path) -> dict[str, str]:
    """{file: hash} of all that lies below."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def verl_lines(steps: range, scale: float = 1.0) -> str:
    """As verl's FileLogger.log writes them."""
    data = [
        (step, {"actor/entropy": scale / step, "critic/score/mean": 0.1 * step, "timing_s/gen": 2.5, "epoch": "x"})
        for step in steps
    ]
    return "".join(json.dumps({"step": step, "data": row}) + "\n" for step, row in data)


def test_the_trainer_may_be_named_and_the_run_is_called_as_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, store = tmp_path / "my log.jsonl", tmp_path / "s"
    lines = ({"step": step, "actor/entropy": 1.0 / step, "train/entropy_loss": 9.0} for step in (1, 2))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["verl", str(path), "--store", str(store)]) == 0
    assert series(store, "entropy", run="my-log") == {1: 1.0, 2: 0.5}
    assert series(store, "train/entropy_loss", run="my-log") == {1: 9.0, 2: 9.0}  # verl has no such name
    assert main(["verl", str(path), "--store", str(store)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"my-log: nothing new; it holds all 2 steps of {path}."

    assert main(["slime", str(path), "--store", str(store), "--run", "as-slime"]) == 0
    assert series(store, "entropy", run="as-slime") == {1: 9.0, 2: 9.0}
    assert series(store, "actor/entropy", run="as-slime") == {1: 1.0, 2: 0.5}

    assert main(["verll", str(path), "--store", str(store)]) == 2
    expected = "'verll' is no known trainer. Did you mean 'verl'? Expected one of trl, verl, prime-rl, openrlhf,"
    assert f"{expected} slime, miles, or none." in capsys.readouterr().err
    assert main(["verl", str(path), "more", "--store", str(store)]) == 2
    assert "expected a file or folder, or a trainer and one" in capsys.readouterr().err


def test_a_log_of_verl_becomes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "verl.jsonl"
    path.write_text(verl_lines(range(1, 41)))
    import_(path, tmp_path / "s")
    assert series(tmp_path / "s", "entropy") == {step: 1.0 / step for step in range(1, 41)}
    assert series(tmp_path / "s", "reward") == {step: 0.1 * step for step in range(1, 41)}
    assert series(tmp_path / "s", "timing_s/gen") == dict.fromkeys(range(1, 41), 2.5)  # unknown: by its own name
    assert names(tmp_path / "s") == {"entropy", "reward", "timing_s/gen"}
    ((status, info),) = rows(tmp_path / "s", "SELECT status, environment FROM runs")
    assert status == "finished"
    assert json.loads(info)["source"] == {
        "path": str(path),
        "mapping": {"step": "step", "reward": "critic/score/mean", "entropy": "actor/entropy"},
    }
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "r: 40 new steps, 1 to 40."
    assert err.splitlines() == [
        "rlvr import: uses step, reward <- critic/score/mean, entropy <- actor/entropy",
        "rlvr import: does not know, and records under their own names, timing_s/gen",
        "rlvr import: leaves out, without a number or a free name, epoch",
    ]


def test_importing_again_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "verl.jsonl"
    path.write_text(verl_lines(range(1, 31)))
    import_(path, tmp_path / "s")
    before = tree(tmp_path / "s")
    capsys.readouterr()
    import_(path, tmp_path / "s")
    assert capsys.readouterr().out == f"r: nothing new; it holds all 30 steps of {path}.\n"
    assert tree(tmp_path / "s") == before


def test_a_grown_file_adds_its_new_steps(tmp_path: Path) -> None:
    path = tmp_path / "verl.jsonl"
    for last in (10, 25, 25, 26):
        path.write_text(verl_lines(range(1, last + 1)))
        import_(path, tmp_path / "s")
    assert series(tmp_path / "s", "entropy") == {step: 1.0 / step for step in range(1, 27)}
    spans = rows(tmp_path / "s", "SELECT attempt, min(step), max(step) FROM steps_all GROUP BY 1 ORDER BY 1")
    assert spans == [(1, 1, 10), (2, 11, 25), (3, 26, 26)]  # a step is written once; each writer is an attempt


@pytest.mark.parametrize("last", [4, 10, 40])
def test_a_file_that_was_begun_anew_is_a_new_attempt(tmp_path: Path, last: int) -> None:
    path = tmp_path / "verl.jsonl"
    path.write_text(verl_lines(range(1, 21)))
    import_(path, tmp_path / "s")
    path.write_text(verl_lines(range(1, last + 1), scale=2.0))  # also as long as before, and longer
    for _ in range(2):
        import_(path, tmp_path / "s")
        assert series(tmp_path / "s", "entropy") == {step: 2.0 / step for step in range(1, last + 1)}
        spans = rows(tmp_path / "s", "SELECT attempt, count(DISTINCT step) FROM steps_all GROUP BY 1 ORDER BY 1")
        assert spans == [(1, 20), (2, last)]
    path.write_text(verl_lines(range(1, last + 3), scale=2.0))  # and it goes on
    import_(path, tmp_path / "s")
    assert rows(tmp_path / "s", "SELECT attempt, count(DISTINCT step) FROM steps_all GROUP BY 1 ORDER BY 1") == [
        (1, 20), (2, last), (3, 2),
    ]  # fmt: skip


def test_a_log_that_goes_back_is_a_new_attempt_from_there(tmp_path: Path) -> None:
    path = tmp_path / "verl.jsonl"  # resumed from a checkpoint of step 5, and appended
    path.write_text(verl_lines(range(1, 9)) + verl_lines(range(6, 8), scale=3.0))
    for _ in range(2):
        import_(path, tmp_path / "s")
        assert rows(tmp_path / "s", "SELECT attempt, step FROM steps WHERE name = 'entropy' ORDER BY step") == [
            *((1, step) for step in range(1, 6)), (2, 6), (2, 7),
        ]  # fmt: skip
    assert series(tmp_path / "s", "entropy")[6] == 0.5
    assert rows(tmp_path / "s", "SELECT max(attempt) FROM steps_all") == [(2,)]


def test_evaluations_that_come_apart_join_their_step(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"step": 1, "entropy": 0.5}, {"step": 2, "entropy": 0.4}, {"step": 1, "eval/heldout/pass@1": 0.25}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    import_(path, tmp_path / "s")
    path.write_text(path.read_text() + json.dumps({"step": 2, "eval/heldout/pass@1": 0.75}) + "\n")
    for _ in range(2):  # of the last step: it is recorded again, as a whole
        import_(path, tmp_path / "s")
        assert series(tmp_path / "s", "eval/heldout/pass@1") == {1: 0.25, 2: 0.75}
        assert series(tmp_path / "s", "entropy") == {1: 0.5, 2: 0.4}
    assert rows(tmp_path / "s", "SELECT max(attempt) FROM steps_all") == [(2,)]


def collapse(path: Path, steps: range) -> None:
    """Entropy that falls from 1 to 0.05 of it after step 30, and reward with it; wall times of a day in 2023."""
    lines = []
    for step in steps:
        level = 1.0 if step <= 30 else max(0.05, 1.0 - 0.1 * (step - 30))
        row = {"step": step, "entropy": level + 0.01 * (step % 3), "reward": 0.5 * level, "_timestamp": 1.7e9 + step}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))


def test_alerts_are_those_of_a_replay_at_the_sources_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    collapse(path, range(1, 61))
    expected = replay(read_series(str(path)).columns)
    assert "entropy_collapse" in {alert["rule"] for alert in fired(expected)}
    import_(path, tmp_path / "s")
    assert "CRITICAL r: entropy_collapse at step" in capsys.readouterr().out
    for step in (20, 33, 36, 60):  # in pieces, each by an importer of its own
        collapse(path, range(1, step + 1))
        import_(path, tmp_path / "pieces")
    for store in ("s", "pieces"):
        with open_store(tmp_path / store) as opened:
            query = "SELECT * FROM alerts ORDER BY step, rule"
            found = opened.sql(query)
            columns = found.frame().keys()
            recorded = [to_alert(dict(zip(columns, row, strict=True))) for row in found.rows]
            assert sorted(recorded, key=repr) == sorted(expected, key=repr)
            assert opened.sql("SELECT DISTINCT ts - step FROM alerts").rows == [(1.7e9,)]
            assert opened.sql("SELECT DISTINCT ts - step FROM steps").rows == [(1.7e9,)]


def test_csv_with_a_map_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("it,H,entropy,note,n\n3,0.5,9,x,1\n1,0.25,9,y,\n2,nan,9,z,inf\n")
    import_(tmp_path / "a.csv", tmp_path / "s", "--map", "step=it,entropy=H")
    # it goes back once and then on: attempt 2 from step 1, so of step 3 nothing is left. `n` has no finite value there.
    found = series(tmp_path / "s", "entropy")
    assert found.keys() == {1, 2} and found[1] == 0.25 and (found[2] is None or math.isnan(found[2]))
    assert names(tmp_path / "s") == {"entropy"}  # the column `entropy` would pass for the key that H has
    table = pa.table({"step": [1, 2], "reward": [0.5, None], "tags": [["a"], ["b"]], "tokens_seen": [10, 20]})
    pq.write_table(table, tmp_path / "a.parquet")
    import_(tmp_path / "a.parquet", tmp_path / "s", run="p")
    assert series(tmp_path / "s", "reward", "p") == {1: 0.5}
    assert series(tmp_path / "s", "tokens_seen", "p") == {1: 10.0, 2: 20.0}


def test_a_source_without_times_tells_no_pace(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(verl_lines(range(1, 31)))
    import_(path, tmp_path / "s")
    assert rows(tmp_path / "s", "SELECT count(DISTINCT ts) FROM steps") == [(1,)]  # of the import
    (beat,) = get_run(tmp_path / "s", "r").heartbeats
    assert beat.get("median_step_s") is None


def test_checkpoints_of_trl(tmp_path: Path) -> None:
    """files/trainer_state.json is TRL's own; the checkpoint that follows it holds its history and more."""
    state = json.loads((Path(__file__).parent / "files" / "trainer_state.json").read_text())
    history = state["log_history"]
    for n in (2, 4):
        kept = [row for row in history if row["step"] <= n]
        folder = tmp_path / "out" / f"checkpoint-{n}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps(state | {"log_history": kept}))
        for _ in range(2):
            import_(tmp_path / "out", tmp_path / "s")
    assert series(tmp_path / "s", "entropy") == {row["step"]: row["entropy"] for row in history if "entropy" in row}
    assert series(tmp_path / "s", "lr") == {row["step"]: row["learning_rate"] for row in history if "entropy" in row}
    own = series(tmp_path / "s", "rewards/rew/mean")
    assert own == {row["step"]: row["rewards/rew/mean"] for row in history if "rewards/rew/mean" in row}
    spans = rows(tmp_path / "s", "SELECT attempt, min(step), max(step) FROM steps_all GROUP BY 1 ORDER BY 1")
    assert spans == [(1, 1, 2), (2, 3, 4)]


def test_event_files_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    path = write_events(tmp_path / "a", range(4), 0.5)
    import_(tmp_path / "a", tmp_path / "s")
    assert series(tmp_path / "s", "reward") == {0: 0.0, 1: 0.125, 2: 0.25, 3: 0.375}
    assert rows(tmp_path / "s", "SELECT DISTINCT ts FROM steps") == [(1.0,)]  # the wall time that write_events gives
    second = write_events(tmp_path / "a", range(2, 6), 0.25)  # a restart
    second.rename(second.with_name(path.name.replace("tfevents.", "tfevents.9")))
    for _ in range(2):
        import_(tmp_path / "a", tmp_path / "s")
        assert list(series(tmp_path / "s", "entropy").values()) == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
        assert rows(tmp_path / "s", "SELECT max(attempt) FROM steps_all") == [(2,)]


def test_a_run_of_wandb(wandb_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    import_(wandb_folder, tmp_path / "s")
    found = series(tmp_path / "s", "entropy")
    assert [found[10 * step] for step in range(300)] == [0.5 + step for step in range(300)]
    assert names(tmp_path / "s") == {"entropy", "nested.a"}  # `bad` is inf throughout
    ((low, high),) = rows(tmp_path / "s", "SELECT min(ts), max(ts) FROM steps")
    made = next(wandb_folder.glob("*.wandb")).stat().st_mtime
    assert made - 300 < low <= high <= made + 1  # of wandb's own clock
    ((config, seed),) = rows(tmp_path / "s", "SELECT config, seed FROM runs")
    assert json.loads(config) == {"seed": 7, "beta": 0.04, "model": {"name": "tiny"}} and seed == 7
    before = tree(tmp_path / "s")
    import_(wandb_folder, tmp_path / "s")
    assert tree(tmp_path / "s") == before


def test_runs_that_are_no_import_of_the_source_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Recorder(tmp_path / "s", RunInfo("own")) as recorder:
        recorder.record(StepRecord(1, {"entropy": 1.0}))
    path = tmp_path / "a.jsonl"
    path.write_text(verl_lines(range(1, 5)))
    import_(path, tmp_path / "s")
    before = tree(tmp_path / "s")
    import_(path, tmp_path / "s", run="own", expect=2)
    assert "was not imported but recorded by its trainer. Choose another --run." in capsys.readouterr().err
    other = tmp_path / "b.jsonl"
    other.write_text(verl_lines(range(1, 5), scale=5.0))
    import_(other, tmp_path / "s", expect=2)
    assert f"was imported from {str(path)!r}, and {str(other)!r} does not go on from there" in capsys.readouterr().err
    assert tree(tmp_path / "s") == before
    shutil.move(path, tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_text(verl_lines(range(1, 7)))  # moved and grown: it does go on
    import_(tmp_path / "c.jsonl", tmp_path / "s")
    assert series(tmp_path / "s", "entropy").keys() == set(range(1, 7))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '{"step": 1, "entropy": 0.5}\n{"step"\n{"step": 2}\n', "line 2 is not JSON"),
        ("a.jsonl", '{"epoch": 1, "entropy": 0.5}\n', "has no column of the step"),
        ("a.csv", "step,entropy\n1.5,2\n", "step is '1.5', expected an integer"),
        ("a.csv", "step,entropy\n1,high\n", "entropy is 'high', expected a number"),
        ("a.csv", "step,entropy,train/entropy\n", ""),
        ("a.txt", "", "ends in '.txt', expected one of"),
        ("gone.csv", None, "No file "),
    ],
)
def test_what_cannot_be_imported_leaves_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, expected: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    import_(tmp_path / name, tmp_path / "s", expect=2 if expected else 0)
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def values(step: int, others: dict[str, float] | None = None, **known: float) -> Values:
    return Values(step, known, others or {})


def told(steps: list[Step]) -> list[tuple[int, int, dict[str, float], bool]]:
    return [(step.attempt, step.step, step.scalars, step.late) for step in steps]


def test_history_knows_late_values_from_restarts() -> None:
    history = History()
    history.add_all(
        [
            values(1, entropy=1.0),
            values(3, entropy=0.9),
            values(3, entropy=0.9, reward=0.5),  # the same again, and more
            values(2, kl=0.1),  # late: its series does not go back
            values(3, {"note": 1.0}),
            values(2, entropy=0.8),  # this one does
        ]
    )
    assert told(history.take()) == [
        (0, 1, {"entropy": 1.0}, False),
        (0, 2, {"kl": 0.1}, True),
        (0, 3, {"entropy": 0.9, "reward": 0.5, "note": 1.0}, False),
        (1, 2, {"entropy": 0.8}, False),
    ]
    history.add(values(2, {"note": 2.0}))  # of the step that was handed over: once more, as a whole
    assert told(history.take()) == [(1, 2, {"entropy": 0.8, "note": 2.0}, False)]
    history.add(values(3, entropy=0.7))
    assert told(history.take()) == [(1, 3, {"entropy": 0.7}, False)]
    history.add(values(2, kl=0.2))
    assert history.take() == [] and history.too_late == 1


def test_the_last_step_waits_for_its_other_rows() -> None:
    history = History()
    history.add(values(1, entropy=1.0))
    assert history.take_ready(idle=False) == []
    history.add(values(1, reward=0.5))
    history.add(values(2, entropy=0.5))
    assert told(history.take_ready(idle=False)) == [(0, 1, {"entropy": 1.0, "reward": 0.5}, False)]
    assert told(history.take_ready(idle=True)) == [(0, 2, {"entropy": 0.5}, False)]


def test_a_step_waits_for_series_that_lag_behind() -> None:
    history, taken = History(), []
    for step in range(1, 31):
        history.add(values(step, reward=1.0))
        if 1 < step <= 20:  # another process is a step behind, and dies after its step 19
            history.add(values(step - 1, entropy=2.0))
        if step % 5 == 0:
            history.add(values(step, kl=0.1))  # not in every step: nothing waits for it
        taken += history.take_ready(idle=True)
        if step == 20:
            assert [one.step for one in taken] == list(range(1, 20))
    assert all(one.scalars.get("entropy") == 2.0 for one in taken[2:19])
    assert [one.step for one in taken] == list(range(1, 31))  # once 8 steps were without it
    assert history.too_late == 2  # of steps 1 and 2, when nobody knew that it comes


def test_a_table_without_order_is_sorted() -> None:
    history = History()
    history.add_all(values(step, entropy=float(step)) for step in range(100, 0, -1))
    assert [step.step for step in history.waiting] == list(range(1, 101))
    history.add(values(101, entropy=1.0))
    assert {step.attempt for step in history.take()} == {MOST_RESTARTS}


def stored(attempt: int, *steps: tuple[int, float]) -> list[Stored]:
    return [Stored(attempt, step, {"entropy": value, "perf/queue": 0.0}) for step, value in steps]


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (stored(1, (1, 0.1), (2, 0.2)), 2),
        (stored(1, (1, 0.1)) + stored(2, (2, 0.2), (3, 0.3)), 3),
        (stored(1, (1, 0.1), (2, 0.2)) + stored(2, (2, 0.2), (3, 0.3)), 3),  # step 2 recorded again as a whole
        (stored(1, (1, 0.7), (9, 0.9)) + stored(2, (1, 0.1)), 1),  # the newest attempt alone is this source
        (stored(1, (1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)), 3),  # the source was cut: all of it is held
        (stored(1, (1, 0.1), (2, 0.5)), None),
        (stored(1, (1, 0.1), (3, 0.3)), None),  # the source has a step between them
    ],
)
def test_what_a_run_holds_of_a_source(held: list[Stored], expected: int | None) -> None:
    steps = [Step(step, 0, {"entropy": step / 10}) for step in (1, 2, 3)]
    assert already_held(steps, held) == expected
