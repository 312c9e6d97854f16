"""What other trainers and trackers leave on disk, made by their own writers where they are installed."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path

import pytest

from monitor.errors import MissingPackageError, MonitorError
from monitor.integrations.files.series import read_series
from monitor.integrations.files.wandb import WandbReader


def test_verls_file_log(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"  # as FileLogger.log writes it
    rows = [{"step": step, "data": {"actor/entropy": 1 / step, "training/global_step": step}} for step in (1, 2, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    series = read_series(str(path))
    assert series.columns == {"step": [1, 2, 4], "entropy": [1.0, 0.5, 0.25]}
    assert series.mapping == {"step": "step", "entropy": "actor/entropy"} and series.unmapped == ()


def test_an_export_of_wandb(tmp_path: Path) -> None:
    path = tmp_path / "export.csv"
    head = ["Step", *(f"run - 1 - {name}" for name in ("_step", "train/entropy"))]
    columns = [head[0], *(f"{name}{end}" for name in head[1:] for end in ("", "__MIN", "__MAX"))]
    path.write_text(",".join(f'"{name}"' for name in columns) + "\n" + "0,0,0,0,0.5,0.4,0.6\n1,1,1,1,,,\n")
    series = read_series(str(path))
    assert series.columns == {"step": [0, 1], "entropy": [0.5, None]}
    assert series.mapping["entropy"] == "run - 1 - train/entropy" and series.unmapped == ()
    assert read_series(str(path), mapping={"renyi2": "train/entropy"}).columns["renyi2"] == [0.5, None]


def test_an_export_of_two_runs_asks_which(tmp_path: Path) -> None:
    path = tmp_path / "export.csv"
    columns = ["Step", *(f"{run} - entropy{end}" for run in "ab" for end in ("", "__MIN", "__MAX"))]
    path.write_text(",".join(columns) + "\n0" + ",1" * 3 + ",2" * 3 + "\n")
    with pytest.raises(MonitorError, match=r"entropy could be 'a - entropy' or 'b - entropy'\. Choose one: --map"):
        read_series(str(path))
    assert read_series(str(path), mapping={"entropy": "b - entropy"}).columns["entropy"] == [2.0]


def test_a_run_of_trls_grpo_trainer() -> None:
    """files/trainer_state.json: four steps of TRL 1.16.0 with beta=0.01, on a policy of one layer."""
    series = read_series(str(Path(__file__).parent / "files"))
    renamed = {key: column for key, column in series.mapping.items() if key != column}
    assert renamed == {
        "zero_variance_share": "frac_reward_zero_std",
        "response_length": "completions/mean_length",
        "truncated_share": "completions/clipped_ratio",
        "clip_share_low": "clip_ratio/low_mean",
        "clip_share_high": "clip_ratio/high_mean",
        "lr": "learning_rate",
        "perf/step_s": "step_time",
    }
    same = {"step", "reward", "reward_std", "entropy", "loss", "kl", "grad_norm"}
    assert series.mapping.keys() - renamed.keys() == same
    assert series.columns["step"] == [1, 2, 3, 4]
    # a policy with random weights over 32 tokens is nearly uniform: ln 32 = 3.466 nats
    assert series.columns["entropy"] == pytest.approx([math.log(32)] * 4, abs=0.01)
    assert {"rewards/rew/mean", "clip_ratio/region_mean", "epoch", "num_tokens"} <= set(series.unmapped)


def test_trainer_state_and_the_newest_checkpoint(tmp_path: Path) -> None:
    for last in (9, 10):
        folder = tmp_path / f"checkpoint-{last}"
        folder.mkdir()
        history = [
            {"epoch": 0.1, "step": step, "entropy": 0.5, "reward": 0.1 * step, "frac_reward_zero_std": 0.25}
            for step in range(1, last + 1)
        ]
        history += [{"step": last, "eval_reward": 1.0}, {"step": last, "train_runtime": 9.0}]
        state = {"global_step": last, "log_history": history}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    series = read_series(str(tmp_path))
    assert series.columns["step"] == list(range(1, 11)) and series.columns["zero_variance_share"] == [0.25] * 10
    assert series.columns["reward"][9] == 1.0  # its own column's, not eval_reward's
    assert series.unmapped == ("epoch", "eval_reward", "train_runtime")
    assert series.notes == (f"reads {tmp_path / 'checkpoint-10' / 'trainer_state.json'}",)
    one = read_series(str(tmp_path / "checkpoint-9"))
    assert one.columns == read_series(str(tmp_path / "checkpoint-9" / "trainer_state.json")).columns
    assert len(one) == 9


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(MonitorError, match=r"is a folder without trainer_state\.json, \.wandb or event files, "):
        read_series(str(tmp_path), str(tmp_path / "store"))


@pytest.fixture(scope="module")
def wandb_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an offline run that wandb itself has written."""
    wandb = pytest.importorskip("wandb")
    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
    config = {"seed": 7, "beta": 0.04, "model": {"name": "tiny"}}
    folder = str(tmp_path_factory.mktemp("w"))
    run = wandb.init(mode="offline", dir=folder, project="p", config=config, settings=settings)
    for step in range(300):
        row = {"train/entropy": 0.5 + step, "train/global_step": 10 * step, "notes": "x" * 300}
        run.log(row | {"histogram": wandb.Histogram([1.0, 2.0]), "bad": math.inf})
    run.log({"train/entropy": math.nan, "train/global_step": 3000, "nested": {"a": 1}})
    run.finish()
    (path,) = Path(run.dir).parent.glob("*.wandb")
    for _ in range(100):  # its own process may still be writing
        if len(WandbReader(path).read()) == 301:
            break
        time.sleep(0.1)
    return path.parent


def test_a_run_of_wandb(wandb_folder: Path) -> None:
    series = read_series(str(wandb_folder))
    assert series.columns["step"] == [10 * step for step in range(301)]
    assert series.columns["entropy"][:300] == [0.5 + step for step in range(300)]
    assert math.isnan(series.columns["entropy"][300])
    assert series.mapping == {"step": "train/global_step", "entropy": "train/entropy"}
    assert series.unmapped == ("bad", "nested.a")
    (path,) = wandb_folder.glob("*.wandb")
    assert path.stat().st_size > 3 * 32768  # records lie across the borders of blocks
    assert read_series(str(wandb_folder.parent)).columns["step"] == series.columns["step"]  # the only run below


def test_a_run_of_wandb_that_is_cut_or_damaged(wandb_folder: Path, tmp_path: Path) -> None:
    (source,) = wandb_folder.glob("*.wandb")
    data = source.read_bytes()
    cut, damaged = tmp_path / "run-cut.wandb", tmp_path / "run-damaged.wandb"
    inside = data.index(b"train/entropy", 50_000) + 5  # byte 50,000 itself may lie between two records
    cut.write_bytes(data[:inside])
    damaged.write_bytes(data[:inside] + bytes([data[inside] ^ 1]) + data[inside + 1 :])
    whole = read_series(str(source))
    for path in (cut, damaged):
        series = read_series(str(path))
        assert 10 < len(series) < 300
        assert series.columns["entropy"] == whole.columns["entropy"][: len(series)]
        assert "at its end are no whole record and are left out" in series.notes[0]
    with pytest.raises(MonitorError, match=r"holds 2 runs\. Name one: .*run-cut\.wandb, .*run-damaged\.wandb$"):
        read_series(str(tmp_path))


def write_events(folder: Path, steps: range, entropy: float) -> Path:
    """An event file by tensorboard's own writer, with a scalar, an older kind of scalar and a histogram."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.histogram.summary_v2 import histogram_pb as histogram
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb as scalar
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    before = set(folder.glob("*")) if folder.exists() else set()
    writer = EventFileWriter(str(folder), filename_suffix=f".{steps.start}")
    for step in steps:
        old = Summary(value=[Summary.Value(tag="train/entropy", simple_value=entropy)])  # as torch writes it
        for summary in (old, scalar("critic/score/mean", step / 8), histogram("weights", [1.0, 2.0])):
            writer.add_event(Event(step=step, wall_time=1.0, summary=summary))
    writer.close()
    (path,) = set(folder.glob("*")) - before
    return path


def test_event_files_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    path = write_events(tmp_path / "a", range(4), 0.5)
    expected = {"step": [0, 1, 2, 3], "reward": [0.0, 0.125, 0.25, 0.375], "entropy": [0.5] * 4}
    for source in (path, tmp_path / "a", tmp_path):
        assert read_series(str(source)).columns == expected
    # a restart from step 2 writes a second file: its values count from there on
    second = write_events(tmp_path / "a", range(2, 6), 0.25)
    second.rename(second.with_name(path.name.replace("tfevents.", "tfevents.9")))
    series = read_series(str(tmp_path / "a"))
    assert series.columns["entropy"] == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert series.notes[-1].endswith("2 rows repeat a step; the last value of each step is used.")
    data = path.read_bytes()
    path.write_bytes(data[:-20])  # the last record is being written
    assert read_series(str(path)).columns["entropy"] == expected["entropy"]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(MonitorError, match=r"holds 2 runs\. Name one: "):
        read_series(str(tmp_path))


@pytest.mark.parametrize(
    ("module", "name", "install"),
    [
        ("tensorboard", "events.out.tfevents.1.host", "tensorboard"),
        ("wandb", "run-1.wandb", r'"rlvr-monitor\[wandb\]"'),
    ],
)
def test_a_missing_reader_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, install: str
) -> None:
    (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingPackageError, match=rf"needs {module}, which is not installed\. Type: pip install {install}$"
    ):
        read_series(str(tmp_path / name))
