"""`rlvr import --rollouts` on the traces of prime-rl's file monitor, made here as its source writes them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_import import import_, rows, series, tree
from test_import_follow import following

from monitor.integrations.files.rollouts import Rollouts


def node(
    role: str, text: str, ids: list[int], logprobs: list[float], parent: int | None, **other: Any
) -> dict[str, Any]:
    """A message of a trace; the last len(logprobs) tokens of it were sampled."""
    n = len(ids) - len(logprobs)
    message = {"role": role, "content": text} | other
    mask = [False] * n + [True] * len(logprobs)
    return {"parent": parent, "message": message, "sampled": bool(logprobs), "token_ids": ids, "mask": mask,
            "logprobs": logprobs}  # fmt: skip


def trace(id: str, nodes: list[dict[str, Any]], **other: Any) -> dict[str, Any]:
    values = {"version": 1, "id": id, "agent": {"name": "solver", "trainable": True}, "nodes": nodes, "calls": [],
              "rewards": {}, "info": {"kind": "train", "arrival": {"step": 1, "time": 1.7e9}},
              "stop_condition": None}  # fmt: skip
    return values | other


def episode(group: str, *traces: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"e-{traces[0]['id']}", "group": {"id": group}, "env": {"name": "maths"}, "traces": list(traces)}


ASKED = node("user", "2+2=", [5, 6], [], None)
SOLVED = trace(
    "a", [ASKED, node("assistant", "4", [1, 7, 8], [-0.5, -1.0], 0)],
    rewards={"right": {"score": 1.0, "weight": 2.0}, "short": {"score": 0.5}, "judge": None},
)  # fmt: skip
TALK = [
    ASKED,
    node("assistant", "call", [1, 9], [-0.25], 0, tool_calls=[{"name": "add"}]),
    node("tool", "4", [2, 2], [], 1),
    node("assistant", "it is 4", [1, 4], [-0.75], 2),
    node("assistant", "or 5", [3], [-0.125], 2),  # another branch
]
EPISODES = [
    episode("g", SOLVED, trace("judge", [ASKED], agent={"name": "judge", "trainable": False})),
    episode("g", trace("b", TALK, stop_condition="max_turns", rewards={"right": {"score": 0.0, "weight": None}})),
    episode("h", trace("filtered", [ASKED, node("assistant", "x", [3], [-1.0], 0)])),
    episode("h", trace("c", [ASKED, node("assistant", "y", [3], [-2.0], 0)], calls=[{"finish_reason": "length"}])),
]
TAKEN = [
    {"trace_id": "a", "info": {"effective": True, "ship": {"step": 1, "time": 1.7e9}, "advantage": 0.5},
     "branches": []},
    {"trace_id": "b", "info": {"effective": True, "ship": {"step": 1, "time": 1.7e9}},
     "branches": [{"index": 1, "advantages": [None] * 6 + [-0.5]}]},
    {"trace_id": "c", "info": {"effective": True, "ship": {"step": 2, "time": 1.7e9}}, "branches": []},
]  # fmt: skip
SCORED = [  # over all tokens of a branch, of a the sampled ones alone
    {"trace_id": "a", "info": {}, "branches": [
        {"index": 0, "trainer_logprobs": [None] * 3 + [-0.5625, -1.125], "entropies": [None] * 3 + [0.5, 0.25]}]},
    {"trace_id": "b", "info": {}, "branches": [{"index": 0, "trainer_logprobs": [-1.0] * 4, "entropies": [0.5] * 4}]},
]  # fmt: skip


class Stream:
    """Appends records to a stream and its index, as ChunkedJsonl and FileMonitor do; `chunks`: with chunks."""

    def __init__(self, path: Path, *, chunks: bool = True, most: int = 10**6) -> None:
        self.path, self.chunks, self.most, self.number = path, chunks, most, 0
        path.parent.mkdir(parents=True, exist_ok=True)

    def file(self) -> Path:
        if not self.chunks:
            return self.path.with_name(f"{self.path.name}.jsonl")
        self.path.mkdir(exist_ok=True)
        return self.path / f"{self.number:05d}.jsonl"

    def append(self, *records: dict[str, Any]) -> None:
        index = self.path.with_name(f"{self.path.name}.index.jsonl")
        for record in records:
            line = json.dumps(record).encode() + b"\n"
            if self.file().exists() and self.file().stat().st_size + len(line) > self.most:
                self.seal()
            offset = self.file().stat().st_size if self.file().exists() else 0
            with self.file().open("ab") as file:
                file.write(line)
            row = {"offset": offset} | ({"chunk": self.number} if self.chunks else {})
            if "traces" in record:
                row |= {"id": record["id"], "trace_ids": [trace["id"] for trace in record["traces"]]}
            else:
                row |= {"trace_id": record["trace_id"], "info": record["info"]}
            with index.open("ab") as file:
                file.write(json.dumps(row).encode() + b"\n")

    def seal(self) -> None:
        """zstd in frames of 64 bytes and a table of them in a frame that readers skip."""
        content = self.file().read_bytes()
        frames = [pa.compress(content[at : at + 64], "zstd", asbytes=True) for at in range(0, len(content), 64)]
        table = b"\x5e\x2a\x4d\x18" + (9).to_bytes(4, "little") + bytes(9)
        self.file().with_name(f"{self.file().name}.zst").write_bytes(b"".join(frames) + table)
        self.file().unlink()
        self.number += 1


def write(folder: Path, *, chunks: bool = True, most: int = 10**6) -> None:
    Stream(folder / "stream", chunks=chunks, most=most).append(*EPISODES)
    Stream(folder / "annotations" / "orchestrator", chunks=chunks, most=most).append(*TAKEN)
    Stream(folder / "annotations" / "trainer", chunks=chunks, most=most).append(*SCORED)


def metrics(path: Path, steps: range) -> Path:
    """As its log_metrics writes them; inference metrics have no step."""
    lines = [{"step": step, "time": 1.7e9 + step, "entropy/mean": 0.5, "producer": "trainer"} for step in steps]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("form", ["chunks", "sealed", "files"])
def test_traces_are_rollouts_of_the_step_that_took_them(tmp_path: Path, form: str) -> None:
    folder, store = tmp_path / "traces", tmp_path / "s"
    write(folder, chunks=form != "files", most=300 if form == "sealed" else 10**6)
    assert bool(list(folder.rglob("*.zst"))) == (form == "sealed")
    source = metrics(tmp_path / "metrics.jsonl", range(1, 3))
    import_(source, store, "--rollouts", str(folder))
    columns = "step, sample, group_id, reward, advantage, n_tokens, truncated, prompt, completion"
    found = rows(store, f"SELECT {columns} FROM samples ORDER BY step, sample")
    talk = [TALK[1]["message"], TALK[2]["message"]]
    assert found == [
        (1, 0, 0, 2.5, 0.5, 2, False, "2+2=", "4"),  # 2 x 1 + 0.5; the judge has none, and trains nothing
        (1, 1, 0, 0.0, None, 2, True, "2+2=", json.dumps([*talk, TALK[3]["message"]])),
        # two branches of a trace share their first sampled token; the trainer told of the first branch alone
        (1, 2, 0, 0.0, None, 2, True, "2+2=", json.dumps([*talk, TALK[4]["message"]])),
        (2, 0, 0, None, None, 1, True, "2+2=", "y"),  # "filtered" was in no batch
    ]
    columns = "step, sample, position, token_id, logprob, entropy"
    assert rows(store, f"SELECT {columns} FROM tokens ORDER BY step, sample, position") == [
        (1, 0, 0, 7, -0.5625, 0.5), (1, 0, 1, 8, -1.125, 0.25),
        # the trainer's stream ends before the branch does, so the sampler's log-probabilities stay
        (1, 1, 0, 9, -0.25, None), (1, 1, 4, 4, -0.75, None),
        (1, 2, 0, 9, -0.25, None), (1, 2, 3, 3, -0.125, None),
        (2, 0, 0, 3, -2.0, None),
    ]  # fmt: skip
    before = tree(store)
    import_(source, store, "--rollouts", str(folder))
    assert tree(store) == before


def test_advantages_of_tokens(tmp_path: Path) -> None:
    write(tmp_path / "t")
    later = {"trace_id": "b", "info": {}, "branches": [{"index": 1, "advantages": [-0.5] * 7}]}
    Stream(tmp_path / "t" / "annotations" / "other").append(later)
    found = Rollouts(tmp_path / "t").read(1)
    assert found is not None and list(found.samples.advantage) == [0.5, None, -0.5]


def test_a_step_that_is_taken_again_after_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "t")
    rollouts = Rollouts(tmp_path / "t")
    assert rollouts.is_complete(1) and rollouts.read(3) is None
    taken = Stream(tmp_path / "t" / "annotations" / "orchestrator")
    taken.append({"trace_id": "filtered", "info": {"ship": {"step": 1}}, "branches": []})
    found = rollouts.read(1)
    assert found is not None and list(found.samples.completion) == ["x"] and rollouts.read(2) is None


def test_a_live_step_waits_for_its_batch_and_for_what_the_trainer_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitor.integrations.files.importing.ROLLOUTS_S", 0.1)
    folder, store = tmp_path / "t", tmp_path / "s"
    episodes, taken, scored = (Stream(folder / name) for name in ("stream", "annotations/o", "annotations/t"))
    source = tmp_path / "metrics.jsonl"
    episodes.append(*EPISODES)
    taken.append(*TAKEN[:2])
    scored.append(*SCORED)
    with following(source, store, rollouts=str(folder)) as (importer, _):
        metrics(source, range(1, 4))
        assert importer.look() == 0  # the batch of step 1 may not be whole
        taken.append(TAKEN[2])
        index = folder / "annotations" / "o.index.jsonl"
        whole = index.read_bytes()
        index.write_bytes(whole[:-9])  # a line that is being written
        assert importer.look() == 0
        index.write_bytes(whole)
        assert importer.look() == 1
        time.sleep(0.2)
        assert importer.look() == 0  # the trainer has told of 1, so step 2 waits longer
        scored.append({"trace_id": "c", "info": {}, "branches": []})
        monkeypatch.setattr("monitor.integrations.files.traces._QUIET_S", 0.0)
        assert importer.look() == 2  # 3 has waited for a batch
    assert rows(store, "SELECT step, count(*) FROM samples GROUP BY step ORDER BY step") == [(1, 3), (2, 1)]
    assert series(store, "entropy").keys() == {1, 2, 3}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"trace_ids": ["a"]}, "holds no rollouts of a known form: KeyError('offset')"),
        ({"trace_ids": ["a"], "offset": 0, "chunk": 7}, "00007.jsonl.zst' cannot be read: "),
        ({"trace_ids": ["a"], "offset": 3, "chunk": 0}, "has a line that is not JSON: "),
        ([1], "has a line that is no object, but a list"),
    ],
)
def test_traces_of_another_form(tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: Any, told: str) -> None:
    write(tmp_path / "t")
    (tmp_path / "t" / "stream.index.jsonl").write_text(json.dumps(wrong) + "\n")
    source = metrics(tmp_path / "metrics.jsonl", range(1, 2))
    import_(source, tmp_path / "s", "--rollouts", str(tmp_path / "t"), expect=2)
    assert told in capsys.readouterr().err
    with following(source, tmp_path / "s2", rollouts=str(tmp_path / "t")) as (importer, said):
        importer.look()
    assert any(told in text and "The rollouts of step 1 are left out." in text for text in said)
    assert series(tmp_path / "s2", "entropy") == {1: 0.5}


def test_messages_in_a_circle_are_refused(tmp_path: Path) -> None:
    nodes = [node("user", "a", [1], [], 1), node("assistant", "b", [2], [-1.0], 0), node("user", "c", [], [], 1)]
    Stream(tmp_path / "stream").append(episode("g", trace("a", nodes)))
    Stream(tmp_path / "annotations" / "o").append(TAKEN[0])
    with pytest.raises(Exception, match="message 0 follows message 1"):
        Rollouts(tmp_path).read(1)
