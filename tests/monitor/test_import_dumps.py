"""`rlvr import --rollouts` on dumps of slime and miles: files of torch, of which nothing is run.

The files are made here, as the source of both writes them: `Sample.to_dict` and `torch.save`. Neither can be installed
without its engines.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_import import import_, rows, series, tree, verl_lines
from test_import_follow import following

from monitor.integrations.files.dumps import dump_files
from monitor.integrations.files.rollouts import Rollouts

torch = pytest.importorskip("torch")
SPEC = {"spec_accept_token_num": 0, "spec_draft_token_num": 0, "spec_verify_ct": 0, "completion_token_num": 3}


def sample(index: int, response: list[int], reward: Any, **other: Any) -> dict[str, Any]:
    """A Sample of slime as a dict; groups of two, the prompt is tokens 5 and 6."""
    return {
        "group_index": index // 2, "index": index, "prompt": "2+2=", "tokens": [5, 6, *response],
        "multimodal_inputs": None, "multimodal_train_inputs": None, "response": f"r{index}",
        "response_length": len(response), "label": "4", "reward": reward, "loss_mask": None, "weight_versions": ["1"],
        "rollout_log_probs": [-0.5 * (i + 1) for i in range(len(response))], "rollout_routed_experts": None,
        "remove_sample": False, "teacher_log_probs": None, "status": "completed", "metadata": {"a": [1, "b"]},
        "generate_function_path": None, "train_metadata": None, "session_id": None, "non_generation_time": 0.0,
        "spec_info": SPEC, "prefix_cache_info": {"cached_tokens": 0, "total_prompt_tokens": 2},
    } | other  # fmt: skip


SAMPLES = [
    sample(0, [7, 8, 9], 1.0),
    sample(1, [7, 8], 0.0, status="truncated", loss_mask=[1, 0]),  # token 8 is a tool's
    sample(2, [3], {"answer": 1.0, "form": 0.5}, status="aborted"),
    sample(3, [], 0.0, status="pending"),
]


def save_rollouts(path: Path, samples: list[dict[str, Any]], step: int = 1, **other: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"rollout_id": step, "samples": samples, **other}, path)


def trained(samples: list[dict[str, Any]], dtype: Any) -> dict[str, list[Any]]:
    """What the trainer has of some samples, a column for each name."""
    values = {"log_probs": -0.25, "entropy": 0.75, "ref_log_probs": -0.3}
    return {
        "tokens": [torch.tensor(one["tokens"]) for one in samples],
        "response_lengths": [one["response_length"] for one in samples],
        "total_lengths": [len(one["tokens"]) for one in samples],
        "loss_masks": [torch.tensor(one["loss_mask"] or [1] * one["response_length"]) for one in samples],
        "rewards": [0.125 for _ in samples],  # after the groups' normalisation, so no rewards
        "truncated": [int(one["status"] == "truncated") for one in samples],
        "sample_indices": [one["index"] for one in samples],
        "advantages": [torch.full((one["response_length"],), 0.5 - one["index"], dtype=dtype) for one in samples],
    } | {
        name: [torch.full((one["response_length"],), value, dtype=dtype) for one in samples]
        for name, value in values.items()
    }


def save_ranks(folder: Path, step: int = 1) -> None:
    """By rank, as miles and older slime do; rank 2 is of a pipeline stage without log-probabilities."""
    folder.mkdir(parents=True, exist_ok=True)
    second = trained(SAMPLES[1::2], torch.float32)
    for rank, data in enumerate((trained(SAMPLES[::2], torch.bfloat16), second, second)):
        data = {name: values for name, values in data.items() if rank < 2 or name not in ("log_probs", "entropy")}
        data["raw_reward"] = [one["reward"] for one in SAMPLES]  # of the whole step
        torch.save({"rollout_id": step, "rank": rank, "rollout_data": data}, folder / f"{step}_{rank}.pt")


def save_format_2(path: Path, step: int = 1, **other: Any) -> None:
    """One file of all ranks, as newer slime does; rank 1 has the samples with odd positions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = []
    for position, one in enumerate(SAMPLES):
        columns = trained([one], torch.float32)
        indices = columns.pop("sample_indices")
        values = {name: column[0] for name, column in columns.items()}
        samples.append({"data_parallel_rank": position % 2, "sample_index": indices[0], "rollout_position": position}
                       | values)  # fmt: skip
    dump = {"format_version": 2, "rollout_id": step, "rank": 0, "samples": samples, "dp_shards": [{"rank": 0}]}
    torch.save(dump | other, path)


def scalars(tmp_path: Path) -> Path:
    path = tmp_path / "a.csv"
    path.write_text("step,entropy\n1,0.5\n")
    return path


def test_rollouts_alone(tmp_path: Path) -> None:
    save_rollouts(tmp_path / "dump" / "1.pt", SAMPLES)
    save_rollouts(tmp_path / "dump" / "eval_1.pt", [sample(9, [1], 0.0)])
    store = tmp_path / "s"
    import_(scalars(tmp_path), store, "--rollouts", str(tmp_path / "dump"))
    columns = "sample, group_id, split, reward, correct, advantage, n_tokens, truncated, prompt, completion"
    assert rows(store, f"SELECT {columns} FROM samples ORDER BY sample") == [
        (0, 0, "train", 1.0, None, None, 3, False, "2+2=", "r0"),
        (1, 0, "train", 0.0, None, None, 1, True, "2+2=", "r1"),
        (2, 1, "train", None, None, None, 1, False, "2+2=", "r2"),  # a reward of two parts is no number
        (3, 1, "train", 0.0, None, None, 0, None, "2+2=", "r3"),
    ]
    columns = "sample, position, token_id, logprob, entropy"
    assert rows(store, f"SELECT {columns} FROM tokens ORDER BY sample, position") == [
        (0, 0, 7, -0.5, None), (0, 1, 8, -1.0, None), (0, 2, 9, -1.5, None), (1, 0, 7, -0.5, None),
        (2, 0, 3, -0.5, None),
    ]  # fmt: skip
    # surprisals 0.5, 1, 1.5, 0.5, 0.5
    assert rows(store, "SELECT metric, n, sum FROM histograms") == [("surprisal", 5, 4.0)]
    before = tree(store)
    import_(scalars(tmp_path), store, "--rollouts", str(tmp_path / "dump"))
    assert tree(store) == before


@pytest.mark.parametrize("form", ["ranks", "format 2"])
def test_what_the_trainer_computed_is_joined(tmp_path: Path, form: str) -> None:
    folder, store = tmp_path / "details", tmp_path / "s"
    save_rollouts(folder / "rollout_data" / "1.pt", SAMPLES, metadata={})
    if form == "ranks":
        save_ranks(folder / "train_data")
    else:
        save_format_2(folder / "train_data" / "1.pt", raw_reward=[1.0, 0.0, 0.75, 0.0])
    import_(scalars(tmp_path), store, "--rollouts", str(folder))
    tokens = rows(store, "SELECT sample, position, token_id, logprob, entropy FROM tokens ORDER BY sample, position")
    assert tokens == [(0, 0, 7, -0.25, 0.75), (0, 1, 8, -0.25, 0.75), (0, 2, 9, -0.25, 0.75), (1, 0, 7, -0.25, 0.75),
                      (2, 0, 3, -0.25, 0.75)]  # fmt: skip
    found = rows(store, "SELECT reward, advantage, completion FROM samples ORDER BY sample")
    third = None if form == "ranks" else 0.75  # whose number the trainer has chosen
    assert found == [(1.0, 0.5, "r0"), (0.0, -0.5, "r1"), (third, -1.5, "r2"), (0.0, None, "r3")]
    assert rows(store, "SELECT metric, n, sum FROM histograms ORDER BY metric") == [
        ("entropy", 5, 3.75), ("surprisal", 5, 1.25),
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["ranks", "format 2"])
def test_training_data_alone(tmp_path: Path, form: str) -> None:
    folder, store = tmp_path / "train", tmp_path / "s"
    if form == "ranks":
        save_ranks(folder)
    else:
        save_format_2(folder / "train_1.pt")
    import_(scalars(tmp_path), store, "--rollouts", str(folder))
    columns = "group_id, reward, truncated, n_tokens, prompt, completion"
    found = rows(store, f"SELECT {columns} FROM samples ORDER BY n_tokens DESC, truncated DESC")
    # a group are those with the same prompt tokens; no text, and no reward before its normalisation
    assert found == [(0, None, False, 3, None, None), (0, None, True, 1, None, None), (0, None, False, 1, None, None),
                     (0, None, False, 0, None, None)]  # fmt: skip
    assert rows(store, "SELECT count(*), min(logprob), max(entropy) FROM tokens") == [(5, -0.25, 0.75)]


def test_samples_of_one_rollout_are_not_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "details"
    save_rollouts(folder / "rollout_data" / "1.pt", [sample(0, [7], 1.0), sample(0, [8], 1.0)])
    save_ranks(folder / "train_data")
    found = Rollouts(folder).read(1)
    assert found is not None and found.tokens is not None
    assert list(found.tokens.logprob) == [-0.5, -0.5]  # the sampler's


def test_parts_of_a_context_parallel_group_are_left_out(tmp_path: Path) -> None:
    save_rollouts(tmp_path / "rollout_1.pt", SAMPLES[:1])
    data = trained(SAMPLES[:1], torch.float32) | {"log_probs": [torch.tensor([-0.25])]}
    torch.save({"rollout_id": 1, "rank": 0, "rollout_data": data}, tmp_path / "train_1_0.pt")
    assert [path.name for path in dump_files(tmp_path, 1)] == ["rollout_1.pt", "train_1_0.pt"]
    assert dump_files(tmp_path, 0) == dump_files(tmp_path, 11) == []
    found = Rollouts(tmp_path).read(1)
    assert found is not None and found.tokens is not None
    assert list(found.tokens.logprob) == [-0.5, -1.0, -1.5] and list(found.tokens.entropy) == [0.75] * 3


def test_arrays_of_miles_are_read(tmp_path: Path) -> None:
    experts = np.arange(8, dtype=np.int32).reshape(4, 1, 2)
    save_rollouts(tmp_path / "1.pt", [sample(0, [7, 8, 9], np.float64(0.5), rollout_routed_experts=experts)])
    found = Rollouts(tmp_path).read(1)
    assert found is not None and list(found.samples.reward) == [0.5]


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_hostile_dump_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trap = tmp_path / "trap"
    for name, made in {"new": True, "old": False}.items():  # torch's format since 1.6, and plain pickles before
        path = tmp_path / name / "1.pt"
        path.parent.mkdir()
        torch.save({"rollout_id": 1, "samples": [Hostile(trap)]}, path, _use_new_zipfile_serialization=made)
        import_(scalars(tmp_path), tmp_path / "s", "--rollouts", str(path.parent), expect=2)
        told = capsys.readouterr().err
        assert f"{str(path)!r} is refused, and nothing of it was run: it asks for posix.mkdir, expected" in told
        assert not trap.exists() and not (tmp_path / "s").exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # it would have been


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04torn", b"a text"])
def test_a_broken_dump_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (tmp_path / "1.pt").write_bytes(content)
    import_(scalars(tmp_path), tmp_path / "s", "--rollouts", str(tmp_path), expect=2)
    assert f"{str(tmp_path / '1.pt')!r} " in capsys.readouterr().err


@pytest.mark.parametrize(
    "dump", [[1], {"samples": [{"tokens": [1]}]}, {"other": 1}, {"samples": [sample(0, [7, 8], 0.0, loss_mask=[1])]}]
)
def test_a_dump_of_another_form_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], dump: Any) -> None:
    torch.save(dump, tmp_path / "1.pt")
    import_(scalars(tmp_path), tmp_path / "s", "--rollouts", str(tmp_path), expect=2)
    assert "1.pt' holds no rollouts of a known form: " in capsys.readouterr().err


def test_a_live_step_waits_for_what_the_trainer_dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, folder, store = tmp_path / "a.jsonl", tmp_path / "details", tmp_path / "s"
    monkeypatch.setattr("monitor.integrations.files.importing.ROLLOUTS_S", 0.0)
    early = time.time() - 2

    def save(name: str) -> None:
        (save_rollouts if name.startswith("rollout") else save_format_2)(folder / name, *[SAMPLES] * ("roll" in name))
        os.utime(folder / name, (early, early))

    with following(metrics, store, rollouts=str(folder)) as (importer, _):
        metrics.write_text(verl_lines(range(1, 4)))
        save("rollout_data/1.pt")
        save("train_data/1.pt")
        save("rollout_data/2.pt")
        assert [importer.look() for _ in range(3)] == [1, 0, 0]  # 2 waits
        save("train_data/2.pt")
        assert importer.look() == 2  # 3 has nothing to wait for
    assert rows(store, "SELECT step, count(*) FROM tokens GROUP BY step ORDER BY step") == [(1, 5), (2, 5)]
    assert series(store, "entropy").keys() == {1, 2, 3}
