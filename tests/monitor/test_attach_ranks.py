"""Two processes whose groups lie on both: every token exact, one loss, one record, and one end when one fails."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from test_attach import EXACT, SIGNALS, events, oracle, table  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tiny_trl

CHILD = Path(__file__).with_name("attach_child.py")


def launched(folder: Path, weighting: str = "none", failing: str = "none") -> list[dict[str, Any]]:
    root = CHILD.parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(CHILD),
         str(folder), weighting, failing],
        capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]


def policy(state: dict[str, Any]) -> Any:
    made = tiny_trl.model()
    made.load_state_dict(state)
    return made.double().eval()


def rows_of_all(folder: Path, name: str, step: int) -> dict[str, np.ndarray]:
    """The rows of both ranks, rollouts numbered on: rank 1 has those from 6."""
    rows = table(folder / "runs", f"SELECT * FROM {name} WHERE step = {step} ORDER BY rank, sample")
    return rows | {"sample": rows["sample"] + 6 * rows["rank"]}


@pytest.mark.parametrize("weighting", [None, "opefo:warmup_steps=0,normalise=selected"])
def test_groups_on_two_ranks_are_measured_whole(tmp_path, weighting):
    saved = launched(tmp_path, weighting or "none")
    assert events(tmp_path / "runs", "attach_error") == []
    for step in (1, 2):
        samples, tokens = rows_of_all(tmp_path, "samples", step), rows_of_all(tmp_path, "tokens", step)
        assert samples["group_id"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        expected = oracle(policy(saved[0]["models"][step]), samples, tokens, 1.0)
        for name in SIGNALS:
            assert np.abs(np.array(expected[name]) - tokens[name]).max() <= EXACT, name
        means = table(
            tmp_path / "runs", f"SELECT rank, name, value FROM steps WHERE step = {step} AND name NOT LIKE 'perf/%'"
        )
        of_ranks = [
            dict(zip(means["name"][means["rank"] == r], means["value"][means["rank"] == r], strict=True))
            for r in (0, 1)
        ]
        assert of_ranks[0] == of_ranks[1]  # scalars are those of all rollouts
        assert of_ranks[0]["entropy"] == pytest.approx(np.mean(expected["entropy"]), abs=1e-5)
        assert of_ranks[0]["tokens"] == len(tokens["sample"])
        assert of_ranks[0]["reward"] == pytest.approx(samples["reward"].mean(), abs=1e-6)
    if weighting is not None:
        check_gradient(saved, rows_of_all(tmp_path, "tokens", 1))


def check_gradient(saved: list[dict[str, Any]], tokens: dict[str, np.ndarray]) -> None:
    """The first step's gradient against sum(w psi) / sum(w) over both ranks, at ratio 1: -sum(w A ln p) / sum(w)."""
    model, terms, weight = policy(saved[0]["models"][1]), [], 0.0
    for rank, of_rank in enumerate(saved):
        out = of_rank["outs"][0]
        for row, (prompt, there) in enumerate(zip(out["prompt_ids"], out["prompt_mask"], strict=True)):
            own = (tokens["sample"] == row + 6 * rank).nonzero()[0]
            own = own[np.argsort(tokens["position"][own])]
            ids, prompt_ids = tokens["token_id"][own].tolist(), prompt[there.bool()].tolist()
            logits = model(input_ids=torch.tensor([[*prompt_ids, *ids]])).logits[0]
            logp = torch.log_softmax(logits[len(prompt_ids) - 1 : -1], -1)[range(len(ids)), ids]
            weights = torch.tensor(tokens["weight"][own]).double()
            terms.append(-(weights * float(out["advantages"][row]) * logp).sum())
            weight += float(weights.sum())
    (torch.stack(terms).sum() / weight).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert len(set(tokens["weight"].tolist())) > 1
    for of_rank in saved:
        assert float((of_rank["gradients"][1].double() - expected).norm() / expected.norm()) < 2e-5


def test_where_one_rank_fails_all_fall_back_and_train_on(tmp_path):
    launched(tmp_path, failing="1")
    messages = table(tmp_path / "runs", "SELECT rank, message FROM events WHERE kind = 'attach_error' ORDER BY rank")
    assert [text.split(".")[0] for text in messages["message"]] == [
        "Another process failed", "ZeroDivisionError: division by zero",
    ]  # fmt: skip
    rows = table(tmp_path / "runs", "SELECT step, value FROM steps WHERE name = 'reward' AND rank = 0 ORDER BY step")
    assert rows["step"].tolist() == [1, 2]
    assert table(tmp_path / "runs", "SELECT count(*) AS n FROM tokens")["n"].tolist() == [0]
