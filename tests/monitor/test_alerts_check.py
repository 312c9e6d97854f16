"""`rlvr check`: files and runs in, exit code and JSON out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monitor.alerts import replay
from monitor.alerts.engine import AlertEngine
from monitor.commands.check import main
from monitor.integrations.files.series import read_series
from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord

N = 120
FALL = np.round(np.geomspace(1.3, 0.1, N), 4)
FLAT = np.round(0.45 + 0.01 * np.sin(np.arange(N)), 4)
REWARD = np.round(np.linspace(0.2, 0.8, N), 4)


def write_csv(path: Path, entropy: np.ndarray, header: str = "step,entropy,reward,note") -> str:
    rows = [f"{step},{value},{reward},x" for step, value, reward in zip(range(N), entropy, REWARD, strict=True)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def test_exit_codes_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write_csv(tmp_path / "flat.csv", FLAT), "--json"]) == 0
    columns = {"step": "step", "reward": "reward", "entropy": "entropy"}
    report = json.loads(capsys.readouterr().out)
    assert (report["alerts"], report["mapping"], report["unmapped"]) == ([], columns, ["note"])
    assert report["verdict"]["health"] == "healthy" and report["verdict"]["sentence"].startswith("Nothing is wrong at")
    assert main([write_csv(tmp_path / "fall.csv", FALL), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["alerts", "verdict", "mapping", "unmapped"]
    assert report["verdict"]["rules"] == ["entropy_collapse"]
    assert report["verdict"]["sentence"].startswith("Entropy is collapsing since step ")
    (alert,) = report["alerts"]
    assert alert["rule"] == "entropy_collapse" and alert["severity"] == "warning" and alert["resolved_step"] is None
    expected = next(a for a in replay({"step": range(N), "entropy": FALL, "reward": REWARD}) if a.state == "firing")
    assert (alert["step"], alert["value"], alert["baseline"]) == (expected.step, expected.value, expected.baseline)
    assert alert["baseline"] == pytest.approx(float(np.median(FALL[:20])))
    assert alert["value"] < 0.3 * alert["baseline"] == pytest.approx(alert["threshold"])


def test_human_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write_csv(tmp_path / "fall.csv", FALL)]) == 1
    out = capsys.readouterr().out
    assert "120 rows, steps 0 to 119" in out and "WARNING  entropy_collapse at step" in out
    assert "still firing at the end" in out and "steps to the floor" in out
    assert main([write_csv(tmp_path / "flat.csv", FLAT)]) == 0
    assert "No alert fired." in capsys.readouterr().out


def test_jsonl_and_parquet_give_what_csv_gives(tmp_path: Path) -> None:
    rows = [{"step": i, "entropy": float(FALL[i]), "reward": float(REWARD[i])} for i in range(N)]
    (tmp_path / "s.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "s.parquet")
    columns = read_series(write_csv(tmp_path / "s.csv", FALL)).columns
    assert read_series(str(tmp_path / "s.jsonl")).columns == columns
    assert read_series(str(tmp_path / "s.parquet")).columns == columns


def test_unsorted_and_duplicate_steps_are_repaired_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.csv"
    path.write_text("Step, Entropy\n3,0.3\n1,0.1\n2,9\n2,0.2\n4,nan\n5,\n")
    series = read_series(str(path))
    assert series.columns["step"] == [1, 2, 3, 4, 5]
    assert series.columns["entropy"][:3] == [0.1, 0.2, 0.3]
    assert np.isnan(series.columns["entropy"][3]) and series.columns["entropy"][4] is None
    assert main([str(path), "--json"]) == 0
    error = capsys.readouterr().err
    assert "1 rows stood before an earlier step" in error and "1 rows repeat a step" in error
    assert "3 rows with a finite entropy after 0 warm-up steps are too few" in error


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "step,ent,epoch\n1,2,3\n", "no column that a rule can judge: expected entropy (nats) or reward"),
        ("a.csv", "entropy,epoch\n1,2\n", "no column of the step. Expected one of step, global_step, "),
        ("a.csv", "iteration,entropy\n1,2\n", "Its columns: iteration, entropy. Say which it is: --map step=COLUMN"),
        ("a.csv", "", "no column of the step. Expected one of step"),
        ("a.csv", "step,entropy\n0,0.5\n1,high\n", "line 3: entropy is 'high', expected a number"),
        ("a.csv", "step,entropy\n0.5,0.5\n", "line 2: step is '0.5', expected an integer"),
        ("a.jsonl", '{"step": 0, "entropy": 1}\n{"step": 1,\n', "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is '[1]', expected an object"),
        ("a.jsonl", '{"step": 0, "entropy": true}\n', "line 1: entropy is True, expected a number"),
        ("a.parquet", "no parquet", "cannot be read as Parquet"),
        ("a.txt", "step,entropy\n", "ends in '.txt', expected one of .csv, .jsonl, .parquet, .json, .wandb or a Tens"),
        ("a.json", "{}", "has no list log_history"),
        ("a.json", "{\n,", "line 2 is not JSON"),
        ("a.wandb", "step,entropy\n", "is not a file of W&B: it begins with b'step,en'"),
    ],
)
def test_wrong_files_exit_2_and_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, expected: str
) -> None:
    if name.endswith(".wandb"):
        pytest.importorskip("wandb")
    path = tmp_path / name
    path.write_text(text)
    assert main([str(path), "--json"]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and captured.out == ""


def test_missing_file_and_wrong_warmup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "series.csv", FLAT)
    assert main([str(tmp_path / "serie.csv")]) == 2
    assert "Did you mean 'series.csv'?" in capsys.readouterr().err
    assert main([path, "--warmup", "-3"]) == 2
    assert "--warmup is -3" in capsys.readouterr().err
    assert main(["some-run", "--store", str(tmp_path / "none")]) == 2
    assert "'some-run' is not a .csv, .jsonl" in capsys.readouterr().err


def test_warmup_moves_the_baseline(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "s.csv", np.where(np.arange(N) < 25, 2.0, 0.45))
    assert main([path, "--json"]) == 1
    assert main([path, "--json", "--warmup", "25"]) == 0


def test_replay_of_a_recorded_run_equals_its_live_alerts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live: list[object] = []
    entropy = np.concatenate([np.full(5, 3.0), FALL])
    recorder = Recorder(
        tmp_path, RunInfo(name="fall", warmup_steps=5), engine=AlertEngine(warmup_steps=5), on_alert=live.append
    )
    for step, value in enumerate(entropy):
        recorder.record(StepRecord(step, {"entropy": float(value), "reward": step / 200, "lr": 1e-6}))
    recorder.close("finished")
    series = read_series("fall", str(tmp_path))
    assert series.warmup_steps == 5 and series.columns["entropy"] == entropy.tolist()
    assert replay(series.columns, warmup_steps=5) == live and live
    assert main(["fall", "--store", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["alerts"][0]["rule"] == "entropy_collapse"
    assert main(["fal", "--store", str(tmp_path)]) == 2
    assert "Did you mean 'fall'?" in capsys.readouterr().err


def test_an_alerts_file_changes_the_thresholds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "alerts.toml").write_text("[rules.entropy_collapse]\nenabled = false\n")
    series = write_csv(tmp_path / "fall.csv", FALL)
    assert main([series]) == 1
    assert main([series, "--alerts", str(tmp_path / "alerts.toml")]) == 0
    assert "No alert fired." in capsys.readouterr().out
