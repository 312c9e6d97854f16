from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_data import N_TOKENS, record_run, step_record, tokens

from monitor.cli import COMMANDS, main
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store.runs import get_run
from monitor.store.segments import list_segments


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as stop:  # argparse ends this way
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    script = (
        "import sys; from monitor.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'numpy', 'duckdb', 'transformers', 'streamlit'} & set(sys.modules); "
        "import time; heavy or print(time.process_time(), file=sys.stderr); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    best = 9.0
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        best = min(best, float(done.stderr))
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert best < 0.5  # seconds of the processor: what a busy machine cannot stretch


def test_wrong_use_exits_2_with_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path, "uniform-s0", range(1, 2))
    for argv, hint in (
        (["shwo"], "Unknown command 'shwo'. Did you mean 'show'?"),
        (["ls", tmp_path / "none"], "No store at"),
        (["show", "unifrm-s0", "--store", tmp_path], "Did you mean 'uniform-s0'"),
        (["sql", "SELECT nothing_here FROM steps", tmp_path], "nothing_here"),
        (["sql", "DROP VIEW steps", tmp_path, "--locked"], "one SELECT at a time, got DROP"),
        (["store", "prune", tmp_path, "--thin-tokens", "x"], "expected steps like 1,50,100"),
        (["store", "compact", tmp_path, "--run", "none"], "No run 'none'"),
        (["ls", "--nonsense"], "--nonsense"),
    ):
        code, out, err = run(capsys, *argv)
        assert code == 2 and hint in err and out == "", argv
        assert "Traceback" not in err
    assert run(capsys)[0] == 2


def test_ls_and_show_of_a_live_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Recorder(tmp_path, RunInfo("live", task="chain", config={"optim": {"lr": 1e-3}}), flush_s=0.0) as recorder:
        for step in (1, 2):
            recorder.record(step_record(step), tokens(step))
        deadline = time.monotonic() + 60
        while get_run(tmp_path, "live").acknowledged != 2:  # a heartbeat says so
            assert time.monotonic() < deadline
            time.sleep(0.02)
        code, out, _ = run(capsys, "ls", tmp_path, "--json")
        [row] = json.loads(out)
        assert (code, row["run"], row["status"], row["step"], row["reward"]) == (0, "live", "running", 2, 0.02)
        code, out, _ = run(capsys, "show", "live", "--store", tmp_path, "--json")
        report = json.loads(out)
        assert report["latest"]["reward"] == {"step": 2, "value": 0.02}
        assert (report["tokens"], report["status"]) == (2 * N_TOKENS, "running")
        code, out, _ = run(capsys, "show", "live", "--store", tmp_path)
        assert code == 0 and "optim.lr" in out and "live: running" in out
        prune = ("store", "prune", tmp_path, "--thin-tokens", "1")
        assert run(capsys, *prune)[1].startswith("live is running: left alone.")
        assert run(capsys, *prune, "--run", "live")[0] == 2
        [done] = json.loads(run(capsys, "store", "compact", tmp_path, "--json")[1])
        assert done["run"] == "live" and done["files_after"] == done["files_before"]  # too few to merge
        assert run(capsys, "store", "check", tmp_path)[0] == 0
    code, out, _ = run(capsys, "ls", tmp_path)
    assert "finished" in out and "live" in out


def test_sql_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path, steps=range(1, 3))
    query = (
        "SELECT step, sum(n) AS n, 'nan'::DOUBLE AS odd FROM histograms WHERE split = 'all' GROUP BY step ORDER BY step"
    )
    assert json.loads(run(capsys, "sql", query, tmp_path, "--format", "json")[1]) == [
        {"step": 1, "n": N_TOKENS, "odd": None},
        {"step": 2, "n": N_TOKENS, "odd": None},
    ]
    rows = list(csv.reader(io.StringIO(run(capsys, "sql", query, tmp_path, "--format", "csv")[1])))
    assert rows == [["step", "n", "odd"], ["1", "200", "nan"], ["2", "200", "nan"]]
    assert run(capsys, "sql", query, tmp_path)[1].split() == ["step", "n", "odd", "1", "200", "nan", "2", "200", "nan"]
    assert run(capsys, "sql", "SELECT '[bold]x[/bold]' AS markup", tmp_path)[1].split() == ["markup", "[bold]x[/bold]"]


def test_store_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path)
    assert run(capsys, "store", "check", tmp_path)[:2] == (0, f"0 damaged, 0 other findings in '{tmp_path}'.\n")
    [done] = json.loads(run(capsys, "store", "prune", tmp_path, "--thin-tokens", "1,10", "--json")[1])
    assert done["kept_steps"] == [1, 10]
    _, out, _ = run(capsys, "sql", "SELECT DISTINCT step FROM tokens ORDER BY 1", tmp_path, "--format", "csv")
    assert out.split() == ["step", "1", "10"]
    _, path = list_segments(tmp_path, "a", "steps")[0]
    path.write_bytes(path.read_bytes()[:-9])
    code, out, _ = run(capsys, "store", "check", tmp_path, "--json")
    assert code == 1 and any(finding["damage"] for finding in json.loads(out))
    assert run(capsys, "store", "check", tmp_path)[0] == 1


def test_the_command_runs_as_a_module(tmp_path: Path) -> None:
    record_run(tmp_path, steps=range(1, 2))
    command = [sys.executable, "-m", "monitor.cli", "ls", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)[0]["run"] == "a"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_handler(name: str) -> None:
    module, function = COMMANDS[name][0].split(":")
    source = Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py")  # read, not imported: no torch
    assert f"\ndef {function}(argv" in source.read_text(encoding="utf-8")
