"""The alert rules and engine: what fires, when, how badly, and what does not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from monitor.alerts import AlertEngine, Window, fired, replay
from monitor.alerts.rules.entropy import NOISE_WIDTH, EntropyCollapse, EntropyExplosion, NonfiniteEntropy, widened
from monitor.alerts.trends import fit_trend, log_noise, median, steps_to
from monitor.alerts.window import Baseline
from monitor.records import Alert


def noisy(values: np.ndarray, seed: int, scale: float = 0.05) -> np.ndarray:
    return values * np.exp(scale * np.random.default_rng(seed).standard_normal(len(values)))


ENTROPY_RULES = (EntropyCollapse(), EntropyExplosion(), NonfiniteEntropy())


def run(entropy: np.ndarray, reward: np.ndarray | None = None, **kwargs: object) -> list[Alert]:
    """What the rules on the entropy say; those on the reward have tests of their own."""
    series: dict[str, object] = {"step": np.arange(len(entropy)), "entropy": entropy}
    if reward is not None:
        series["reward"] = reward
    return replay(series, rules=ENTROPY_RULES, **kwargs)  # type: ignore[arg-type]


def firings(alerts: list[Alert]) -> list[tuple[str, str]]:
    return [(alert.rule, alert.severity) for alert in alerts if alert.state == "firing"]


@pytest.mark.parametrize("seed", range(5))
def test_flat_healthy_run_at_045_nat_raises_nothing(seed: int) -> None:
    reward = np.linspace(0.2, 0.8, 300) + 0.05 * np.random.default_rng(seed).standard_normal(300)
    assert run(noisy(np.full(300, 0.45), seed, 0.1), reward) == []


@pytest.mark.parametrize("reward", [None, (0.2, 0.8), (0.3, 0.3), (0.5, 0.2)])
@pytest.mark.parametrize("space", [np.linspace, np.geomspace])
@pytest.mark.parametrize("n", [40, 120, 400])
def test_fall_from_13_to_01_fires_before_it_is_over(n: int, space: object, reward: tuple[float, float] | None) -> None:
    entropy = noisy(space(1.3, 0.1, n), n, 0.03)  # type: ignore[operator]
    alerts = run(entropy, None if reward is None else noisy(np.linspace(*reward, n), 1, 0.02))
    rules = {rule for rule, _ in firings(alerts)}
    assert rules == {"entropy_collapse"}
    first = next(alert for alert in alerts if alert.state == "firing")
    assert first.step < n - 2 and first.value > 0.1 and first.threshold < first.baseline


@pytest.mark.parametrize("n", [40, 120, 400])
def test_rise_from_06_to_2_with_falling_reward_fires_explosion(n: int) -> None:
    alerts = run(noisy(np.linspace(0.6, 2.0, n), 3), noisy(np.linspace(0.6, 0.2, n), 4))
    assert {rule for rule, _ in firings(alerts)} == {"entropy_explosion"}
    assert next(a.step for a in alerts if a.state == "firing") < 0.75 * n
    if n == 120:
        assert fired(alerts)[0]["severity"] == "critical"


def test_severity_follows_reward() -> None:
    fall, rise, n = np.geomspace(1.0, 0.2, 200), np.linspace(0.5, 1.5, 200), 200
    rising, falling = np.linspace(0.2, 0.8, n), np.linspace(0.8, 0.2, n)
    assert set(firings(run(fall, rising))) == {("entropy_collapse", "warning")}
    assert set(firings(run(fall, falling))) == {("entropy_collapse", "critical")}
    assert set(firings(run(fall))) == {("entropy_collapse", "warning")}
    assert set(firings(run(rise, rising))) == {("entropy_explosion", "info")}
    assert set(firings(run(rise))) == {("entropy_explosion", "warning")}


def test_a_steep_fall_alone_is_told_and_warns_once_the_level_is_low() -> None:
    # 3 % a step, so steep, and half of the baseline: info. The level, 2 rows behind, is under 0.3 of it 41 steps on
    entropy = np.concatenate([np.full(30, 1.0), np.exp(-0.03 * np.arange(60))])
    steep, low = [a for a in run(entropy) if a.state == "firing"][:2]
    assert steep.severity == "info" and 0.3 < steep.value < 0.5
    assert low.severity == "warning" and low.value < 0.3 and low.first_step == steep.step
    halt = np.concatenate([entropy[:60], np.full(60, entropy[60])])  # 0.41: it ends by itself
    assert set(firings(run(halt))) == {("entropy_collapse", "info")}


def test_slow_decline_with_rising_reward_is_healthy() -> None:
    for seed in range(5):
        assert run(noisy(np.linspace(1.0, 0.6, 200), seed), noisy(np.linspace(0.2, 0.8, 200), seed + 50)) == []


def test_usual_grpo_decay_warns_only_when_it_gets_there() -> None:
    entropy = np.concatenate([np.full(20, 0.54), np.geomspace(0.54, 0.14, 320)])
    alerts = run(entropy, np.linspace(0.25, 0.84, 340))
    assert firings(alerts) == [("entropy_collapse", "warning")]
    first = next(a for a in alerts if a.state == "firing")
    assert first.value < 0.3 * 0.54 and first.threshold == pytest.approx(0.3 * 0.54)


def test_length_growth_without_reward_makes_a_rise_an_early_explosion() -> None:
    n = 120
    series = {
        "step": np.arange(n),
        "entropy": np.geomspace(0.5, 0.98, n),  # never reaches 200 %
        "reward": noisy(np.full(n, 0.4), 1),
        "response_length": np.concatenate([np.full(20, 50.0), np.geomspace(50, 300, n - 20)]),
    }
    series["entropy"][40:80] = np.geomspace(series["entropy"][40], 0.95, 40)
    series["entropy"][80:] = 0.96
    assert firings(replay(series)) == [("entropy_explosion", "warning")]
    del series["response_length"]
    assert firings(replay(series)) == []


def test_transients_before_the_baseline_do_not_matter() -> None:
    transient = np.concatenate([np.geomspace(3.0, 0.5, 8), np.full(100, 0.5)])
    assert run(transient) == []
    long = np.concatenate([np.full(30, 2.0), np.full(100, 0.5)])
    assert {rule for rule, _ in firings(run(long))} == {"entropy_collapse"}
    assert run(long, warmup_steps=30) == []


def test_message_projects_the_steps_to_the_floor() -> None:
    entropy = np.concatenate([np.full(25, 1.0), np.exp(-0.05 * np.arange(60))])
    first = next(a for a in run(entropy, np.linspace(0, 1, 85)) if a.state == "firing")
    left = math.ceil(math.log(first.value / 0.1) / 0.05)
    assert f"falling 4.9% per step: about {left} steps to the floor of 0.1 nat" in first.message
    assert "Reward is rising." in first.message and first.baseline == 1.0
    assert "checkpoint" in first.action


def test_steps_to_and_widened() -> None:
    assert steps_to(1.0, 0.5, -math.log(2)) == pytest.approx(1.0)
    assert steps_to(0.4, 0.5, -0.1) == 0.0
    assert math.isinf(steps_to(1.0, 0.5, 0.1))
    assert math.isinf(steps_to(1.0, 0.5, 0.0))
    assert widened(2.0, 0.0) == pytest.approx(2.0)
    assert widened(0.3, 1.0) == pytest.approx(math.exp(-NOISE_WIDTH))
    assert widened(2.0, 0.3) == pytest.approx(math.exp(NOISE_WIDTH * 0.3))


def test_fit_trend_values() -> None:
    x = np.array([10, 12, 14, 20])
    trend = fit_trend(x, 3.0 + 0.5 * x)
    assert trend.slope == pytest.approx(0.5) and trend.rows == 4 and trend.t > 1e6
    assert fit_trend(x, np.full(4, 7.0)).t == 0.0
    assert fit_trend(x, np.array([1.0, np.nan, 2.0, np.nan])).rows == 2
    y = np.array([0.0, 1.0, 1.0, 2.0, 4.0, 3.0])  # by hand: Sxx 17.5, Sxy 12.5, residual sum of squares 1.9048
    trend = fit_trend(np.arange(6), y)
    assert trend.slope == pytest.approx(12.5 / 17.5)
    assert trend.t == pytest.approx(12.5 / 17.5 / math.sqrt((10.8333333 - 12.5**2 / 17.5) / 4 / 17.5), rel=1e-6)
    assert fit_trend(np.arange(6) + 10**9, y) == trend
    gaps = np.array([0, 1, 3, 4, 9, 10])
    assert fit_trend(gaps, y).slope == pytest.approx(np.polyfit(gaps, y, 1)[0])


@pytest.mark.parametrize("n", [1, 2, 5, 39, 40])
def test_median_is_numpys(n: int) -> None:
    values = np.random.default_rng(n).standard_normal(n)
    assert median(values) == np.median(values)
    assert median(np.array([4.0, 1.0, 3.0, 2.0])) == 2.5


def test_baseline_noise_ignores_the_line_and_measures_the_rest() -> None:
    rng = np.random.default_rng(0)
    assert log_noise(np.exp(np.linspace(0, -2, 20))) < 1e-12
    values = [log_noise(np.exp(0.2 * rng.standard_normal(20))) for _ in range(200)]
    assert np.mean(values) == pytest.approx(0.2, rel=0.15)
    # zigzag: residuals +-0.2 around a flat line, r < 0 counts as 0: 1.4826 * 0.2
    assert log_noise(np.exp(0.2 * (-1.0) ** np.arange(20))) == pytest.approx(1.4826 * 0.2, rel=0.02)


def test_baseline_noise_of_a_series_that_wanders_is_widened() -> None:
    """AR(1), phi 0.9, sd 0.3: a line through 20 rows follows it, so their residuals alone say far less than 0.3."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(300):
        noise = [0.3 * rng.standard_normal()]
        for _ in range(19):
            noise.append(0.9 * noise[-1] + 0.3 * math.sqrt(1 - 0.81) * rng.standard_normal())
        found.append(log_noise(np.exp(np.array(noise))))
    assert 0.2 < np.median(found) < 0.4


def test_jumpy_run_is_judged_by_wider_thresholds() -> None:
    for seed in range(5):
        assert run(noisy(np.full(300, 0.5), seed, 0.3)) == []
    series = {"entropy": (np.arange(40), np.full(40, 1.1))}
    noisy_run = Window(series, {"entropy": Baseline(0.5, 0.3)})
    quiet_run = Window(series, {"entropy": Baseline(0.5, 0.0)})
    rule = EntropyExplosion()
    assert not rule.check(noisy_run).breached and rule.check(quiet_run).breached  # type: ignore[union-attr]


def test_outliers_do_not_fire() -> None:
    entropy = np.full(100, 0.5)
    entropy[[40, 41, 60, 80]] = [0.01, 0.02, 9.0, 0.001]
    assert run(entropy) == []


def test_short_series_and_missing_values() -> None:
    assert run(np.geomspace(1, 0.01, 19)) == []
    assert replay({"step": [], "entropy": []}) == []
    entropy, reward = list(np.geomspace(1.3, 0.1, 80)), list(np.linspace(0.2, 0.8, 80))
    plain = replay({"step": list(range(80)), "entropy": entropy, "reward": reward})
    holes: list[float | None] = []
    for value in entropy:
        holes += [value, None]
    gappy = replay({"step": list(range(160)), "entropy": holes, "reward": list(np.linspace(0.2, 0.8, 160))})
    assert [2 * a.step for a in plain] == [a.step for a in gappy] and len(plain) == 2


def test_nonfinite_rows_are_skipped_and_three_in_a_row_fire() -> None:
    entropy = np.full(60, 0.5)
    entropy[[3, 30, 31, 50]] = [np.nan, np.inf, np.nan, -np.inf]
    assert run(entropy) == []
    entropy[40:44] = np.nan
    alerts = run(entropy)
    assert [(a.rule, a.state, a.step, a.severity) for a in alerts] == [
        ("nonfinite_entropy", "firing", 42, "critical"),
        ("nonfinite_entropy", "resolved", 44, "critical"),
    ]


def test_policy_without_entropy_is_not_judged_by_ratios() -> None:
    assert run(np.geomspace(0.01, 0.0001, 100)) == []
    assert run(np.linspace(0.01, 0.04, 100)) == []  # four times nothing is nothing
    assert run(np.zeros(100)) == []


def test_transitions_hysteresis_and_refiring() -> None:
    entropy = np.concatenate(
        [np.full(30, 1.0), np.full(20, 0.2), np.full(20, 0.35), np.full(20, 1.0), np.full(20, 0.2)]
    )
    alerts = run(entropy)
    assert [(a.state, a.step) for a in alerts] == [
        ("pending", 32),  # the median of 5 follows at the third row
        ("firing", 34),
        ("resolved", 74),  # 0.35 is inside the hysteresis; 3 rows above 0.4
        ("pending", 92),
        ("firing", 94),
    ]
    assert [a.first_step for a in alerts] == [32, 34, 34, 92, 94]
    assert [(e["step"], e["resolved_step"]) for e in fired(alerts)] == [(34, 74), (94, None)]


def test_pending_that_goes_away_is_closed_and_never_reported_as_fired() -> None:
    entropy = np.full(60, 1.0)
    entropy[[40, 41, 43]] = 0.1  # the median of 5 is low in 2 rows, an alert takes 3
    alerts = run(entropy)
    assert [a.state for a in alerts] == ["pending", "resolved"]
    assert fired(alerts) == []


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_row_is_no_second_opinion_on_the_rows_before_it(broken: float) -> None:
    """Between any two rows: what is judged, counted and announced is what it would be without the broken row."""
    entropy = np.concatenate([np.full(40, 1.0), np.full(60, 1.0), np.geomspace(1.0, 0.05, 60), np.full(40, 0.9)])
    entropy[[40, 41, 43]] = 0.1  # pending in 2 rows, an alert takes 3
    for place in [*range(40, 50), *range(90, 200, 10)]:
        plain = replay({"step": np.delete(np.arange(201), place), "entropy": entropy})
        states = [a.state for a in plain]
        assert states[:4] == ["pending", "resolved", "pending", "firing"] and states[-1] == "resolved"
        assert set(states[4:-1]) == {"firing"}  # it gets worse
        found = replay({"step": np.arange(201), "entropy": np.insert(entropy, place, broken)})
        assert found == plain, place


def test_a_broken_row_of_a_resumed_run_takes_the_place_of_the_old_ones() -> None:
    engine = AlertEngine()
    for step in range(30):
        engine.observe(step, {"entropy": 1.0})
    engine.observe(25, {"entropy": math.nan})
    engine.observe(26, {"entropy": 2.0})
    assert [step for step, _ in engine.state_dict()["series"]["entropy"]] == [*range(25), 26]


def test_escalation_announces_firing_again_with_the_same_first_step() -> None:
    n = 200
    reward = np.concatenate([np.linspace(0.2, 0.8, 130), np.linspace(0.8, 0.1, 70)])
    entropy = np.concatenate([np.full(30, 1.0), np.geomspace(1.0, 0.15, n - 30)])
    alerts = [a for a in run(entropy, reward) if a.state == "firing"]
    assert [a.severity for a in alerts] == ["warning", "critical"]
    assert alerts[0].first_step == alerts[1].first_step == alerts[0].step < alerts[1].step
    (episode,) = fired(alerts)
    assert episode["severity"] == "critical" and episode["step"] == alerts[0].step
    # each transition keeps its own numbers: the warning's mark never shows those of the critical one
    assert (episode["message"], episode["value"]) == (alerts[0].message, alerts[0].value)
    told = [(t["state"], t["step"], t["severity"], t["value"], t["message"]) for t in episode["transitions"]]
    assert told == [("firing", a.step, a.severity, a.value, a.message) for a in alerts]


def test_engine_state_survives_json_and_gives_the_same_alerts() -> None:
    entropy, reward = noisy(np.geomspace(1.3, 0.05, 150), 5), noisy(np.linspace(0.4, 0.2, 150), 6)
    reward[20] = np.nan
    whole = run(entropy, reward)
    for cut in (0, 7, 25, 80, 120):
        alerts: list[Alert] = []
        engine = AlertEngine(ENTROPY_RULES)
        for step in range(150):
            if step == cut:
                state = json.loads(json.dumps(engine.state_dict(), allow_nan=False))
                engine = AlertEngine(ENTROPY_RULES)
                engine.load_state_dict(state)
            alerts += engine.observe(step, {"entropy": entropy[step], "reward": reward[step], "perf/step_s": 1.0})
        assert alerts == whole


def test_steps_may_start_anywhere_and_have_gaps() -> None:
    entropy = np.geomspace(1.3, 0.1, 100)
    at_zero = replay({"step": np.arange(100), "entropy": entropy}, warmup_steps=5)
    later = replay({"step": np.arange(100) + 5000, "entropy": entropy}, warmup_steps=5)
    assert [a.step + 5000 for a in at_zero] == [a.step for a in later]
    assert [a.message for a in at_zero] == [a.message for a in later]
    spread = replay({"step": 10 * np.arange(100), "entropy": entropy})
    assert {r for r, _ in firings(spread)} == {"entropy_collapse"}  # ten times slower per step: only the level fires
    assert next(a for a in spread if a.state == "firing").value < 0.3 * spread[0].baseline


def test_replay_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match=r"no column step. Its columns: entropy"):
        replay({"entropy": [1.0]})
    with pytest.raises(ValueError, match=r"No rule can judge the columns step, x. Expected entropy"):
        replay({"step": [1], "x": [1.0]})
    with pytest.raises(ValueError, match="'entropy' has 1 rows, expected 2"):
        replay({"step": [1, 2], "entropy": [1.0]})
    with pytest.raises(ValueError, match="strictly increasing"):
        replay({"step": [2, 1], "entropy": [1.0, 1.0]})
    with pytest.raises(ValueError, match="at least 0, got -1"):
        AlertEngine(warmup_steps=-1)


def test_a_step_that_comes_again_replaces_the_rows_from_there() -> None:
    engine = AlertEngine()
    for step in range(30):
        engine.observe(step, {"entropy": 1.0})
    for step in range(20, 30):
        engine.observe(step, {"entropy": 2.0})
    state = engine.state_dict()
    assert [step for step, _ in state["series"]["entropy"]] == list(range(30))
    assert state["series"]["entropy"][20] == [20, 2.0] and engine.baseline == 1.0


def test_rules_are_silent_without_a_baseline() -> None:
    window = Window({"entropy": (np.arange(10), np.full(10, 0.5))})
    assert EntropyCollapse().check(window) is None and EntropyExplosion().check(window) is None
