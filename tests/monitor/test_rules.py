"""Each alert rule beyond those on the entropy: where it fires, where it must not, and with which numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from monitor.alerts import DEFAULT_RULES, RULES, AlertEngine, replay
from monitor.alerts.rules import Rule
from monitor.alerts.rules.outcome import DiversityLost, NoLearningSignal, RewardLost
from monitor.alerts.rules.selection import BlindSelection
from monitor.alerts.rules.shape import Forgetting
from monitor.alerts.rules.text import Repetition, TruncationRunaway
from monitor.alerts.rules.update import ClipSaturation, GradientSpikes, KlRunaway, NonfiniteLoss, SamplerMismatch
from monitor.metrics import metric
from monitor.records import Alert

CORPUS = Path(__file__).parents[2] / "sample_runs" / "corpus" / "test-series.parquet"


def noisy(values: np.ndarray, scale: float = 0.02, seed: int = 0) -> np.ndarray:
    return values + scale * np.random.default_rng(seed).standard_normal(len(values))


def firings(rule: Any, n: int = 100, **columns: Any) -> list[Alert]:
    series = {key.replace("__", "/").replace("_at_", "@"): column for key, column in columns.items()}
    return [a for a in replay({"step": np.arange(n), **series}, rules=[rule]) if a.state == "firing"]


def line(*points: tuple[int, float], n: int = 100) -> np.ndarray:
    """A curve through (step, value) points, straight between them."""
    return np.interp(np.arange(n), *zip(*points, strict=True))


@pytest.mark.parametrize("rule", DEFAULT_RULES, ids=lambda rule: rule.name)
def test_a_rule_names_known_series_and_explains_itself(rule: Any) -> None:
    for key in (*rule.needs, *rule.uses, rule.watches):
        metric(key)
    assert rule.watches in (*rule.needs, *rule.uses)
    assert (
        RULES[rule.name] is type(rule)
        and rule.says
        and rule.cure
        and (type(rule).__doc__ or "").endswith((".", "\n    "))
    )
    assert all(field.description for field in type(rule).model_fields.values())


def test_thresholds_are_checked() -> None:
    with pytest.raises(ValidationError, match="less than 1"):
        RewardLost(share=1.5)
    with pytest.raises(ValidationError, match="Extra inputs"):
        RewardLost(shares=0.5)  # type: ignore[call-arg]


def test_reward_that_is_lost_while_the_entropy_is_flat() -> None:
    reward = noisy(line((0, 0.2), (30, 0.6), (50, 0.6), (80, 0.1)))
    first, *worse = firings(RewardLost(), reward=reward, entropy=np.full(100, 0.45))
    assert first.severity == "warning" and 55 <= first.step <= 70
    assert first.baseline == pytest.approx(0.6, abs=0.03)  # the mean of its best ten rows
    assert first.value == pytest.approx(reward[first.step - 7 : first.step + 1].mean())  # of the last eight
    assert "Entropy hardly shows it: 0.45 nat, 100% of its baseline." in first.message
    assert [a.severity for a in worse] == ["critical"] and worse[0].value <= 0.5 * worse[0].baseline


@pytest.mark.parametrize(
    "reward",
    [
        noisy(line((0, 0.2), (99, 0.8)), 0.05),  # it climbs
        noisy(np.full(100, 0.5), 0.1),  # it is flat and noisy
        noisy(line((0, 0.5), (99, 0.45)), 0.05),  # it loses a tenth
        np.where(np.arange(100) % 25 == 0, 0.0, 0.6),  # single bad steps
        np.zeros(100),  # there never was any
    ],
)
def test_reward_that_is_not_lost(reward: np.ndarray) -> None:
    assert firings(RewardLost(), reward=reward) == []


def test_a_reward_below_zero_is_judged_by_its_noise_alone() -> None:
    assert firings(RewardLost(), reward=noisy(np.full(100, -0.5), 0.1)) == []
    (alert,) = firings(RewardLost(), reward=noisy(line((0, -0.9), (40, -0.1), (60, -0.1), (80, -0.8)), 0.05))
    assert 60 <= alert.step <= 72 and alert.severity == "warning"


def test_diversity_by_the_rollouts_own_answers() -> None:
    same = line((0, 0.01), (40, 0.01), (90, 0.6))
    alerts = firings(DiversityLost(), reward=line((0, 0.3), (99, 0.9)), same_answer_share=same)
    # the mean of six rows of a line is its value 2.5 rows before: 0.25 at step 40 + 0.24/0.0118 + 2.5 = 62.8, third row
    assert (alerts[0].step, alerts[0].severity) == (65, "warning")
    assert alerts[0].value == pytest.approx(same[60:66].mean())
    assert len(alerts) == 1  # half of the pairs are the same at the end, but a run whose reward rises is not lost
    flat = firings(DiversityLost(), reward=np.full(100, 0.5), same_answer_share=same)
    assert [a.severity for a in flat] == ["warning", "critical"] and flat[1].value >= 0.5
    assert (
        firings(DiversityLost(), reward=np.full(100, 0.5), same_answer_share=np.full(100, 0.3)) == []
    )  # always was so
    assert firings(DiversityLost(), reward=np.full(100, 0.5), duplicate_share=same)[0].step == 65


def test_diversity_by_evaluations() -> None:
    distinct = np.full(100, math.nan)
    distinct[::10] = [4, 7, 9, 9, 8, 7, 6, 5, 4, 4]
    columns = {
        "reward": np.linspace(0.3, 0.9, 100),
        "eval__heldout__distinct": [None if math.isnan(v) else v for v in distinct],
    }
    (first, *_) = firings(DiversityLost(for_rows=1), **columns)
    # means of two in a row: 5.5 8 9 8.5 7.5 6.5 ...; the peak is 9, and 5.5 at step 70 is the first at or under 6.3
    assert (first.step, first.value, first.baseline) == (70, 5.5, 9.0) and first.threshold == pytest.approx(6.3)


def test_evaluations_overrule_the_rollouts_same_answers() -> None:
    """Peak 9.0 of two evaluations; 0.8 of it is 7.2: the newest evaluation decides."""
    same = line((0, 0.01), (40, 0.01), (60, 0.35))  # 0.25 at step 54, the mean of six rows in step 57
    columns: dict[str, Any] = {"reward": np.full(100, 0.5), "same_answer_share": same}

    def heard(newest: float) -> list[tuple[str, int]]:
        distinct: list[float | None] = [None] * 100
        distinct[::10] = [6.0, 8.0, 9.0, 9.0, 9.0, newest, newest, newest, newest, newest]
        return [(a.severity, a.step) for a in firings(DiversityLost(), eval__heldout__distinct=distinct, **columns)]

    assert heard(7.3) == [("info", 59)]
    assert heard(7.1) == [("warning", 59)]


def test_groups_that_teach_nothing() -> None:
    dead = np.full(100, 0.96)
    told, hard = firings(NoLearningSignal(), zero_variance_share=dead, all_wrong_share=dead, reward=np.full(100, 0.01))
    assert told.step == 6 and told.severity == "info"  # five rows, third in a row
    assert hard.step == 16 and hard.severity == "warning" and "all wrong" in hard.message  # 15 rows, third in a row
    (easy,) = firings(
        NoLearningSignal(), zero_variance_share=dead, all_wrong_share=np.zeros(100), reward=np.full(100, 0.97)
    )
    assert easy.severity == "info" and "all right" in easy.message
    unsplit = firings(NoLearningSignal(), zero_variance_share=dead, reward=np.full(100, 0.01))
    assert [a.severity for a in unsplit] == ["info", "warning"]
    assert firings(NoLearningSignal(), zero_variance_share=np.full(100, 0.6)) == []


def test_few_live_groups_are_told_and_fewer_than_the_run_had_warned_of() -> None:
    def heard(dead: np.ndarray) -> set[str]:
        columns = {"zero_variance_share": dead, "all_wrong_share": dead, "reward": np.full(100, 0.05)}
        return {a.severity for a in firings(NoLearningSignal(), **columns)}

    assert heard(np.full(100, 0.8)) == {"info"}  # from the start: 0.2 live, and its best is 0.2
    assert heard(line((0, 0.8), (99, 0.4))) == {"info"}  # it learns all the same
    assert heard(line((0, 0.3), (40, 0.3), (60, 0.8))) == {"warning"}  # 0.7 live before, 0.25 then
    chance = np.where(np.arange(100) % 4 == 0, 0.5, 1.0)  # 2 of 4 groups in a row of four: 0.875 dead, as at its best
    assert heard(chance) == {"info"}


def test_a_selection_of_decided_tokens() -> None:
    columns = {"decided_share": np.full(100, 0.65), "selected_share": np.full(100, 0.1)}
    (alert,) = firings(BlindSelection(), selected_decided_share=np.full(100, 0.94), **columns)
    assert alert.step == 6 and alert.value == 0.94 and alert.baseline == 0.65  # five rows, third in a row
    assert alert.severity == "info"  # no reward is known
    blind = columns | {"selected_decided_share": np.full(100, 0.94)}
    assert [a.severity for a in firings(BlindSelection(), reward=noisy(line((0, 0.2), (99, 0.6))), **blind)] == ["info"]
    told, lost = firings(BlindSelection(), reward=line((0, 0.5), (40, 0.5), (65, 0.0)), **blind)
    # 0.5 falls by 0.02 a step; the mean of eight rows is 3.5 rows behind and at 0.35 when the row is at 0.28: step 51
    assert (told.step, told.severity) == (6, "info") and (lost.step, lost.severity) == (53, "warning")
    assert lost.message.endswith(" Reward was 0.5 at best and is 0.31.")  # 0.35 - 2 * 0.02 in the third row
    assert firings(BlindSelection(), selected_decided_share=np.full(100, 0.80), **columns) == []
    dense = columns | {"selected_share": np.ones(100), "decided_share": np.full(100, 0.94)}
    assert firings(BlindSelection(), selected_decided_share=np.full(100, 0.94), **dense) == []


def test_completions_that_are_cut_off_or_repeat() -> None:
    truncated = line((0, 0.05), (40, 0.05), (80, 0.9))
    falling = line((0, 0.6), (40, 0.6), (99, 0.1))
    alerts = firings(TruncationRunaway(), truncated_share=truncated, reward=noisy(falling, 0.005))
    assert alerts[0].threshold == pytest.approx(0.30) and alerts[-1].severity == "critical"
    rising = noisy(line((0, 0.2), (99, 0.9)), 0.005)
    assert firings(TruncationRunaway(), truncated_share=truncated, reward=rising) == []
    (loops,) = firings(Repetition(), repetition_share=line((0, 0.02), (40, 0.02), (60, 0.5)))
    assert loops.threshold == pytest.approx(0.15) and loops.value >= 0.15
    assert firings(Repetition(), repetition_share=np.full(100, 0.2)) == []  # a task whose answers repeat by nature


def test_updates_that_go_too_far() -> None:
    falling, rising = noisy(line((0, 0.6), (99, 0.1)), 0.005), noisy(line((0, 0.1), (99, 0.6)), 0.005)
    kl = line((0, 0.0), (99, 1.0))
    assert firings(KlRunaway(), kl=kl, reward=falling)[0].severity == "critical"
    assert firings(KlRunaway(), kl=kl, reward=rising) == []
    assert firings(SamplerMismatch(), sampler_mismatch=np.full(100, 0.2))[0].severity == "warning"
    assert firings(SamplerMismatch(), sampler_mismatch=np.full(100, 0.01)) == []
    (clipped,) = firings(ClipSaturation(), clip_share_low=np.full(100, 0.1), clip_share_high=np.full(100, 0.15))
    assert clipped.value == pytest.approx(0.25)
    norms = np.ones(100)
    norms[[50, 53, 56, 57, 58]] = 20.0
    (burst,) = firings(GradientSpikes(), grad_norm=norms)
    assert burst.step == 59 and burst.threshold == 10.0  # 57 is the fourth spike of ten rows, then three rows in a row
    norms[[57, 58]] = 1.0
    assert firings(GradientSpikes(), grad_norm=norms) == []


def test_a_loss_that_is_not_finite_fires_at_once() -> None:
    norms = np.ones(100)
    norms[30] = np.nan
    (alert,) = firings(NonfiniteLoss(), grad_norm=norms)
    assert (alert.step, alert.severity) == (30, "critical")


def test_rules_take_what_is_there() -> None:
    """With step, entropy and reward alone the engine judges, and rules that lack their series are silent."""
    reward = noisy(line((0, 0.2), (30, 0.6), (50, 0.6), (80, 0.1)))
    found = replay({"step": np.arange(100), "entropy": np.full(100, 0.45), "reward": reward})
    assert {a.rule for a in found} == {"reward_lost"}


def test_cool_down_keeps_an_alert_quiet_until_it_is_worse() -> None:
    entropy = np.concatenate([np.full(30, 1.0), np.full(20, 0.2), np.full(20, 1.0), np.full(20, 0.2)])
    rule = RULES["entropy_collapse"]

    def states(cooldown: int) -> list[str]:
        return [
            a.state for a in replay({"step": np.arange(90), "entropy": entropy}, rules=[rule(cooldown_steps=cooldown)])
        ]

    assert states(0) == ["pending", "firing", "resolved", "pending", "firing"]
    assert states(100) == ["pending", "firing", "resolved"]
    worse = {
        "step": np.arange(90),
        "entropy": entropy,
        "reward": np.concatenate([np.full(60, 0.5), np.linspace(0.5, 0.1, 30)]),
    }
    assert [a.severity for a in replay(worse, rules=[rule(cooldown_steps=100)]) if a.state == "firing"][
        -1
    ] == "critical"


def test_disabled_rules_and_capped_severities() -> None:
    series = {"step": np.arange(60), "entropy": np.geomspace(1.0, 0.01, 60), "reward": np.linspace(0.5, 0.1, 60)}
    rule = RULES["entropy_collapse"]
    assert {a.severity for a in replay(series, rules=[rule()])} == {"critical"}
    assert {a.severity for a in replay(series, rules=[rule(worst="info")])} == {"info"}
    assert AlertEngine([rule(enabled=False)]).rules == ()


def test_shapes_are_told_and_never_alarm_by_default() -> None:
    h1, h2 = line((0, 0.5), (40, 0.5), (80, 0.8)), np.full(100, 0.4)
    (tails,) = firings(RULES["tail_noise"](), entropy=h1, renyi2=h2)
    assert tails.severity == "info" and tails.threshold == pytest.approx(1.3 * 0.5)
    assert firings(RULES["tail_noise"](), entropy=h1, renyi2=0.8 * h1) == []  # both rise: that is an explosion
    (peaks,) = firings(
        RULES["peak_sharpening"](), entropy=np.full(100, 0.5), renyi2=line((0, 0.4), (40, 0.4), (80, 0.1))
    )
    assert peaks.threshold == pytest.approx(0.6 * 0.4)
    assert firings(RULES["peak_sharpening"](), entropy=1.2 * h1[::-1], renyi2=h1[::-1]) == []  # both fall: a collapse
    flow = {"predicted_entropy_lowering_weighted": np.full(100, -0.01)}
    (out,) = firings(RULES["entropy_flow"](), predicted_entropy_raising_weighted=np.full(100, 0.003), **flow)
    assert "make up for 30% of" in out.message and out.step == 11  # ten rows, third in a row
    assert firings(RULES["entropy_flow"](), predicted_entropy_raising_weighted=np.full(100, 0.006), **flow) == []


def test_decided_tokens_that_come_undecided() -> None:
    falling = np.concatenate([np.full(6, 0.6), 0.6 - 0.021 * np.arange(1, 25)])
    (first,) = firings(Forgetting(), n=30, decided_share=falling, reward=np.linspace(0.3, 0.05, 30))
    # a mean of five rows is 2 rows behind: 0.6 - 3 * 0.021 = 0.537 at the fifth row that falls, over a tenth under 0.6
    assert (first.step, first.severity, first.baseline) == (10, "critical", pytest.approx(0.6))
    assert first.value == pytest.approx(0.537) and first.threshold == pytest.approx(0.54)
    assert "54% of the tokens are decided (under 0.05 nat); it was 60% at the start." in first.message
    assert firings(Forgetting(), n=30, decided_share=falling)[0].severity == "warning"  # no reward is known
    early = np.concatenate([[0.6] * 3, np.linspace(0.5, 0.3, 7)])
    assert firings(Forgetting(), n=10, decided_share=early)[0].step == 7  # the eighth row: three at the start, five now


def test_what_the_policy_began_with_outlives_a_restart() -> None:
    engine = AlertEngine([Forgetting()], warmup_steps=5)
    for step, share in enumerate([0.5, 0.6, 0.7, 0.4]):
        engine.observe(step, {"decided_share": share})
    resumed = AlertEngine([Forgetting()])
    resumed.load_state_dict(json.loads(json.dumps(engine.state_dict())))
    resumed.observe(4, {"decided_share": 0.4})
    assert resumed.window().start("decided_share") == pytest.approx(0.6)  # of the first three, in warm-up too
    assert math.isnan(resumed.window().start("reward"))


def test_a_fall_from_the_best_in_standard_errors() -> None:
    engine = AlertEngine([RewardLost()])
    for step in range(20):  # 0.6 and 0.4 in turn, then a fifth less
        engine.observe(step, {"reward": (0.6 if step % 2 else 0.4) - 0.1 * (step >= 12)})
    fall = engine.window().fall("reward", 8)
    # jitter of the zigzag from its 19 differences: 17 of 0.2, and 0.2 - 0.1 or 0.2 + 0.1 at step 12 (down: 0.3)
    sd = max(math.sqrt((18 * 0.04 + 0.09) / 19), 1.4826 * 0.2) / math.sqrt(2)
    assert fall is not None and fall.best.high == pytest.approx(0.5) and fall.now == pytest.approx(0.4)
    assert fall.z == pytest.approx(0.1 / (sd * math.sqrt(1 / 10 + 1 / 8)))


def test_decided_tokens_that_are_kept() -> None:
    def heard(decided: np.ndarray, **more: np.ndarray) -> list[Alert]:
        return firings(Forgetting(), decided_share=decided, **more)

    assert heard(noisy(np.full(100, 0.6), 0.01)) == []
    assert heard(noisy(line((0, 0.6), (99, 0.56)), 0.01)) == []  # it loses a fifteenth
    assert heard(np.full(100, 0.1) - 0.001 * np.arange(100)) == []  # nothing to lose
    assert heard(line((0, 0.6), (99, 0.3)), reward=line((0, 0.1), (99, 0.8))) == []  # the reward pays for it
    for seed in range(20):  # a batch so small that a mean of five rows is a tenth off by chance: sd 0.1 of 0.6
        assert heard(noisy(np.full(100, 0.6), 0.1, seed)) == []


def test_held_out_problems_that_are_left_behind() -> None:
    heldout: list[float | None] = [None] * 100
    heldout[::10] = [0.3, 0.4, 0.45, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]  # mean of the first four 0.4125
    columns = {"eval__heldout__pass_at_1": heldout}
    (alert,) = firings(RULES["generalization_gap"](), correct_share=line((0, 0.4), (20, 0.4), (60, 0.9)), **columns)
    # the gap was 0.4 - 0.4125 and must reach 0.1875: a correct share of 0.6875, the mean of ten rows from step 50 on
    assert alert.step == 50 and alert.value == 0.5
    assert firings(RULES["generalization_gap"](), correct_share=line((0, 0.4), (99, 0.6)), **columns) == []


def hostile_rows(seed: int) -> list[tuple[int, dict[str, float]]]:
    """A run with all series that rules look at: wandering, with values that are missing or broken, and going back."""
    rng, step, found = np.random.default_rng(seed), 0, []
    levels = {key: float(rng.choice([0.0, 0.05, 0.3, 0.6, 1.0])) for key in AlertEngine().series}
    drift = {key: float(rng.choice([0.0, 0.002, -0.02, 0.05, -0.05])) for key in levels}
    levels["entropy"], drift["entropy"] = 1.0, (0.05, -0.05)[seed % 2]
    for index in range(160):
        if rng.random() < 0.03:
            step = max(0, step - int(rng.integers(0, 60)))
        step += 1 if rng.random() < 0.9 else 3
        row = {}
        for key in levels:
            levels[key] *= 1 + drift[key] * rng.random()
            kind = rng.random()
            if kind > 0.03 and not (key.startswith("eval/") and index % 10):
                row[key] = math.nan if kind < 0.05 else levels[key] * (1 + 0.1 * rng.standard_normal())
        if 100 <= index < 104:
            row["entropy"] = math.nan
        found.append((step, row))
    return found


def test_what_rules_call_clear_changes_no_alert(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same transitions come out where every rule is checked at every row, on wild runs and on real ones."""
    corpus: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for row in pq.read_table(CORPUS).to_pylist():
        known = {key: value for key, value in row.items() if key not in ("run", "step") and value is not None}
        corpus.setdefault(row["run"], []).append((row["step"], known))
    runs = [hostile_rows(seed) for seed in range(12)] + [corpus[run] for run in sorted(corpus)[::12]]
    strict = tuple(RULES[name](for_rows=1) for name in RULES)  # any breach is a transition

    def judged() -> list[str]:
        found: list[Alert] = []
        for rows in runs:
            for rules in (DEFAULT_RULES, strict):
                engine = AlertEngine(rules)
                found += [alert for step, scalars in rows for alert in engine.observe(step, scalars)]
        fired.update(alert.rule for alert in found if alert.state == "firing")
        return [repr(alert) for alert in found]  # nan is not itself

    fired: set[str] = set()
    quick = judged()
    skipping = {rule.name for rule in DEFAULT_RULES if type(rule).is_clear is not Rule.is_clear}
    assert len(skipping) >= 13 and skipping <= fired
    for cls in RULES.values():
        monkeypatch.setattr(cls, "is_clear", Rule.is_clear)
    assert quick == judged() and len(quick) > 500
