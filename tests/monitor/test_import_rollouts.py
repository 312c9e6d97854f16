"""`rlvr import --rollouts`: texts, rewards, tokens from what trainers dump of each step; absent values stay absent."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_import import import_, rows, series, tree, verl_lines
from test_import_follow import following

from monitor.integrations.files.rollouts import Rollouts
from monitor.metrics import inner_edges

VERL = Path(__file__).parent / "files" / "verl"  # by verl 0.9.1: FileLogger.log and PPOTrainer._write_generations


def test_rollouts_of_verl(tmp_path: Path) -> None:
    store = tmp_path / "s"
    import_(VERL / "metrics.jsonl", store, "--rollouts", str(VERL / "rollouts"))
    assert series(store, "entropy") == {1: 1.5, 2: 0.75} and series(store, "perf/mfu/actor") == {1: 0.3, 2: 0.3}
    columns = "step, sample, group_id, split, reward, prompt, completion"
    assert rows(store, f"SELECT {columns} FROM samples ORDER BY step, sample") == [
        (1, 0, 0, "train", 1.0, "2+1=", "3"),
        (1, 1, 0, "train", 0.0, "2+1=", "9"),
        (1, 2, 1, "train", 0.0, "3+3=", "ä <b>"),
        (1, 3, 1, "train", 0.0, "3+3=", ""),
        (2, 0, 0, "train", 1.0, "2+2=", "4"),
        (2, 1, 0, "train", 0.0, "2+2=", "9"),
        (2, 2, 1, "train", 0.0, "3+3=", "ä <b>"),
        (2, 3, 1, "train", 0.0, "3+3=", ""),
    ]
    absent = "prompt_id, correct, advantage, n_tokens, truncated, token_texts"
    assert rows(store, f"SELECT DISTINCT {absent} FROM samples") == [(None,) * 6]
    assert rows(store, "SELECT count(*) FROM tokens") == [(0,)]
    before = tree(store)
    import_(VERL / "metrics.jsonl", store, "--rollouts", str(VERL / "rollouts"))
    assert tree(store) == before


def sequence(prompt: list[int], response: list[int], reward: float, entropy: list[float | None]) -> dict[str, Any]:
    """A line of prime-rl's TokenExporter, schema_version 1: lists over prompt and response."""
    n, total = len(prompt), len(prompt) + len(response)
    return {
        "schema_version": 1, "step": 1, "export_step": 1, "rank": 0, "micro_step": 0, "micro_sequence_idx": 0,
        "export_sequence_idx": 0, "run_id": None, "env_name": "math", "token_ids": prompt + response,
        "position_ids": list(range(total)), "loss_mask": [False] * n + [True] * len(response),
        "advantages": [0.0] * n + [reward - 0.5] * len(response), "losses": [{}] * total, "rewards": [reward] * total,
        "inference_logprobs": [0.0] * n + [-0.5] * len(response),
        "trainer_logprobs": [0.0] * n + [-0.25] * len(response), "entropy": [0.0] * n + entropy,
        "mismatch_kl": [None] * total, "is_masked": [None] * total,
    }  # fmt: skip


def test_token_exports_of_prime_rl(tmp_path: Path) -> None:
    folder, store = tmp_path / "token_exports", tmp_path / "s"
    lines = {
        0: [sequence([5, 6], [7, 8, 9], 1.0, [0.5, 0.25, None])],
        1: [sequence([5, 6], [7], 0.0, [1.5]), sequence([4], [3, 2], 0.0, [0.1, 0.2])],
    }
    for rank, found in lines.items():
        path = folder / "step_1" / f"rank_{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in found))
    assert not Rollouts(folder).is_complete(1)
    (folder / "step_1" / "STABLE").touch()
    assert Rollouts(folder).is_complete(1) and not Rollouts(folder).is_complete(2)
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "time": 1.7e9 + step, "entropy/all/mean": 0.5 / step} for step in (1, 2)]  # its FileMonitor
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    import_(metrics, store, "--rollouts", str(folder))
    assert rows(store, "SELECT step, name, value, ts FROM steps WHERE name <> 'perf/queue' ORDER BY step") == [
        (1, "entropy", 0.5, 1.7e9 + 1), (2, "entropy", 0.25, 1.7e9 + 2),
    ]  # fmt: skip
    found = rows(store, "SELECT sample, group_id, reward, advantage, n_tokens, prompt FROM samples ORDER BY sample")
    assert found == [(0, 0, 1.0, 0.5, 3, None), (1, 0, 0.0, -0.5, 1, None), (2, 1, 0.0, -0.5, 2, None)]
    columns = "sample, position, token_id, logprob, entropy"
    assert rows(store, f"SELECT {columns} FROM tokens ORDER BY sample, position") == [
        (0, 0, 7, -0.25, 0.5),
        (0, 1, 8, -0.25, 0.25),
        (0, 2, 9, -0.25, None),
        (1, 0, 7, -0.25, 1.5),
        (2, 0, 3, -0.25, pytest.approx(0.1)),
        (2, 1, 2, -0.25, pytest.approx(0.2)),
    ]
    assert rows(store, "SELECT DISTINCT renyi2, deviation, alive, weight FROM tokens") == [(None,) * 4]
    found = rows(store, "SELECT metric, n, sum, min, max FROM histograms ORDER BY metric")
    # entropies 0.5, 0.25, 1.5, 0.1, 0.2; -ln p is 0.25 six times
    assert found[0] == ("entropy", 5, pytest.approx(2.55), pytest.approx(0.1), 1.5)
    assert found[1] == ("surprisal", 6, 1.5, 0.25, 0.25)
    ((counts,),) = rows(store, "SELECT counts FROM histograms WHERE metric = 'entropy'")
    cells = np.searchsorted(inner_edges("nats96"), np.array([0.5, 0.25, 1.5, 0.1, 0.2], np.float32), side="right")
    assert [at for at, count in enumerate(counts) if count] == sorted(cells)


@pytest.mark.parametrize("end", ["jsonl", "parquet"])
def test_rows_of_tokens(tmp_path: Path, end: str) -> None:
    folder, store = tmp_path / "rollouts", tmp_path / "s"
    folder.mkdir()
    cells = [
        {"sample": sample, "position": position, "token_id": 10 + position, "text": "ab"[position], "entropy": 0.5,
         "deviation": 0.125, "weight": float(position), "reward": 1.0 - sample, "correct": sample == 0, "group": "g",
         "prompt": "p"}
        for sample in (0, 1) for position in (1, 0)
    ]  # fmt: skip
    if end == "jsonl":
        (folder / "1.jsonl").write_text("\n".join(json.dumps(row) for row in cells))
    else:
        pq.write_table(pa.Table.from_pylist(cells), folder / "1.parquet")
    metrics = tmp_path / "a.csv"
    metrics.write_text("step,entropy\n1,0.5\n")
    import_(metrics, store, "--rollouts", str(folder))
    columns = "sample, group_id, reward, correct, n_tokens, prompt, completion, token_texts"
    assert rows(store, f"SELECT {columns} FROM samples ORDER BY sample") == [
        (0, 0, 1.0, True, 2, "p", None, ["a", "b"]),
        (1, 0, 0.0, False, 2, "p", None, ["a", "b"]),
    ]
    columns = "sample, position, token_id, logprob, entropy, deviation, weight"
    assert rows(store, f"SELECT {columns} FROM tokens ORDER BY sample, position") == [
        (sample, position, 10 + position, None, 0.5, 0.125, float(position))
        for sample in (0, 1) for position in (0, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["[1]\n", '{"a"\n', '{"position": 1}\n', '{"input": "a", "score": "high"}\n'])
def test_rollouts_of_another_form(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "1.jsonl").write_text(text)
    (tmp_path / "a.csv").write_text("step,entropy\n1,0.5\n")
    wrong = "high" not in text
    import_(tmp_path / "a.csv", tmp_path / "s", "--rollouts", str(tmp_path / "r"), expect=2 if wrong else 0)
    if wrong:
        assert "1.jsonl' " in capsys.readouterr().err and not (tmp_path / "s").exists()
    else:  # the scalars are kept, and the run says what was not
        assert series(tmp_path / "s", "entropy") == {1: 0.5}
        assert rows(tmp_path / "s", "SELECT count(*) FROM events WHERE kind = 'bad_samples'") == [(1,)]


def test_a_live_step_waits_for_its_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, folder, store = tmp_path / "a.jsonl", tmp_path / "r", tmp_path / "s"
    with following(metrics, store, rollouts=str(folder)) as (importer, _):
        metrics.write_text(verl_lines(range(1, 3)))
        assert [importer.look() for _ in range(3)] == [0, 0, 0]
        folder.mkdir()
        (folder / "1.jsonl").write_text((VERL / "rollouts" / "1.jsonl").read_text())
        assert importer.look() == 0  # it was written just now
        os.utime(folder / "1.jsonl", (time.time() - 2, time.time() - 2))
        assert importer.look() == 1
        monkeypatch.setattr("monitor.integrations.files.importing.ROLLOUTS_S", 0.0)
        assert importer.look() == 1  # step 2 has waited long enough
    assert rows(store, "SELECT step, count(*) FROM samples GROUP BY step") == [(1, 4)]
    assert series(store, "entropy").keys() == {1, 2}
