"""The sentence about an arm: each branch on rows whose numbers are worked out by hand."""

from __future__ import annotations

import pytest

from monitor.stats.comparison_verdict import comparison_verdict, comparison_verdicts, headline

PASS, DISTINCT = "eval/heldout/pass@1", "eval/heldout/distinct"


def row(when, figure, base, difference, interval=(None, None), pairs=5):
    low, high = interval
    return {
        "when": when, "figure": figure, "arm": "ict", "mean": base + difference, "baseline_mean": base,
        "difference": difference, "low": low, "high": high, "pairs": pairs, "values": {},
    }  # fmt: skip


def made(*rows, seeds=5, levels=None, samples=16):
    """A comparison of ict with uniform, as `paired_comparison` makes it, with these rows of ict."""
    arms = {arm: {str(seed): f"{arm}-{seed}" for seed in range(seeds)} for arm in ("uniform", "ict")}
    uniform = [{"when": "last", "figure": PASS, "arm": "uniform", "values": {}}]
    return {
        "baseline": "uniform", "arms": arms, "rows": [*uniform, *rows], "samples": samples,
        "levels": {"ict": levels or {}},
    }  # fmt: skip


def ends(found, arm, *values):
    """Sets the arm's last pass@1 by seed."""
    of = next(r for r in found["rows"] if (r["when"], r["figure"], r["arm"]) == ("last", PASS, arm))
    of["values"] = {str(seed): value for seed, value in enumerate(values)}


KEPT = row("last", DISTINCT, 7.4, 5.7, (4.1, 7.0))
NOT_KEPT = row("last", DISTINCT, 12.1, 0.3, (-1.2, 1.9))
EQUAL = [row("equal", "step", 30.0, 20.0, (10, 30)), row("equal", DISTINCT, 12.1, 0.3, (-1.2, 1.9))]
LEVELS = {str(seed): level for seed, level in enumerate((0.76, 0.78, 0.80, 0.77, 0.79))}  # mean .78


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (  # 7.4 + 5.7 = 13.1; the interval [4.1, 7.0] excludes 0, [-.01, .10] does not; no equal pass@1 is needed
            [KEPT, row("last", PASS, 0.85, 0.05, (-0.01, 0.10)), *EQUAL],
            "ict kept 13.1 of 16 distinct answers where uniform kept 7.4 (+5.7 [+4.1, +7.0]), "
            "at pass@1 .90 against .85 (+.05 [-.01, +.10], no difference is shown); 5 pairs.",
        ),
        (  # 7.4 - 2.3 = 5.1 and .85 + .05 = .90, both shown: so equal pass@1 follows, where 12.1 + 0.3 = 12.4
            [row("last", DISTINCT, 7.4, -2.3, (-3.0, -1.0)), row("last", PASS, 0.85, 0.05, (0.01, 0.10)), *EQUAL],
            "ict kept only 5.1 of 16 distinct answers where uniform kept 7.4 (-2.3 [-3.0, -1.0]), "
            "at pass@1 .90 against .85 (+.05 [+.01, +.10], better); "
            "at equal pass@1 (.78) 12.4 of 16 distinct answers against 12.1 (+0.3 [-1.2, +1.9], no difference is "
            "shown); 5 pairs.",
        ),
        (  # nothing is shown
            [NOT_KEPT, row("last", PASS, 1.0, 0.0, (0.0, 0.0)), *EQUAL],
            "ict against uniform: no difference in distinct answers is shown, 12.4 of 16 against 12.1 "
            "(+0.3 [-1.2, +1.9]), at pass@1 1.00 against 1.00 (+.00 [+.00, +.00], no difference is shown); 5 pairs.",
        ),
        (  # only pass@1 is shown: .85 - .09 = .76. It comes first
            [NOT_KEPT, row("last", PASS, 0.85, -0.09, (-0.12, -0.05))],
            "ict reached only pass@1 .76 where uniform reached .85 (-.09 [-.12, -.05]); "
            "no difference in distinct answers is shown, 12.4 of 16 against 12.1 (+0.3 [-1.2, +1.9]); 5 pairs.",
        ),
        (  # no canonical forms: pass@4, .90 + .07 = .97
            [row("last", "eval/heldout/pass@4", 0.90, 0.07, (0.02, 0.11)), row("last", "entropy", 1, 1, (1, 1)),
             row("last", PASS, 0.85, 0.0, (-0.1, 0.1))],
            "ict reached pass@4 .97 where uniform reached .90 (+.07 [+.02, +.11]), "
            "at pass@1 .85 against .85 (+.00 [-.10, +.10], no difference is shown); 5 pairs.",
        ),
        (  # neither: the entropy, 0.21 + 0.41 = 0.62
            [row("last", "entropy", 0.21, 0.41, (0.3, 0.5)), row("last", PASS, 0.85, 0.0, (-0.1, 0.1))],
            "ict kept an entropy of 0.62 nats where uniform kept 0.21 (+0.41 [+0.30, +0.50]), "
            "at pass@1 .85 against .85 (+.00 [-.10, +.10], no difference is shown); 5 pairs.",
        ),
        (  # nothing was evaluated: 0.82 - 0.20 = 0.62
            [row("last", "entropy", 0.21, 0.01, (-0.1, 0.2)), row("last", "reward", 0.82, -0.2, (-0.3, -0.1))],
            "ict reached only reward 0.62 where uniform reached 0.82 (-0.20 [-0.30, -0.10]); "
            "no difference in entropy is shown, 0.22 nats against 0.21 (+0.01 [-0.10, +0.20]); 5 pairs.",
        ),
        (  # a trainer of someone else's that records only reward
            [row("last", "reward", -1.5, 0.5, (0.1, 0.9))],
            "ict reached reward -1.00 where uniform reached -1.50 (+0.50 [+0.10, +0.90]); 5 pairs.",
        ),
    ],
    ids=["kept", "fewer-better", "nothing-shown", "only-pass", "pass@k", "entropy", "reward", "reward-alone"],
)  # fmt: skip
def test_the_verb_follows_from_the_intervals(rows, sentence):
    assert comparison_verdict(made(*rows, levels=LEVELS), "ict") == sentence


@pytest.mark.parametrize("pairs", [1, 2])
def test_few_pairs_are_too_few_to_tell(pairs):
    # 7.4 + 5.7 = 13.1; .85 + .05 = .90
    rows = [row("last", DISTINCT, 7.4, 5.7, pairs=pairs), row("last", PASS, 0.85, 0.05, pairs=pairs)]
    counted = "1 pair" if pairs == 1 else "2 pairs"
    assert comparison_verdict(made(*rows, seeds=pairs), "ict") == (
        f"ict against uniform, {counted}: too few to tell; 13.1 of 16 distinct answers against 7.4 (+5.7), "
        "pass@1 .90 against .85 (+.05)."
    )
    equal = [row("equal", "step", 10.0, 5.0, pairs=pairs), row("equal", DISTINCT, 12.0, 0.5, pairs=pairs)]
    told = comparison_verdict(made(*rows, *equal, seeds=pairs, levels={"0": 0.78}), "ict")
    assert told.endswith("; at equal pass@1 (.78) 12.5 of 16 distinct answers against 12.0 (+0.5).")


def test_at_equal_pass_the_untrained_policy_says_nothing():
    """Both first reach the level at step 0: there they are one policy."""
    rows = [row("last", DISTINCT, 7.4, 5.7, pairs=1), row("last", PASS, 0.85, -0.6, pairs=1)]
    equal = [row("equal", "step", 0.0, 0.0, pairs=1), row("equal", DISTINCT, 5.0, 0.0, pairs=1)]
    assert "at equal" not in comparison_verdict(made(*rows, *equal, seeds=1, levels={"0": 0.25}), "ict")


WORSE = [row("last", DISTINCT, 7.4, -6.9, (-7.5, -6.0)), row("last", PASS, 0.76, -0.70, (-0.75, -0.65)), *EQUAL]


def test_an_arm_that_lost_its_reward_is_told_so_first():
    """The level is .78 in each seed; .06 is at most half of it, .76 is not. 7.4 - 6.9 = 0.5; .76 - .70 = .06."""
    found = made(*WORSE, levels=dict.fromkeys("01234", 0.78))
    ends(found, "ict", 0.06, 0.06, 0.06, 0.06, 0.06)
    ends(found, "uniform", 0.76, 0.76, 0.76, 0.76, 0.76)
    assert comparison_verdict(found, "ict") == (
        "ict lost its reward: pass@1 .06 against .76 (-.70 [-.75, -.65], worse); "
        "ict kept only 0.5 of 16 distinct answers where uniform kept 7.4 (-6.9 [-7.5, -6.0]); "
        "at equal pass@1 (.78) 12.4 of 16 distinct answers against 12.1 (+0.3 [-1.2, +1.9], no difference is shown); "
        "5 pairs."
    )


@pytest.mark.parametrize(
    ("mine", "theirs", "level", "begins"),
    [
        ((0.1, 0.39, 0.4), (0.7, 0.7, 0.7), 0.78, "ict lost its reward in 2 of 3 runs: pass@1 "),  # half is .39
        ((0.7, 0.7, 0.7), (0.1, 0.1, 0.1), 0.78, "ict kept its reward where uniform lost it: pass@1 "),
        ((0.7, 0.7, 0.7), (0.1, 0.7, 0.7), 0.78, "ict kept its reward where uniform lost it in 1 of 3 runs: pass@1 "),
        ((0.1, 0.1, 0.7), (0.1, 0.7, 0.7), 0.78, "ict lost its reward in 2 of 3 runs and uniform in 1: pass@1 "),
        ((0.0, 0.0, 0.0), (0.1, 0.1, 0.1), 0.09, "ict kept only 0.5 of 16"),  # .09 was never worth the name
        ((None, 0.7, 0.7), (0.7, 0.7, 0.7), 0.78, "ict kept only 0.5 of 16"),  # not evaluated is not lost
    ],
    ids=["some", "baseline", "baseline-some", "both", "never-had-it", "unknown"],
)
def test_who_lost_the_reward_and_in_how_many_runs(mine, theirs, level, begins):
    found = made(*WORSE, seeds=3, levels=dict.fromkeys("012", level))
    ends(found, "ict", *mine)
    ends(found, "uniform", *theirs)
    assert comparison_verdict(found, "ict").startswith(begins)


def test_a_lost_reward_shows_with_one_pair_too():
    rows = [row("last", DISTINCT, 3.0, -3.0, pairs=1), row("last", PASS, 0.85, -0.85, pairs=1)]
    found = made(*rows, seeds=1, levels={"0": 0.35})
    ends(found, "ict", 0.0)
    ends(found, "uniform", 0.85)
    assert comparison_verdict(found, "ict") == (
        "ict lost its reward: pass@1 .00 against .85 (-.85); 1 pair: too few to tell; "
        "0.0 of 16 distinct answers against 3.0 (-3.0)."
    )


def test_what_cannot_be_compared_says_why():
    found = made()
    assert comparison_verdict(found, "ict") == (
        "ict: neither entropy nor reward is recorded for it and uniform, so nothing is compared."
    )
    found["arms"]["ict"] = {"7": "ict-7"}
    assert comparison_verdict(found, "ict") == ("ict: it has no seed in common with uniform, so nothing is compared.")
    found["arms"]["ict"] = {}
    assert comparison_verdict(found, "ict") == "ict: no run of it finished, so nothing is compared."
    found["arms"] = {"uniform": {}, "ict": {"0": "ict-0"}}
    assert comparison_verdicts(found) == {"ict": "ict: no run of uniform finished, so nothing is compared."}


def test_an_old_file_does_not_say_how_many_samples():
    found = made(KEPT, row("last", PASS, 0.85, 0.05, (-0.01, 0.10)))
    del found["samples"]
    assert comparison_verdict(found, "ict").startswith("ict kept 13.1 distinct answers where uniform kept 7.4 (")


def test_the_headline_ends_at_the_first_semicolon():
    sentence = comparison_verdict(made(*WORSE, levels=LEVELS), "ict")
    head, rest = headline(sentence)
    assert head + rest == sentence and rest.startswith("; at equal pass@1")
