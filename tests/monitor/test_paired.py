"""Paired statistics against hand-worked answers and scipy; the table of a hand-made comparison."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from scipy import stats

from monitor.commands.comparison_table import cells, markdown, notes, print_tables
from monitor.errors import StoreError
from monitor.recorder import Recorder
from monitor.records import Alert, RunInfo, StepRecord
from monitor.stats.comparison import live_verdicts, load_comparison, paired_comparison, save_comparison
from monitor.stats.paired import bootstrap_interval, holm, paired_difference, sign_flip_p
from monitor.store.tail import Tail


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),  # |sum| = 6 only with +++ and ---
        ([1.0, 2.0, -3.0], 1.0),  # sum 0: every pattern reaches it
        ([1.0, 1.0, 1.0, -1.0], 10 / 16),  # |sum| >= 2: 2 patterns with 4, 8 with 2
        ([0.0, 0.0], 1.0),
        ([5.0] * 6, 2 / 64),
    ],
)
def test_sign_flips_by_hand(differences, p):
    assert sign_flip_p(np.array(differences)) == p


def test_sign_flips_equal_scipys_exact_permutation_test():
    gaps = np.random.default_rng(3).normal(0.4, 1, 7)
    found = stats.permutation_test(
        (gaps,), lambda x: x.mean(), permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert sign_flip_p(gaps) == pytest.approx(found.pvalue, abs=1e-12)


def test_many_pairs_are_sampled_near_the_normal_answer():
    gaps = np.random.default_rng(0).normal(0.3, 1, 60)
    assert sign_flip_p(gaps) == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue, abs=0.02)


def test_a_paired_difference_by_hand_and_by_scipy():
    base, other = np.array([0.5, 0.6, 0.7]), np.array([0.6, 0.8, 1.0])  # differences .1 .2 .3
    found = paired_difference(base, other)
    assert (found.n, found.p, found.p_smallest) == (3, 0.25, 0.25)
    assert found.mean == pytest.approx(0.2)
    assert found.p_t == pytest.approx(stats.ttest_rel(other, base).pvalue)
    # 27 equally likely resamples: their mean is .1 with chance 1/27 = 3.7 %, so the 2.5 % point is .1
    assert (found.low, found.high) == pytest.approx((0.1, 0.3))


def test_few_or_constant_pairs_leave_open_what_they_do_not_determine():
    one = paired_difference(np.array([1.0]), np.array([3.0]))
    assert (one.n, one.mean) == (1, 2.0) and np.isnan([one.low, one.high, one.p, one.p_t]).all()
    two = paired_difference(np.array([1.0, 1.0]), np.array([2.0, 4.0]))
    assert (two.mean, two.p) == (2.0, 0.5) and np.isnan(two.low) and two.p_t > 0
    same = paired_difference(np.ones(4), np.full(4, 1.5))
    assert (same.low, same.high, same.p) == (0.5, 0.5, 2 / 16) and np.isnan(same.p_t)
    assert paired_difference(np.array([1.0, np.nan, 2.0]), np.array([2.0, 5.0, 4.0])).n == 2
    with pytest.raises(ValueError, match="2 values cannot be paired with 3"):
        paired_difference(np.zeros(3), np.zeros(2))


def test_the_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20  # of the mean of 400
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert bootstrap_interval(values) == (low, high)


def test_holm_by_hand():
    # sorted .01 .03 .04: .01 * 3, .03 * 2, .04 * 1 = .04 raised to .06
    assert holm(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    # .5 * 2 = 1, then .75 * 1 raised to 1; a p is never above 1
    assert holm(np.array([0.75, 0.5])).tolist() == [1.0, 1.0] and holm(np.array([0.7, 0.7])).tolist() == [1.0, 1.0]
    assert holm(np.array([0.2])).tolist() == [0.2] and not len(holm(np.zeros(0)))


class OneAlert:
    def observe(self, step, scalars):
        return [Alert("entropy_collapse", "warning", "firing", step, step, 0.1, 1.0, 0.3, "m", "")] if step == 4 else []


def record(store, name, kind, seed, passed, entropy, alert=False, normalise="selected"):
    """Evaluations at steps 0, 2, 4 with pass@1 `passed`; entropy of steps 1 to 4."""
    config = {"seed": seed, "weighting": {"kind": kind, "normalise": normalise}}
    info = RunInfo(name=name, model="m", task="t", weighting=kind, seed=seed, comparison="c", config=config)
    with Recorder(store, info, engine=OneAlert() if alert else None) as recorder:
        recorder.record(StepRecord(0, {"eval/heldout/pass@1": passed[0], "eval/heldout/distinct": 1.0}))
        for step in range(1, 5):
            scalars = {
                "entropy": entropy[step - 1], "tokens": 100.0, "selected_share": 0.5, "perf/step_s": float(step),
                "weight_mean": 0.5, "effective_sample_share": 0.5,
            }  # fmt: skip
            if step % 2 == 0:
                scalars |= {"eval/heldout/pass@1": passed[step // 2], "eval/heldout/distinct": 1.0 + step}
            recorder.record(StepRecord(step, scalars))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    store = tmp_path_factory.mktemp("paired")
    record(store, "u0", "uniform", 0, (0.2, 0.6, 0.8), (1.0, 0.8, 0.6, 0.4))
    record(store, "u1", "uniform", 1, (0.2, 0.4, 0.6), (1.0, 0.8, 0.6, 0.5), alert=True)
    record(store, "i0", "ict", 0, (0.2, 0.3, 0.4), (1.0, 1.0, 0.9, 0.9), normalise="all")
    record(store, "i1", "ict", 1, (0.2, 0.3, 0.4), (1.0, 1.0, 0.9, 0.8), normalise="all")
    tail = Tail(store)
    tail.poll()
    configs = {name: entry.info["config"] for name, entry in tail.runs.items()}
    found = paired_comparison(
        tail.cursor(), "c", {"uniform": {0: "u0", 1: "u1"}, "ict": {0: "i0", 1: "i1"}}, configs, failed=["i2"]
    )
    tail.close()
    return store, found


def row(found, when, figure, arm):
    return next(r for r in found["rows"] if (r["when"], r["figure"], r["arm"]) == (when, figure, arm))


def test_the_last_step_is_paired_by_seed(comparison):
    _, found = comparison
    assert row(found, "last", "eval/heldout/pass@1", "uniform")["mean"] == pytest.approx(0.7)
    ict = row(found, "last", "eval/heldout/pass@1", "ict")
    assert ict["difference"] == pytest.approx(-0.3)  # (.4 - .8 + .4 - .6) / 2
    assert (ict["pairs"], ict["p"], ict["p_smallest"], ict["low"]) == (2, 0.5, 0.5, None)
    assert ict["values"] == {"0": 0.4, "1": 0.4} and ict["sd"] == 0.0
    kept = row(found, "last", "entropy_kept", "ict")
    assert kept["mean"] == pytest.approx(0.85) and kept["difference"] == pytest.approx(0.4)


def test_equal_pass_is_taken_pair_by_pair_on_straight_lines(comparison):
    """ict's best is .4: uniform 0 reaches it half way to step 2 (.2 to .6), so at 1; uniform 1 at 2."""
    _, found = comparison
    assert found["levels"]["ict"] == {"0": 0.4, "1": 0.4}
    step = row(found, "equal", "step", "ict")
    assert step["values"] == {"0": 4.0, "1": 4.0} and step["baseline_mean"] == pytest.approx(1.5)
    distinct = row(found, "equal", "eval/heldout/distinct", "ict")
    assert distinct["mean"] == 5.0 and distinct["baseline_mean"] == pytest.approx(
        2.5
    )  # 1 + step, both times 1.5 -> 2.5
    assert not any(r["when"] == "equal" and r["arm"] == "uniform" for r in found["rows"])


def test_the_whole_run_counts_cost_alerts_and_states_the_normalisation(comparison):
    _, found = comparison
    assert row(found, "run", "median_step_s", "ict")["mean"] == 2.5
    assert row(found, "run", "tokens_trained", "uniform")["mean"] == 200.0  # 4 steps x 100 tokens x 0.5
    assert row(found, "run", "alerts_fired", "uniform")["mean"] == 0.5
    assert row(found, "run", "weight_over_denominator", "ict")["mean"] == 0.5  # normalise all
    assert row(found, "run", "weight_over_denominator", "uniform")["mean"] == 1.0
    assert found["normalise"] == {"uniform": "selected", "ict": "all"}
    assert set(found["configuration"]) == {"weighting.kind", "weighting.normalise"}


SENTENCE = (  # by hand: 1 + 4 = 5 answers at the end in every run; .4 - .7 = -.3; at pass@1 .4 they have 5 and 2.5
    "ict against uniform, 2 pairs: too few to tell; 5.0 distinct answers against 5.0 (+0.0), pass@1 .40 against .70 "
    "(-.30); at equal pass@1 (.40) 5.0 distinct answers against 2.5 (+2.5)."
)


def test_the_same_sentence_stands_everywhere(comparison, capsys):
    store, found = comparison
    assert found["verdicts"] == {"ict": SENTENCE}
    path = save_comparison(store, found)
    assert json.loads(path.read_text())["verdicts"] == {"ict": SENTENCE}
    print_tables(found)
    assert capsys.readouterr().out.startswith(f"{SENTENCE}\n\nAt the last step\n")
    assert markdown(found).startswith(f"- {SENTENCE}\n\n**At the last step**")
    tail = Tail(store)
    tail.poll()
    arms = {"uniform": {0: "u0", 1: "u1"}, "ict": {0: "i0", 1: "i1"}}
    assert live_verdicts(tail.cursor(), arms, {}) == {"ict": SENTENCE}
    of_16 = live_verdicts(tail.cursor(), arms, {run: {"eval": {"samples": 16}} for run in ("u0", "i0")})
    assert of_16 == {"ict": SENTENCE.replace("5.0 distinct", "5.0 of 16 distinct")}
    tail.close()


def test_a_comparison_that_was_stored_without_verdicts_gets_them_from_its_rows(comparison, tmp_path):
    _, found = comparison
    new = {"p_holm", "p_t_holm"}
    rows = [{key: value for key, value in row.items() if key not in new} for row in found["rows"]]
    old = {key: value for key, value in found.items() if key not in ("verdicts", "samples")} | {"rows": rows}
    save_comparison(tmp_path, old)
    assert load_comparison(tmp_path, "c")["verdicts"] == {"ict": SENTENCE}


def test_p_is_corrected_for_the_number_of_arms(comparison, tmp_path):
    """Of two arms: ict's two pairs give p .5, u1's one pair gives none. Of three, with ict twice: .5 * 2 = 1."""
    store, found = comparison
    assert row(found, "last", "entropy_kept", "ict")["p_holm"] == 0.5
    tail = Tail(store)
    tail.poll()
    ict = {0: "i0", 1: "i1"}
    arms = {"uniform": {0: "u0", 1: "u1"}, "ict": ict, "again": ict, "one": {0: "i0"}, "none": {}}
    more = paired_comparison(tail.cursor(), "more", arms, {})
    tail.close()
    kept = {arm: row(more, "last", "entropy_kept", arm) for arm in ("ict", "again", "one")}
    assert [kept[arm].get("p_holm") for arm in kept] == [1.0, 1.0, None]
    assert kept["ict"]["p_t_holm"] == pytest.approx(min(1, 2 * kept["ict"]["p_t"]))
    assert row(more, "equal", "eval/heldout/distinct", "ict")["p_holm"] == 1.0
    assert "p_holm" not in row(more, "run", "median_step_s", "ict")
    assert more["verdicts"]["none"] == "none: no run of it finished, so nothing is compared."
    assert "4 arms were compared with uniform" in " ".join(notes(more)) and "arms were" not in " ".join(notes(found))
    with save_comparison(tmp_path, more).with_suffix(".csv").open() as lines:
        stored = [r for r in csv.DictReader(lines) if (r["when"], r["figure"]) == ("last", "entropy_kept")]
    assert [r["p_holm"] for r in stored] == ["", "1.0", "1.0", ""]


def test_it_is_stored_and_read_back_with_the_nearest_name_for_a_wrong_one(comparison):
    store, found = comparison
    path = save_comparison(store, found)
    assert load_comparison(store, "c") == json.loads(path.read_text()) == found
    with path.with_suffix(".csv").open() as lines:
        table = list(csv.DictReader(lines))
    assert len(table) == len(found["rows"])
    kept = {r["arm"]: r["difference"] for r in table if r["figure"] == "entropy_kept" and r["when"] == "last"}
    assert kept["uniform"] == "" and float(kept["ict"]) == pytest.approx(0.4)
    save_comparison(store, found | {"comparison": "mine"})
    with pytest.raises(StoreError, match=r"No comparison 'mime' in store .* Did you mean 'mine'\? Known: c, mine\."):
        load_comparison(store, "mime")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda found: "", "it is no JSON object, or cut off"),
        (lambda found: "[1]", "it is no JSON object, or cut off"),
        (lambda found: json.dumps(found)[:-9], "it is no JSON object, or cut off"),
        (lambda found: {**found, "rows": 3}, "rows: Input should be a valid list"),
        (lambda found: {**found, "created": "now"}, "created: Input should be a valid number"),
        (lambda found: {**found, "arms": {"uniform": {"s": "u0"}}}, "should match pattern"),
        (lambda found: {**found, "baseline": "none"}, "names an arm that is none of its arms, uniform, ict"),
        (lambda found: {**found, "rows": [{**found["rows"][0], "mean": "x"}]}, "rows.0.mean: Input should be a valid"),
        (lambda found: {**found, "rows": [{**found["rows"][1], "low": 1.0}]}, "pass@1 and ict is not whole"),
        (lambda found: {key: value for key, value in found.items() if key != "levels"}, "levels: Field required"),
    ],
)
def test_a_damaged_one_is_refused_in_one_line(comparison, tmp_path, damage, why):
    path = save_comparison(tmp_path, comparison[1])
    text = damage(comparison[1])
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(StoreError) as refused:
        load_comparison(tmp_path, "c")
    assert (
        why in str(refused.value)
        and "\n" not in str(refused.value)
        and "Run `rlvr compare` again" in str(refused.value)
    )


def test_a_figure_of_a_newer_version_is_shown_by_its_key(comparison, tmp_path):
    _, found = comparison
    rows = [{**row, "figure": "new/figure"} for row in found["rows"][:1]]
    save_comparison(tmp_path, {**found, "rows": rows})
    assert cells(load_comparison(tmp_path, "c"), "last")[1] == [["new/figure", "0.7 ± 0.141"]]


def test_tables_say_what_they_show(comparison, capsys):
    _, found = comparison
    header, rows = cells(found, "last")
    assert header == ["", "uniform", "ict"]
    assert rows[0] == ["pass@1, heldout", "0.7 ± 0.141", "0.4 ± 0\n-0.3, p 0.5"]
    text = markdown(found)
    assert "| pass@1, heldout | 0.7 ± 0.141 | 0.4 ± 0<br>-0.3, p 0.5 |" in text
    assert "| weighting.normalise | selected | all |" in text
    said = " ".join(notes(found))
    assert "With 2 pairs p cannot be below 0.5." in said and "uniform selected, ict all" in said
    assert "Failed and left out: i2." in said
    print_tables(found)
    assert "At equal pass@1" in capsys.readouterr().out
