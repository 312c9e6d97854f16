"""Every question against a store whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from store_data import histogram, samples, tokens

from monitor.alerts.watch import Watcher
from monitor.commands import ls, show
from monitor.metrics import EDGES_IDS, inner_edges, n_cells
from monitor.queries.alerts import alert_log, alert_spans, alert_transitions, events, verdict_texts, verdicts
from monitor.queries.differences import config_difference, difference_of, final_figures, setting
from monitor.queries.distributions import count_matrix, joint_counts, quantile_series
from monitor.queries.followed import Followed
from monitor.queries.frames import MAX_POINTS, n_rows, select
from monitor.queries.rollouts import samples_of_step, tokens_of_step
from monitor.queries.series import latest_scalars, run_spans, scalar_series, series_of, value_at
from monitor.recorder import Recorder
from monitor.records import Alert, Histogram, RunInfo, StepRecord, quantiles_from_counts
from monitor.store.reader import open_store
from monitor.store.tail import Tail

STEPS = 12
JOINT = np.zeros((26, 26), np.int64)
JOINT[2, 5] = 7


class Scripted:
    """Fires at step 3, turns critical at 5, resolves at 8; another rule only ever waits."""

    script = {  # noqa: RUF012
        2: ("pending", "warning"),
        3: ("firing", "warning"),
        5: ("firing", "critical"),
        8: ("resolved", "critical"),
    }

    def observe(self, step, scalars):
        if step not in self.script:
            return []
        state, severity = self.script[step]
        first = 2 if state == "pending" else 3
        return [Alert("entropy_collapse", severity, state, step, first, 0.1 * step, 1.0, 0.3, f"at {step}", "act")]


def values(run: str, step: int) -> np.ndarray:
    return np.random.default_rng([len(run), step]).exponential(0.3, 200)


@pytest.fixture(scope="module")
def tail(tmp_path_factory) -> Tail:
    store: Path = tmp_path_factory.mktemp("store")
    for run, engine in (("uniform", Scripted()), ("weighted", None)):
        with Recorder(store, RunInfo(name=run), engine=engine) as recorder:
            for step in range(1, STEPS + 1):
                scalars = {"reward": step / 10, "kl": float("nan") if step == 4 else 0.1}
                if step % 4 == 0:
                    scalars["eval/heldout/pass@1"] = step / (20 if run == "uniform" else 40)
                histograms = (
                    histogram(values(run, step)),
                    Histogram("entropy*deviation", "all", "nats24*deviation24", JOINT.ravel(), 7),
                )
                recorder.record(StepRecord(step, scalars, histograms), tokens(step), samples(step))
            recorder.event("checkpoint", "saved", STEPS)
    tail = Tail(store)
    tail.poll()
    return tail


def test_run_spans(tail: Tail) -> None:
    rows = run_spans(tail.cursor())
    assert list(rows["run"]) == ["uniform", "weighted"]
    assert list(rows["first_step"]) == [1, 1] and list(rows["last_step"]) == [STEPS, STEPS]


def test_scalar_series_of_two_runs(tail: Tail) -> None:
    rows = scalar_series(tail.cursor(), ["uniform", "weighted"], ["reward", "kl"])
    steps, reward = series_of(rows, "weighted", "reward")
    np.testing.assert_array_equal(steps, np.arange(1, STEPS + 1))
    np.testing.assert_allclose(reward, steps / 10)
    _, kl = series_of(rows, "uniform", "kl")
    assert np.isnan(kl[3]) and np.isfinite(np.delete(kl, 3)).all()


def test_long_series_keep_extremes_and_ends(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    series = rng.normal(size=5000)
    series[1234], series[4321] = 50.0, -50.0
    with Recorder(tmp_path, RunInfo(name="long"), queue_steps=10**5) as recorder:
        for step, value in enumerate(series):
            recorder.record(StepRecord(step, {"reward": float(value), "lr": 1.0}))
    tail = Tail(tmp_path)
    tail.poll()
    rows = scalar_series(tail.cursor(), ["long"], ["reward", "lr"])
    steps, kept = series_of(rows, "long", "reward")
    assert 600 < len(steps) <= MAX_POINTS
    assert steps[-1] == 4999 and 1234 in steps and 4321 in steps
    np.testing.assert_array_equal(kept, series[steps])
    assert len(series_of(rows, "long", "lr")[0]) <= MAX_POINTS, "ties must not multiply points"


def test_latest_scalars(tail: Tail) -> None:
    rows = latest_scalars(tail.cursor(), ["uniform"])
    assert value_at(rows, "uniform", "reward") == pytest.approx(1.2)
    assert value_at(rows, "uniform", "eval/heldout/pass@1") == pytest.approx(0.6)
    assert np.isnan(value_at(rows, "uniform", "loss"))


@pytest.mark.parametrize("edges_id", [edges_id for edges_id in EDGES_IDS if edges_id != "probability20"])
def test_quantiles_of_many_rows_equal_those_of_one(edges_id: str) -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 5, (20, n_cells(edges_id))) * (rng.random((20, n_cells(edges_id))) < 0.2)
    counts[3] = 0
    low = np.full(20, float(inner_edges(edges_id)[0]) - 0.5)
    high = np.full(20, float(inner_edges(edges_id)[-1]) + 0.5)
    qs = [0.0, 0.05, 0.5, 0.99, 1.0]
    many = quantiles_from_counts(counts, edges_id, qs, low=low, high=high)
    for row in range(20):
        one = quantiles_from_counts(counts[row], edges_id, qs, low=low[row], high=high[row])
        np.testing.assert_allclose(many[row], one, rtol=1e-12)


def test_quantile_series(tail: Tail) -> None:
    fan = quantile_series(tail.cursor(), "uniform", "entropy")
    np.testing.assert_array_equal(fan["step"], np.arange(1, STEPS + 1))
    for i, step in enumerate(fan["step"]):
        data = values("uniform", int(step))
        assert fan["mean"][i] == pytest.approx(data.mean(), rel=1e-5)
        assert fan["p50"][i] == pytest.approx(np.median(data), rel=0.13)
        assert fan["p99"][i] == pytest.approx(np.quantile(data, 0.99), rel=0.2)
    assert not len(quantile_series(tail.cursor(), "uniform", "surprisal")["step"])


@pytest.mark.parametrize("columns", [1, 5, 7, 12, 100])
def test_pooled_columns_lose_no_token(tail: Tail, columns: int) -> None:
    matrix = count_matrix(tail.cursor(), "uniform", "entropy", max_columns=columns)
    assert columns / 2 < len(matrix["step"]) <= columns or len(matrix["step"]) == STEPS
    assert matrix["counts"].sum() == 200 * STEPS == matrix["n"].sum()
    assert matrix["step"][0] == 1 and matrix["last_step"][-1] == STEPS
    np.testing.assert_array_equal(matrix["step"][1:], matrix["last_step"][:-1] + 1)


def test_joint_counts_are_row_major(tail: Tail) -> None:
    np.testing.assert_array_equal(joint_counts(tail.cursor(), "uniform"), STEPS * JOINT)
    np.testing.assert_array_equal(joint_counts(tail.cursor(), "uniform", after=STEPS - 3), 3 * JOINT)
    assert joint_counts(tail.cursor(), "nobody").size == 0


def test_alert_spans(tail: Tail) -> None:
    log = alert_log(tail.cursor(), ["uniform", "weighted"])
    assert list(log["state"]) == ["pending", "firing", "firing", "resolved"]
    spans = alert_spans(log)
    assert n_rows(spans) == 1
    assert spans["first_step"][0] == 3 and spans["end_step"][0] == 8
    assert spans["severity"][0] == "critical" and spans["worst_step"][0] == 5
    still = alert_spans(select(log, log["state"] != "resolved"))
    assert np.isnan(still["end_step"][0])


def test_alert_transitions_keep_their_own_numbers(tail: Tail) -> None:
    rows = alert_transitions(alert_log(tail.cursor(), ["uniform", "weighted"]))
    assert list(rows["state"]) == ["firing", "firing", "resolved"]  # the pending one is none of them
    assert list(rows["severity"]) == ["warning", "critical", "critical"]
    assert list(rows["step"]) == [3, 5, 8] and list(rows["first_step"]) == [3, 3, 3]
    np.testing.assert_array_equal(rows["until"], [5, 8, np.nan])
    np.testing.assert_allclose(rows["value"], [0.3, 0.5, 0.8])  # 0.1 of the step
    assert list(rows["message"]) == ["at 3", "at 5", "at 8"]
    none = alert_transitions(alert_log(tail.cursor(), ["nobody"]))
    assert n_rows(none) == 0 and set(none) == set(rows)


def test_the_newest_verdict_of_a_run_is_the_one_to_show(tmp_path: Path) -> None:
    with Recorder(tmp_path, RunInfo(name="told"), engine=Scripted()) as recorder:
        for step in range(1, 7):
            recorder.record(StepRecord(step, {"entropy": 0.5}))
        recorder.event("verdict", "warning: It falls: act.", 3)
        recorder.event("verdict", "too early: Wait:\nit is early.", 5)
        recorder.event("verdict", "worse: no health of ours", 6)
        recorder.event("note", "critical: no verdict", 6)
    with Recorder(tmp_path, RunInfo(name="older"), engine=Scripted()) as recorder:  # which noted no verdicts
        for step in range(1, 7):
            recorder.record(StepRecord(step, {"entropy": 0.5}))
    with Recorder(tmp_path, RunInfo(name="over"), engine=Scripted()) as recorder:  # its alert resolved at step 8
        for step in range(1, 9):
            recorder.record(StepRecord(step, {"entropy": 0.5}))
    tail = Tail(tmp_path)
    tail.poll()
    rows = verdicts(tail.cursor(), ["told", "older", "over", "nobody"])
    assert list(rows["run"]) == ["older", "told"]
    assert list(rows["health"]) == ["critical", "too early"]
    assert list(rows["sentence"]) == ["at 5", "Wait:\nit is early."]
    assert list(rows["step"]) == [5, 5]
    assert n_rows(verdicts(tail.cursor(), ["over"])) == 0
    tail.close()
    texts = {"older": "critical: at 5", "told": "too early: Wait:\nit is early."}
    watcher = Watcher(tmp_path)
    watcher.poll()
    with open_store(tmp_path) as opened:  # every command says the same
        assert verdict_texts(opened, ["told", "older", "over", "nobody"]) == texts
        assert verdict_texts(opened, []) == {}
        for run in ("told", "older", "over"):
            listed = {row["run"]: row["verdict"] for row in ls.rows(opened)}
            assert listed[run] == show.describe(opened, run)["verdict"] == watcher.verdict(run) == texts.get(run)
    watcher.close()


def test_events(tail: Tail) -> None:
    rows = events(tail.cursor(), ["uniform"])
    assert "checkpoint" in rows["kind"]
    assert rows["step"][list(rows["kind"]).index("checkpoint")] == STEPS
    assert np.isnan(rows["step"][list(rows["kind"]).index("attempt")])


def test_samples_and_tokens_of_a_step(tail: Tail) -> None:
    rows = samples_of_step(tail.cursor(), tail.files("uniform", "samples", 5), 5)
    expected = samples(5)
    assert list(rows["prompt"]) == expected.prompt
    assert [list(texts) for texts in rows["token_texts"]] == expected.token_texts
    np.testing.assert_array_equal(rows["reward"], expected.reward)
    got = tokens_of_step(tail.cursor(), tail.files("uniform", "tokens", 5), 5, [2, 6])
    table = tokens(5)
    mask = np.isin(table.sample, [2, 6])
    np.testing.assert_array_equal(got["entropy"], table.entropy[mask])
    np.testing.assert_array_equal(got["weight"], table.weight[mask])
    assert tokens_of_step(tail.cursor(), [], 5, [2]) == {}
    assert tail.files("uniform", "tokens", STEPS + 1) == []


def test_difference_is_signed_and_sums_to_zero(tail: Tail) -> None:
    runs = (Followed(name) for name in ("uniform", "weighted", "nobody"))
    uniform, weighted, nobody = (run.counts(tail.cursor(), "entropy", "all") for run in runs)
    gap = difference_of([uniform], [weighted])
    np.testing.assert_allclose(gap["difference"].sum(1), 0.0, atol=1e-12)
    first = histogram(values("weighted", 1)).counts / 200 - histogram(values("uniform", 1)).counts / 200
    np.testing.assert_allclose(gap["difference"][0], first, atol=1e-12)
    pooled = difference_of([uniform], [weighted], max_columns=3)
    np.testing.assert_allclose(pooled["difference"][0], gap["difference"][:4].mean(0), atol=1e-12)
    assert not len(difference_of([uniform], [nobody])["step"])
    # of two equal runs and one that differs, the mean of the arm differs by half
    np.testing.assert_allclose(
        difference_of([uniform], [uniform, weighted])["difference"], gap["difference"] / 2, atol=1e-12
    )


def test_final_figures_at_equal_level(tail: Tail) -> None:
    found = final_figures(tail.cursor(), ["uniform", "weighted"], ["reward"])
    assert found["last"]["uniform"]["reward"] == pytest.approx(1.2)
    assert found["level"] == pytest.approx(0.3)  # the weighted run's best
    # uniform evaluates 0.2, 0.4, 0.6 at steps 4, 8, 12: it crosses 0.3 half-way from 4 to 8, where reward is 0.6
    assert found["equal"]["uniform"]["step"] == pytest.approx(6) and found["equal"]["weighted"]["step"] == 12
    assert found["equal"]["uniform"]["reward"] == pytest.approx(0.6)
    assert final_figures(tail.cursor(), ["uniform", "nobody"], ["reward"])["equal"] == {}


def test_a_setting_is_found_whatever_else_a_trainer_stores() -> None:
    config = {"eval": {"k": 4, "on": True}, "steps": "many", "weighting": None}
    assert setting(config, "eval.k", int) == 4
    wrong = [
        (config, "eval.on"),
        (config, "steps"),
        (config, "weighting.k"),
        (config, "eval.k.x"),
        (None, "a"),
        (3, "a"),
    ]
    assert [setting(of, option, int) for of, option in wrong] == [None] * 6


def test_config_difference() -> None:
    configs = {
        "a": {"lr": 1, "weighting": {"kind": "uniform"}},
        "b": {"lr": 1, "weighting": {"kind": "ict", "keep": 0.1}},
    }
    assert config_difference(configs) == {
        "weighting.keep": {"a": "", "b": 0.1},
        "weighting.kind": {"a": "uniform", "b": "ict"},
    }
    assert config_difference({"a": {}, "b": {}}) == {}
