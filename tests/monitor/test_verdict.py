"""The verdict: what it says, from which numbers, and that live and replayed say the same."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from monitor.alerts import AlertEngine, verdict
from monitor.alerts.judgement import measured_rates
from monitor.alerts.rules import RULES
from monitor.alerts.rules.outcome import DiversityLost
from monitor.recorder import Recorder
from monitor.records import StepRecord
from monitor.store.reader import open_store

N = 85
FALL = np.concatenate([np.full(25, 1.0), np.exp(-0.05 * np.arange(60))])  # to 0.052, from step 25 on 5 % a step
REWARD = np.linspace(0.1, 0.9, N)


def test_a_collapse_with_its_evidence() -> None:
    n = 60  # entropy exp(-0.05 * 34) = 0.183 at step 59, its median of five exp(-0.05 * 32) = 0.202
    found = verdict({"step": range(n), "entropy": FALL[:n], "reward": REWARD[:n]}, step_s=30.0, total_steps=100)
    assert (found.health, found.step, found.rules) == ("warning", 59, ("entropy_collapse",))
    by_kind = {clause.kind: clause for clause in found.clauses}
    # an exact line: ln(0.1 / 0.2019) / -0.05 = 14.05 steps, an interval of no width, 14.05 * 30 s = 7 min
    assert by_kind["floor"].text == "About 15 steps (95 % interval 15 to 15, 7 min) to its floor of 0.1."
    assert by_kind["floor"].value == pytest.approx(math.log(0.1 / math.exp(-0.05 * 32)) / -0.05)
    assert (by_kind["floor"].series, by_kind["floor"].first_step, by_kind["floor"].last_step) == ("entropy", 40, 59)
    first = by_kind["since"].first_step
    assert first is not None and first > 45
    assert by_kind["cost"].text.startswith(f"{59 - first} steps")
    assert by_kind["cost"].text.endswith("stopping now saves 41 steps (20 min).")  # 100 - 59, times 30 s
    assert found.sentence.startswith(f"Entropy is collapsing since step {first} (1 to 0.202), about 15 steps")
    assert found.sentence.endswith(f": {RULES['entropy_collapse'].cure}.")


def test_a_healthy_run_and_one_that_is_too_young() -> None:
    series = {"step": range(N), "entropy": np.full(N, 0.5), "reward": REWARD}
    found = verdict(series)
    assert (found.health, found.rules) == ("healthy", ())
    assert found.sentence.startswith("Nothing is wrong at step 84: reward 0.881 (")
    assert "entropy 0.5 (100% of its start)" in found.sentence
    young = verdict({key: list(column)[:12] for key, column in series.items()})
    assert (young.health, young.sentence) == (
        "too early", "Too early to judge: 12 rows, and a baseline takes 20 rows after 0 warm-up steps.",
    )  # fmt: skip
    assert verdict({"step": [], "entropy": []}).health == "too early"


def test_the_worst_alert_speaks_and_the_others_are_named() -> None:
    reward = np.concatenate([np.full(40, 0.8), np.linspace(0.8, 0.05, 45)])
    found = verdict({"step": range(N), "entropy": FALL, "reward": reward})
    assert found.health == "critical" and set(found.rules) == {"entropy_collapse", "reward_lost"}
    (also,) = [clause.text for clause in found.clauses if clause.kind == "also"]
    assert found.rules[1] in also
    assert found.as_dict()["clauses"][0]["kind"] == "since"  # JSON types only


@pytest.mark.parametrize(
    ("found_by", "series", "numbers", "value", "steps"),
    [
        ("evaluations", "eval/heldout/distinct", "distinct correct answers, heldout 9 to 4", 4.0, (0, 90)),
        ("rollouts", "same_answer_share", "same correct answer 0% to 30%", 0.3, (60, 99)),
        ("texts", "duplicate_share", "same text 0% to 30%", 0.3, (60, 99)),
    ],
)
def test_a_clause_names_the_series_that_the_finding_came_from(
    found_by: str, series: str, numbers: str, value: float, steps: tuple[int, int]
) -> None:
    """Distinct answers 4 7 9 9 8 7 6 5 4 4: means of two peak at 9, the last is 4. Same answers: 0, later 0.3."""
    distinct = [None] * 100
    distinct[::10] = [4, 7, 9, 9, 8, 7, 6, 5, 4, 4] if found_by == "evaluations" else [9] * 10
    same = np.where(np.arange(100) < 50, 0.0, 0.1 if found_by == "evaluations" else 0.3)
    told = "duplicate_share" if found_by == "texts" else "same_answer_share"
    columns = {"reward": np.full(100, 0.5), told: same, "eval/heldout/distinct": distinct}
    found = verdict({"step": range(100), **columns}, rules=[DiversityLost(for_rows=1)])
    by_kind = {clause.kind: clause for clause in found.clauses}
    what, since = by_kind["what"], by_kind["since"]
    assert (what.series, what.first_step, what.last_step, what.value) == (series, *steps, pytest.approx(value))
    assert (since.series, since.value) == (series, pytest.approx(value))
    assert f" ({numbers}): " in found.sentence


def test_live_and_replayed_verdicts_are_one() -> None:
    engine = AlertEngine(total_steps=200)
    for step in range(N):
        engine.observe(step, {"entropy": FALL[step], "reward": REWARD[step], "perf/step_s": 1.0})
        series = {"step": range(step + 1), "entropy": FALL[: step + 1], "reward": REWARD[: step + 1]}
        if step % 7 == 0:
            assert engine.verdict(2.0) == verdict(series, step_s=2.0, total_steps=200)


def test_the_recorder_keeps_the_sentence_as_an_event(tmp_path: Path) -> None:
    with Recorder(tmp_path, "fall", engine=AlertEngine()) as recorder:
        for step in range(N):
            recorder.record(StepRecord(step, {"entropy": float(FALL[step]), "reward": float(REWARD[step])}))
    with open_store(tmp_path) as opened:
        rows = opened.sql("SELECT step, message FROM events WHERE kind = 'verdict' ORDER BY ts").rows
    # the first as soon as a baseline of 20 rows is complete, the second when the alert fires
    assert rows[0][0] == 19 and rows[0][1].startswith("healthy: Nothing is wrong at step 19")
    assert rows[1][1].startswith("warning: Entropy is collapsing since step ")
    assert rows[-1][0] == N - 1 and "at its floor of 0.1" in rows[-1][1]  # said again at the end


def test_an_engine_that_cannot_judge_costs_nothing(tmp_path: Path) -> None:
    class Silent:
        def observe(self, step: int, scalars: object) -> list[object]:
            return []

    with Recorder(tmp_path, "r", engine=Silent()) as recorder:  # type: ignore[arg-type]
        recorder.record(StepRecord(0, {"entropy": 1.0}))
    with open_store(tmp_path) as opened:
        assert opened.sql("SELECT count(*) FROM events WHERE kind = 'verdict'").rows == [(0,)]


def test_the_measured_rates_are_of_known_rules() -> None:
    rates = measured_rates()
    assert set(rates) <= set(RULES)
    assert all(0 <= rate["bad"] <= rate["fired"] for rate in rates.values())
