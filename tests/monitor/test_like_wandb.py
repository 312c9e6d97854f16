"""`import rlvr_monitor.wandb as wandb`: what code that logs to W&B calls, and what is recorded of it."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlvr_monitor
from monitor.errors import StoreError
from monitor.integrations.like_wandb import rows as rows_module
from monitor.integrations.like_wandb.names import Names
from monitor.store.runs import safe_name


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Our module, whose store is tmp_path/runs."""
    import rlvr_monitor.wandb as module

    for name in [name for name in os.environ if name.startswith(("WANDB_", "RLVR_RUN", "RLVR_TAP"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RLVR_STORE", str(tmp_path / "runs"))
    yield module
    module.finish()


def ask(tmp_path: Path, query: str) -> list[tuple[Any, ...]]:
    with rlvr_monitor.open_store(tmp_path / "runs") as opened:
        return list(opened.sql(query).rows)


def series(tmp_path: Path, run: str = "mine") -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    query = f"SELECT name, step, value FROM steps WHERE run = '{run}' AND name NOT LIKE 'perf/queue' ORDER BY step"
    for name, step, value in ask(tmp_path, query):
        found.setdefault(name, {})[step] = value
    return found


def events(tmp_path: Path, kind: str, run: str = "mine") -> list[str]:
    return [text for (text,) in ask(tmp_path, f"SELECT message FROM events WHERE kind = '{kind}' AND run = '{run}'")]


def info(tmp_path: Path, run: str = "mine") -> dict[str, Any]:
    return json.loads((tmp_path / "runs/runs" / run / "run.json").read_text())


def status(tmp_path: Path, run: str = "mine") -> str:
    with rlvr_monitor.open_store(tmp_path / "runs") as opened:
        return opened.run(run).status


def test_rows_are_counted_added_up_and_committed_as_w_and_b_does(wandb, tmp_path):
    wandb.init(name="mine")
    wandb.log({"a": 1.0})  # row 0
    wandb.log({"a": 2.0}, commit=False)
    wandb.log({"b": 3.0})  # both are row 1
    wandb.log({"a": 4.0}, step=5)
    wandb.log({"b": 5.0, "a": 4.5}, step=5)  # the same row; the later value counts
    wandb.log({"a": 9.0}, step=3)  # goes back: ignored
    wandb.log({"a": 6.0}, step=6, commit=True)  # the next row is 7
    wandb.log({"a": 7.0})
    wandb.log({"c": 8.0}, commit=False)  # finish commits it
    wandb.finish()
    assert series(tmp_path) == {
        "a": {0: 1.0, 1: 2.0, 5: 4.5, 6: 6.0, 7: 7.0},
        "b": {1: 3.0, 5: 5.0},
        "c": {8: 8.0},
    }
    assert events(tmp_path, "log_step") == ["Step 3 was logged after step 5: steps must not go back."]
    assert status(tmp_path) == "finished" and wandb.run is None


def test_known_names_get_their_keys_and_others_keep_their_own(wandb, tmp_path):
    wandb.init(name="mine")
    for step in (10, 20):
        wandb.log({
            "train/reward": step / 10, "actor/entropy": 0.5, "loss/entropy_bonus": 7.0, "my/own": np.float32(1.5),
            "flag": True, "nested": {"a": {"b": 2}}, "none": None, "text": "words", "val": np.array([3.0]),
            "train/global_step": step,
        })  # fmt: skip
    wandb.finish()
    assert series(tmp_path) == {
        "reward": {10: 1.0, 20: 2.0}, "entropy": {10: 0.5, 20: 0.5}, "loss/entropy_bonus": {10: 7.0, 20: 7.0},
        "my/own": {10: 1.5, 20: 1.5}, "flag": {10: 1.0, 20: 1.0}, "nested.a.b": {10: 2.0, 20: 2.0},
        "val": {10: 3.0, 20: 3.0},
    }  # fmt: skip
    assert events(tmp_path, "left_out") == ["'text' is a str: not recorded."]  # once


def test_the_step_is_the_callers_own_then_a_column_then_the_step_before(wandb, tmp_path):
    wandb.init(name="mine")
    wandb.define_metric("tokens_seen")
    wandb.define_metric("eval/*", step_metric="tokens_seen")
    wandb.log({"train/loss": 1.0, "train/global_step": 100})
    wandb.log({"note": 1.0})  # belongs to 100
    wandb.log({"eval/score": 0.5, "tokens_seen": 150.0, "train/global_step": 3})
    wandb.log({"train/loss": 0.5, "global_step": 200, "epoch": 1.25})
    wandb.finish()
    assert series(tmp_path) == {
        "loss": {100: 1.0, 200: 0.5}, "note": {100: 1.0}, "eval/score": {150: 0.5}, "epoch": {200: 1.25}
    }  # fmt: skip


def test_rows_before_the_first_step_wait_for_it_where_there_will_be_one(wandb, tmp_path):
    wandb.init(name="mine")
    wandb.define_metric("train/global_step")
    wandb.define_metric("*", step_metric="train/global_step", step_sync=True)
    for value in (1.0, 2.0, 3.0):
        wandb.log({"profiling/x": value})
    wandb.log({"train/loss": 0.5, "train/global_step": 1})
    wandb.finish()
    assert series(tmp_path) == {"profiling/x": {1: 3.0}, "loss": {1: 0.5}}


def test_two_names_for_a_key_are_told_and_never_mixed():
    said: list[str] = []
    names = Names(said.append)
    names.see(["critic/rewards/mean"])
    names.see(["critic/score/mean"])  # stands above it in the table of verl, but came later
    names.see(["reward", "x"])
    assert [names[name] for name in ("critic/rewards/mean", "critic/score/mean", "reward", "x")] == [
        "reward", "critic/score/mean", None, "x"
    ]  # fmt: skip
    assert said == ["'reward' is left out: the key 'reward' is taken by 'critic/rewards/mean'."]
    said.clear()
    names = Names(said.append)  # both of one trainer in a row: the upper one of its table
    names.see(["critic/rewards/mean", "critic/score/mean"])
    assert (names["critic/score/mean"], names["critic/rewards/mean"]) == ("reward", "critic/rewards/mean")
    names = Names(said.append)
    names.see(["actor/lr", "learning_rate", "other"])  # of two trainers: the first
    assert (names["actor/lr"], names["learning_rate"], names["other"]) == ("lr", "learning_rate", "other")
    assert said == []


def test_the_configuration_is_that_of_the_first_row_and_later_changes_are_events(wandb, tmp_path):
    run = wandb.init(project="p", entity="me", group="g", tags=["t"], name="mine",
                     config=argparse.Namespace(lr=0.1, seed=7), config_exclude_keys=["nothing"])  # fmt: skip
    wandb.config.update({"model_name_or_path": "tiny", "lr": 0.2}, allow_val_change=True)
    wandb.config["depth"] = 3
    wandb.config.width = 5
    run.config.setdefaults({"lr": 9, "late": 1})
    assert (wandb.config.lr, wandb.config.get("depth"), wandb.config["width"], "late" in wandb.config) == (
        0.2,
        3,
        5,
        True,
    )
    assert copy.deepcopy(wandb.config) == dict(wandb.config)
    with pytest.raises(AttributeError, match="config has no key 'nothing'"):
        _ = wandb.config.nothing
    wandb.log({"x": 1})
    run.log({"x": 2})  # the first row is recorded
    wandb.config.update({"after": 4})
    wandb.finish()
    found = info(tmp_path)
    assert found["config"] == {
        "lr": 0.2, "seed": 7, "model_name_or_path": "tiny", "depth": 3, "width": 5, "late": 1
    }  # fmt: skip
    assert (found["seed"], found["model"], found["weighting"]) == (7, "tiny", "")  # nobody told a weighting
    about = found["environment"]["wandb"]
    assert (about["project"], about["entity"], about["group"], about["tags"]) == ("p", "me", "g", ["t"])
    assert about["id"] == run.id and len(run.id) == 8
    assert events(tmp_path, "config") == ['{"after": 4}']


def test_run_has_a_name_an_id_an_address_and_a_folder(wandb, tmp_path):
    assert wandb.run is None
    run = wandb.init(project="My project", name="first run!")
    assert wandb.run is run and run.name == "first-run" and run.path == f"My project/{run.id}"
    assert run.url == (tmp_path / "runs/runs/first-run").as_uri()
    (Path(run.dir) / "note.txt").write_text("mine")
    assert (tmp_path / "runs.files/first-run/note.txt").exists()
    assert wandb.init(config={"a": 1}) is run  # without reinit the run that is there
    second = wandb.init(name="first run!", reinit=True)
    assert second is not run and second.name == "first-run-2"  # the first has ended, and is a run without steps
    wandb.finish()


def test_a_name_that_is_there_gets_a_number(wandb, tmp_path):
    for expected in ("mine", "mine-2", "mine-3"):
        assert wandb.init(name="mine").name == expected
        wandb.log({"x": 1.0})
        wandb.finish()
    assert {run for (run,) in ask(tmp_path, "SELECT DISTINCT run FROM steps")} == {"mine", "mine-2", "mine-3"}
    assert safe_name("...") == "run" and safe_name("a/b:c") == "a-b-c"


def test_resume_goes_on_with_the_run_of_an_id(wandb, tmp_path):
    wandb.init(name="mine", id="abc")
    for value in (1.0, 2.0):
        wandb.log({"x": value})
    wandb.finish()
    with pytest.raises(wandb.errors.UsageError, match=r"'abc' exists in store .* and resume is 'never'"):
        wandb.init(id="abc", resume="never")
    with pytest.raises(wandb.UsageError, match=r"'new' is not in store .* and resume is 'must'"):
        wandb.init(id="new", resume="must")
    run = wandb.init(id="abc", resume="allow")
    assert (run.name, run.resumed, run.step) == ("mine", True, 2)
    wandb.log({"x": 3.0})
    wandb.finish()
    assert series(tmp_path) == {"x": {0: 1.0, 1: 2.0, 2: 3.0}}
    assert ask(tmp_path, "SELECT DISTINCT attempt FROM steps ORDER BY 1") == [(1,), (2,)]


@pytest.mark.parametrize("how", ["argument", "environment", "settings"])
def test_disabled_records_nothing(wandb, tmp_path, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    run = wandb.init(mode="disabled" if how == "argument" else None,
                     settings=wandb.Settings(mode="disabled") if how == "settings" else None)  # fmt: skip
    wandb.log({"x": 1.0})
    wandb.alert("title")
    wandb.finish()
    assert run.disabled and not (tmp_path / "runs").exists()


def test_offline_is_recorded_like_online_and_other_modes_are_refused(wandb, tmp_path):
    wandb.init(name="mine", mode="offline")
    wandb.log({"x": 1.0})
    wandb.finish()
    assert series(tmp_path) == {"x": {0: 1.0}}
    with pytest.raises(wandb.UsageError, match="mode is 'dryest', expected one of online, offline"):
        wandb.init(mode="dryest")


def test_histograms_of_known_metrics_and_tables_of_rollouts_are_recorded(wandb, tmp_path):
    wandb.init(name="mine")
    values = [0.0, 0.5, 0.5, 2.0, math.nan]
    table = wandb.Table(columns=["step", "prompt", "completion", "reward", "advantage"])
    for row in ((1, "old", "x", 0.0, 0.0), (2, "a", "yes", 1.0, 0.5), (2, "a", "no", 0.0, -0.5), (2, "b", "?", 0.5, 0)):
        table.add_data(*row)
    with pytest.raises(ValueError, match="The row has 1 values, expected 5"):
        table.add_data(1)
    wandb.log({"entropy": wandb.Histogram(values), "mine": wandb.Histogram(values), "completions": table}, step=2)
    wandb.log({"image": wandb.Image("x.png"), "other": wandb.Table(columns=["a"], data=[[1]])}, step=3)
    wandb.finish()
    ((n, bad, total, low, high, counts),) = ask(
        tmp_path, "SELECT n, n_nonfinite, sum, min, max, counts FROM histograms WHERE metric = 'entropy'"
    )
    assert (n, bad, total, low, high, sum(counts), counts[0]) == (4, 1, 3.0, 0.0, 2.0, 4, 1)
    rows = ask(tmp_path, "SELECT step, sample, group_id, prompt, completion, reward, correct, advantage FROM samples "
               "ORDER BY sample")  # fmt: skip
    assert rows == [
        (2, 0, 0, "a", "yes", 1.0, True, 0.5), (2, 1, 0, "a", "no", 0.0, False, -0.5),
        (2, 2, 1, "b", "?", 0.5, False, 0)
    ]  # fmt: skip
    assert events(tmp_path, "left_out") == [
        "'mine' is a Histogram: not recorded.", "wandb.Image does nothing here.", "'image' is a Nothing: not recorded.",
        "'other' is a Table: not recorded.",
    ]  # fmt: skip
    made = wandb.Histogram(np_histogram=([1, 2], [0.0, 1.0, 2.0]))
    assert (made.histogram, made.bins) == ([1, 2], [0.0, 1.0, 2.0])


def test_alerts_and_what_the_caller_sums_up_are_events(wandb, tmp_path):
    run = wandb.init(name="mine")
    wandb.alert(title="Low", text="it fell", level=wandb.AlertLevel.WARN)
    wandb.log({"x": 1.0, "y": 2.0})
    assert (run.summary["x"], wandb.summary["y"]) == (1.0, 2.0)
    run.summary["best"] = 9
    run.summary.update({"x": 5.0})
    wandb.log({"x": 2.0})
    assert run.summary.x == 5.0  # what the caller set stays
    wandb.finish(exit_code=3)
    assert events(tmp_path, "alert") == ["WARN: Low: it fell"]
    assert [json.loads(text) for text in events(tmp_path, "summary")] == [{"best": 9, "x": 5.0}]
    assert status(tmp_path) == "failed"


def test_our_alerts_fire_on_what_is_logged(wandb, tmp_path):
    wandb.init(name="mine")
    for step in range(1, 81):
        entropy = 1.0 if step <= 30 else max(0.01, 1 - (step - 30) / 20)
        wandb.log({"actor/entropy": entropy, "critic/score/mean": 0.5}, step=step)
    wandb.finish()
    rules = {rule for (rule,) in ask(tmp_path, "SELECT rule FROM alerts WHERE state = 'firing'")}
    assert "entropy_collapse" in rules


def test_the_rest_is_there_does_nothing_and_says_so_once(wandb, tmp_path):
    run = wandb.init(name="mine")
    artifact = wandb.Artifact(name="model", type="model", metadata={})
    with artifact.new_file("a.txt", mode="wb") as file:
        file.write(b"abc")
    for _ in range(2):
        assert not run.log_artifact(artifact, aliases=["x"])
        wandb.watch(object(), log="all")
        wandb.plot.line_series([1], [2])
        wandb.save("x")
    assert wandb.login(key="k") is True and wandb.api.api_key and wandb.Api() is not None
    assert list(wandb.Api().runs("x")) == [] and not wandb.sweep_id
    wandb.log({"x": 1.0})
    wandb.finish()
    said = events(tmp_path, "left_out")
    assert len(said) == len(set(said)) and "wandb.watch does nothing here." in said
    assert "wandb.plot.line_series does nothing here." in said and "run.log_artifact does nothing here." in said
    with pytest.raises(wandb.Error, match=r"You must call wandb\.init\(\) before wandb\.log\(\)"):
        wandb.log({"x": 1})
    assert not hasattr(wandb, "__nothing__") and wandb.util.generate_id() != wandb.util.generate_id()


def test_a_step_that_gets_nothing_more_is_recorded_before_the_next_begins(wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "SETTLE_S", 0.2)
    run = wandb.init(name="mine")
    wandb.log({"x": 1.0}, step=4)
    for _ in range(100):
        if run._recorder is not None and run._recorder.acknowledged == 4:
            break
        time.sleep(0.1)
    assert series(tmp_path) == {"x": {4: 1.0}}
    wandb.log({"x": 2.0, "y": 3.0}, step=4)  # too late for x, whose value stands; y is added
    wandb.finish()
    assert series(tmp_path) == {"x": {4: 1.0}, "y": {4: 3.0}}


def test_a_store_that_cannot_be_written_is_told(wandb, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLVR_STORE", str(tmp_path / "file"))
    wandb.init(name="mine")
    with pytest.raises(StoreError, match="is a file, expected a folder"):
        wandb.log({"x": 1.0})
    wandb.run.disabled = True
    wandb.finish()
    monkeypatch.setenv("RLVR_TAP", "alone")  # the command of `rlvr tap` goes on
    wandb.init(name="mine")
    wandb.log({"x": 1.0})
    assert "The run goes on and is not recorded." in capsys.readouterr().err


@pytest.mark.parametrize(("end", "expected"), [("", "finished"), ("raise ValueError('bad')", "failed")])
def test_the_end_of_the_process_ends_the_run(tmp_path, end, expected):
    script = (
        "import rlvr_monitor.wandb as wandb\n"
        f"wandb.init(name='mine')\nwandb.log({{'x': 1.0}})\nwandb.log({{'x': 2.0}}, step=5)\n{end}\n"
    )
    environment = os.environ | {"RLVR_STORE": str(tmp_path / "runs")}
    subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, env=environment)
    assert status(tmp_path) == expected and series(tmp_path) == {"x": {0: 1.0, 5: 2.0}}
