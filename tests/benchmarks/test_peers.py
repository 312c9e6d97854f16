"""rlwatch and rl-doctor beside our detectors: what they are fed, and how their settings are chosen."""

import json

import numpy as np
import pytest

from benchmarks.corpus.choosing import Labels, choose
from benchmarks.corpus.labels import Outcome
from benchmarks.corpus.peers import (
    METRICS,
    RULES,
    Found,
    PeerRun,
    PeersError,
    chosen_settings,
    figures,
    first_warning,
    judge,
    labels_of,
    main,
    records_of,
    rows_of,
    variants,
)

NEVER = np.inf


def test_records_carry_the_peers_names_and_no_missing_values():
    series = {
        "step": np.array([0, 1]),
        "entropy": np.array([np.nan, 0.5]),
        "reward": np.array([np.nan, 0.25]),
        "clip_share_low": np.array([np.nan, 0.125]),
        "clip_share_high": np.array([np.nan, 0.25]),
        "eval/heldout/pass@1": np.array([0.75, np.nan]),
    }
    # rlwatch takes no evaluation, so step 0 has nothing for it
    assert records_of(series, METRICS["rlwatch"]) == [
        {"step": 1, "entropy": 0.5, "reward_mean": 0.25, "clip_fraction": 0.375}
    ]
    assert records_of(series, METRICS["rldoctor"]) == [
        {"step": 0, "eval/accuracy": 0.75},
        {"step": 1, "reward": 0.25, "entropy": 0.5, "clip_ratio/region_mean": 0.375, "clip_ratio/low_mean": 0.125,
         "clip_ratio/high_mean": 0.25},
    ]  # fmt: skip


def test_first_warning_under_the_monitors_settings():
    found = [
        Found("plateau", "warning", 9, 10, True),
        Found("plateau", "critical", 14, 15, True),
        Found("plateau", "warning", 24, 25, False),  # kept quiet live; a monitor that looks at 25 alone would say it
    ]
    assert first_warning(found, {}) == 9
    assert first_warning(found, {"check_every": 25, "min_steps": 8}) == 24
    assert first_warning(found, {"check_every": 5, "min_steps": 11}) == 14
    assert first_warning(found, {"alert_at": "CRITICAL"}) == 14
    assert first_warning(found, {"min_steps": 60}) == NEVER


# Two damaged runs, at steps 40 and 50, and two healthy ones.
LABELS = Labels(np.array([40.0, 50.0, NEVER, NEVER]), np.array([False, False, True, True]))


def test_choice_takes_rules_that_see_different_runs():
    first = {
        "low": np.array([[20.0, NEVER, NEVER, NEVER], [10.0, 10.0, 10.0, NEVER]]),  # the second warns a healthy run
        "late": np.array([[NEVER, 25.0, NEVER, NEVER], [NEVER, 50.0, NEVER, NEVER]]),  # at 50 is not before 50
        "loud": np.array([[5.0, 5.0, 5.0, 5.0]]),
    }
    chosen = choose(first, LABELS, 0.05)
    assert chosen.settings == {"low": 0, "late": 0, "loud": None}
    # allowed, 2 in time, no healthy run warned, mean of the leads 1 - 20/40 and 1 - 25/50
    assert chosen.rank == (1, 2, 0, 0.5)


def test_choice_spends_alarms_only_where_they_are_allowed_and_buy_something():
    first = {"low": np.array([[20.0, NEVER, NEVER, NEVER], [20.0, 20.0, 10.0, NEVER], [1.0, 1.0, 1.0, 1.0]])}
    assert choose(first, LABELS, 0.05).settings == {"low": 0}
    assert choose(first, LABELS, 0.5).settings == {"low": 1}  # all 4 warned would be longer ahead, but not allowed


def test_choice_leaves_off_what_adds_nothing():
    first = {"low": np.array([[20.0, NEVER, NEVER, NEVER]] * 2), "silent": np.full((3, 4), NEVER)}
    assert choose(first, LABELS, 0.05).settings == {"low": 0, "silent": None}


def test_runs_of_other_outcomes_count_on_neither_side():
    labels = labels_of([run("a", Outcome("reward_lost", 40, 30)), run("b", Outcome("stall"))])
    assert labels.damage.tolist() == [40, NEVER] and labels.healthy.tolist() == [False, False]
    assert choose({"loud": np.array([[10.0, 1.0]])}, labels, 0.01).settings == {"loud": 0}


def test_chosen_settings_in_the_peers_own_terms():
    off = dict.fromkeys(RULES["rlwatch"])
    choice = choose({"low": np.array([[20.0, NEVER, NEVER, NEVER]])}, LABELS, 0.05)
    settings = chosen_settings(
        "rlwatch", choice._replace(settings=off | {"entropy_collapse": 1, "kl_explosion": 0}), {}
    )
    assert settings["rules"] == {"entropy_collapse": RULES["rlwatch"]["entropy_collapse"][1]}  # 0 is the default: {}
    assert settings["off"] == ["reward_hacking", "gradient_norm_spike", "reward_mean_drift"]


@pytest.mark.parametrize("peer", RULES)
def test_variants_try_every_setting_of_every_rule_once(peer):
    tried = [(rule, json.dumps(values)) for settings in variants(peer) for rule, values in settings["rules"].items()]
    assert sorted(tried) == sorted((rule, json.dumps(v)) for rule, tries in RULES[peer].items() for v in tries)
    assert len(set(tried)) == len(tried)


def test_figures_and_rows_are_of_what_was_said():
    runs = [run("a", Outcome("reward_lost", 40, 30)), run("b", Outcome("diversity_lost", 50, 40)),
            run("c", Outcome("healthy")), run("d", Outcome("stall"))]  # fmt: skip
    found = [
        [Found("plateau", "warning", 30, 31, True), Found("plateau", "warning", 31, 32, False)],
        [Found("plateau", "warning", 50, 51, True)],  # at the damage: late
        [Found("plateau", "warning", 10, 11, False)],
        [Found("plateau", "warning", 10, 11, True)],
    ]
    assert figures(labels_of(runs), found) == {
        "damaged": 2, "in_time": 1, "late": 1, "healthy": 1, "healthy_warned": 0, "median_lead": 0.25,  # 1 - 30/40
    }  # fmt: skip
    assert rows_of("rldoctor", runs, found)[:2] == [
        {"run": "a", "detector": "rldoctor", "rule": "plateau", "severity": "warning", "step": 30},
        {"run": "b", "detector": "rldoctor", "rule": "plateau", "severity": "warning", "step": 50},
    ]


def test_missing_peers_are_named_with_what_to_type(tmp_path):
    with pytest.raises(PeersError, match=r"bin/python -m pip install rlwatch==0\.5\.1 rldoctor==0\.2\.0"):
        judge(tmp_path, "rlwatch", [run("a", Outcome("healthy"))], [{"rules": {}, "off": [], "monitor": {}}])


def test_the_test_part_is_never_tuned_on(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--work", str(tmp_path), "--peers", str(tmp_path), "--part", "test", "--tune"])
    assert "Use development" in capsys.readouterr().err


def run(name: str, outcome: Outcome) -> PeerRun:
    return PeerRun(name, outcome, {}, {"rlwatch": [], "rldoctor": []})
