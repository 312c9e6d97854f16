"""Figures are pure: what goes in as a frame comes out as the values, colours and labels of a Plotly figure."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from dashboard.figures import distributions
from dashboard.figures.lines import (
    MOST_MARKED,
    Line,
    entropy_against_reward,
    is_flat,
    lines,
    mean_line,
    pass_against_distinct,
    reward_and_pass,
    seed_band,
    smoothed,
)
from dashboard.figures.marks import MOST_MILESTONES, add_actions, add_milestones, add_outlook
from dashboard.figures.spent import SPENT, stand_over
from dashboard.figures.theme import DARK, LIGHT, arm_colours, number_format
from monitor.alerts.outlook import Outlook
from monitor.metrics import METRICS, inner_edges, n_cells

STEPS = np.arange(1, 11)
THEMES = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])


def alerts(*, resolved: int | None = None):
    """A warning at step 4 that turned critical at 6, each with its own numbers, and may have ended."""
    rows = [
        ("warning", "firing", 4, 6.0, 0.28, 0.3, "fell <b>far</b>", "look"),
        ("critical", "firing", 6, np.nan, 0.08, 0.1, "fell farther", "stop"),
    ]
    if resolved is not None:
        rows[1] = (*rows[1][:3], float(resolved), *rows[1][4:])
        rows.append(("critical", "resolved", resolved, np.nan, 0.5, 0.3, "it is back", ""))
    names = ("severity", "state", "step", "until", "value", "threshold", "message", "action")
    columns = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    same = {"run": "a", "rule": "entropy_collapse", "first_step": 4, "baseline": 1.0}
    return columns | {name: np.array([value] * len(rows)) for name, value in same.items()}


def fan():
    names = ("p5", "p25", "p50", "p75", "p95", "p99", "mean")
    return {"step": STEPS, "n": STEPS} | {name: np.full(10, 0.1 * (i + 1)) for i, name in enumerate(names)}


def matrix(edges_id: str = "deviation96"):
    counts = np.zeros((10, n_cells(edges_id)), np.int64)
    counts[:, 3] = np.arange(10)
    return {"step": STEPS, "last_step": STEPS, "counts": counts, "edges_id": np.array([edges_id] * 10, object)}


@THEMES
@pytest.mark.parametrize("key", list(METRICS))
def test_labels_and_units_come_from_metrics(theme, key: str) -> None:
    fig = lines(theme, key, [Line("a", STEPS, STEPS * 0.1, theme.accent)])
    assert fig.layout.title.text == METRICS[key].label
    assert fig.layout.title.subtitle.text == METRICS[key].unit
    assert fig.layout.meta["help"] == METRICS[key].help
    assert fig.layout.yaxis.tickformat == (".3~%" if METRICS[key].unit == "share" else None)
    # a share that is 0 throughout stands on the axis, not in the middle of -100 % to 100 %
    assert fig.layout.yaxis.rangemode == ("nonnegative" if METRICS[key].unit == "share" else None)


def test_lines_carry_their_values_as_binary() -> None:
    fig = lines(LIGHT, "entropy", [Line("a", STEPS, STEPS * 0.1, "#112233"), Line("b", STEPS, STEPS * 0.2, "#445566")])
    np.testing.assert_allclose(fig.data[1].y, STEPS * 0.2)
    assert fig.data[0].line.color == "#112233" and fig.layout.showlegend
    assert "bdata" in json.loads(fig.to_json())["data"][0]["y"], "numpy goes over the wire as base64, never as a list"


@THEMES
def test_an_alert_is_a_rule_a_span_and_marks(theme) -> None:
    line = [Line("a", STEPS, STEPS * 0.1, theme.accent)]
    firing = lines(theme, "entropy", line, alerts=alerts())
    warned, turned, rule, second = firing.layout.shapes
    assert (warned.x0, warned.x1, rule.x0, rule.x1) == (4, 6, 4, 4)
    assert (turned.x0, turned.x1, second.x0, second.x1) == (6, 10, 6, 6)  # to the last step: it still fires
    assert [rule.line.color, second.line.color] == [theme.severity["warning"], theme.severity["critical"]]
    assert [trace.name for trace in firing.data[1:]] == ["alert fires", "alert gets worse"]
    resolved = lines(theme, "entropy", line, alerts=alerts(resolved=8))
    assert resolved.layout.shapes[1].x1 == 8
    assert [trace.name for trace in resolved.data[1:]] == ["alert fires", "alert gets worse", "alert resolved"]


def test_alerts_that_fire_together_are_shaded_once() -> None:
    one, other = alerts(), alerts(resolved=8)  # critical from 6 on, and another alert: a warning from 2 to 5
    other = {name: column[1:] for name, column in other.items()}
    other |= {"step": np.array([2, 5]), "until": np.array([5, np.nan]), "severity": np.array(["warning", "warning"])}
    both = {name: np.concatenate([one[name], other[name]]) for name in one}
    fig = lines(LIGHT, "entropy", [Line("a", STEPS, STEPS * 0.1, LIGHT.accent)], alerts=both)
    shades = [shape for shape in fig.layout.shapes if shape.type == "rect"]
    assert [(shade.x0, shade.x1) for shade in shades] == [(2, 4), (4, 5), (5, 6), (6, 10)]
    assert len({shade.fillcolor for shade in shades[:3]}) == 1
    assert shades[3].fillcolor != shades[0].fillcolor


def test_each_mark_tells_the_numbers_of_its_own_transition() -> None:
    line = [Line("a", STEPS, STEPS * 0.1, LIGHT.accent)]
    fires, worse, ends = lines(LIGHT, "entropy", line, alerts=alerts(resolved=8)).data[1:]
    assert [list(mark.x) for mark in (fires, worse, ends)] == [[4], [6], [8]]
    assert list(fires.customdata) == [
        "entropy_collapse (warning)<br>value 0.28, baseline 1, threshold 0.3<br>fell &lt;b&gt;far&lt;/b&gt;"
    ]
    assert list(worse.customdata) == [
        "entropy_collapse (critical)<br>value 0.08, baseline 1, threshold 0.1<br>fell farther"
    ]
    assert list(ends.customdata) == [
        "entropy_collapse (critical)<br>value 0.5, baseline 1, threshold 0.3<br>it is back"
    ]
    assert worse.hovertemplate.startswith("<b>gets worse at step %{x}</b>")  # one of a near step shows beside it
    colours = [mark.marker.color[0] for mark in (fires, worse)]
    assert colours == [LIGHT.severity["warning"], LIGHT.severity["critical"]]


def test_points_are_marked_one_by_one_only_where_they_are_few() -> None:
    for n, mode in ((1, "lines+markers"), (MOST_MARKED, "lines+markers"), (MOST_MARKED + 1, "lines")):
        steps = np.arange(n)
        fig = lines(LIGHT, "reward", [Line("a", steps, steps / 10, LIGHT.accent, points=True)])
        assert fig.data[0].mode == mode and len(fig.data[0].x) == n


def test_no_alert_leaves_the_figure_alone() -> None:
    none = {name: column[:0] for name, column in alerts().items()}
    fig = lines(LIGHT, "entropy", [Line("a", STEPS, STEPS, LIGHT.accent)], alerts=none)
    assert not fig.layout.shapes and len(fig.data) == 1


def test_an_action_is_a_dotted_line_and_a_diamond_that_tells_it() -> None:
    """Two actions of one step share a line, and their marks stand below each other; alerts stay."""
    acted = {
        "step": np.array([4, 4, 7]),
        "message": np.array(["lower_lr for <b>x</b>: optim.lr 3 -> 1.", "checkpoint", "stop"], object),
    }
    fig = add_actions(lines(LIGHT, "entropy", [Line("a", STEPS, STEPS, LIGHT.accent)], alerts=alerts()), acted, LIGHT)
    dotted = [shape for shape in fig.layout.shapes if shape.line.dash == "dot"]
    assert [shape.x0 for shape in dotted] == [4, 7] and len(fig.layout.shapes) > 2
    marks = fig.data[-1]
    np.testing.assert_allclose(marks.x, [4, 4, 7])
    np.testing.assert_allclose(marks.y, [0.88, 0.79, 0.88])
    assert marks.customdata[0] == "lower_lr for &lt;b&gt;x&lt;/b&gt;: optim.lr 3 -&gt; 1."


def milestones(*rows: tuple[int, str, str]) -> dict[str, np.ndarray]:
    step, what, message = zip(*rows, strict=True)
    return {"step": np.array(step), "what": np.array(what, object), "message": np.array(message, object)}


def test_milestones_are_other_signs_than_alerts_at_the_foot_of_the_chart() -> None:
    fig = lines(LIGHT, "entropy", [Line("a", STEPS, STEPS, LIGHT.accent)], alerts=alerts())
    before, lines_before = len(fig.data), len(fig.layout.shapes)
    of_alerts = {trace.marker.symbol for trace in fig.data[1:]} | {"diamond"}
    found = milestones((0, "evaluation", "pass@1, heldout: 25.0%"), (4, "checkpoint", "Saved as <b>x</b>."),
                       (5, "evaluation", "pass@1, heldout: 30.0%"), (6, "resume", "Attempt 2 begins."))  # fmt: skip
    add_milestones(fig, found, LIGHT)
    marks = {trace.name: trace for trace in fig.data[before:]}
    assert {name: list(mark.x) for name, mark in marks.items()} == {
        "evaluation": [0, 5], "checkpoint": [4], "resume": [6],
    }  # fmt: skip
    assert not of_alerts & {mark.marker.symbol for mark in marks.values()}
    assert len({mark.marker.symbol for mark in marks.values()}) == 3
    assert all(np.all(np.array(mark.y) < 0.1) and mark.yaxis == "y2" for mark in marks.values())
    assert marks["checkpoint"].customdata[0] == "Saved as &lt;b&gt;x&lt;/b&gt;."
    assert "checkpoint at step %{x}" in marks["checkpoint"].hovertemplate
    assert len(fig.layout.shapes) == lines_before, "they have no lines: those are of alerts and actions"


def test_milestones_that_nobody_could_tell_apart_are_not_drawn() -> None:
    many = [(step, "evaluation", "") for step in range(MOST_MILESTONES + 1)]
    fig = add_milestones(lines(LIGHT, "entropy", [Line("a", STEPS, STEPS, LIGHT.accent)]),
                         milestones(*many, (7, "checkpoint", "")), LIGHT)  # fmt: skip
    assert [trace.name for trace in fig.data[1:]] == ["checkpoint"]


def test_the_fan_holds_quantiles_and_their_mean() -> None:
    fig = distributions.entropy_fan(LIGHT, fan(), LIGHT.accent, alerts=alerts())
    by_name = {trace.name: trace for trace in fig.data}
    np.testing.assert_allclose(by_name["mean"].y, 0.7)
    np.testing.assert_allclose(by_name["p5–p95"].y, 0.5)
    assert by_name["p5–p95"].fill == "tonexty" and by_name["p99"].visible == "legendonly"
    log = distributions.entropy_fan(LIGHT, fan() | {"p5": np.zeros(10)}, LIGHT.accent, log=True)
    assert log.layout.yaxis.type == "log"
    assert all((np.asarray(trace.y) > 0).all() for trace in log.data), "a log axis cannot show 0"


@THEMES
def test_the_heatmap_stands_on_the_fixed_cells(theme) -> None:
    fig = distributions.histogram_map(theme, matrix(), "deviation")
    heat = fig.data[0]
    assert heat.z.shape == (n_cells("deviation96"), 10) == (len(heat.y) - 1, len(heat.x) - 1)
    np.testing.assert_array_equal(heat.customdata[3], np.arange(10))
    np.testing.assert_array_equal(heat.z[3], np.round(np.log1p(np.arange(10)) * 255 / np.log(10)))  # 9 is the highest
    np.testing.assert_allclose(heat.y[1:-1], inner_edges("deviation96"))
    assert heat.x[0] == 0.5 and heat.x[-1] == 10.5
    assert fig.layout.yaxis.type == "log" and heat.colorbar.title.text == "tokens"
    assert heat.colorscale[0][1] == theme.paper, "no token, no colour"


def test_the_difference_is_centred_on_zero() -> None:
    gap = np.zeros((10, n_cells("nats96")))
    gap[:, 5], gap[:, 50] = -0.02, 0.02
    fig = distributions.difference_map(LIGHT, {"step": STEPS, "difference": gap}, "entropy", ("uniform", "ict"))
    heat = fig.data[0]
    assert heat.zmid == 0 and heat.zmin == -heat.zmax < 0
    np.testing.assert_allclose(heat.z[50], 2.0)
    assert fig.layout.title.text == "Entropy: ict minus uniform"


def test_selected_against_all_are_shares() -> None:
    every, selected = matrix("nats96"), matrix("nats96")
    selected["counts"] = np.roll(selected["counts"], 40, axis=1)
    fig = distributions.selected_against_all(LIGHT, every, selected, LIGHT.accent)
    assert [trace.name for trace in fig.data] == ["all tokens", "selected (weight > 0)"]
    assert fig.data[0].line.color == LIGHT.uniform
    for trace, cell in zip(fig.data, (3, 43), strict=True):
        assert np.sum(trace.y) == pytest.approx(1.0) and np.argmax(trace.y) == cell


def test_joint_counts_put_entropy_across() -> None:
    counts = np.zeros((n_cells("nats24"), n_cells("deviation24")), np.int64)
    counts[4, 9] = 5
    heat = distributions.joint_map(LIGHT, counts).data[0]
    assert heat.customdata[9, 4] == 5 and heat.customdata.sum() == 5


def test_reward_and_pass_share_a_panel() -> None:
    passes = [Line("pass@1", STEPS[::5], STEPS[::5] / 10, LIGHT.second, points=True)]
    fig = reward_and_pass(LIGHT, [Line("Reward", STEPS, STEPS / 10, LIGHT.accent)], passes, alerts=alerts())
    assert fig.data[1].mode == "lines+markers" and fig.layout.showlegend


def test_a_smoothed_line_is_an_exponential_mean_before_its_pale_values() -> None:
    line = Line("a", np.arange(4.0), np.array([0.0, 1.0, np.nan, 1.0]), LIGHT.accent)
    raw, mean = smoothed(line, 3)  # weight 2 / (3 + 1) = .5
    np.testing.assert_allclose(mean.y, [0.0, 0.5, 0.5, 0.75])
    assert raw.faint and not mean.faint and mean.name == "a, mean of 3 steps"
    np.testing.assert_array_equal(raw.y, line.y)
    assert smoothed(line, 0) == [line] and smoothed(replace(line, points=True), 3)[0].points


@pytest.mark.parametrize(
    ("values", "flat"),
    [([0.0, 0.0], True), ([1e-13, 3e-13], True), ([1e6, 1e6 + 0.5], True), ([0.0, 0.01], False), ([2.0], False)],
)
def test_what_never_moves_is_flat(values: list[float], flat: bool) -> None:
    assert is_flat(np.array([*values, np.nan])) == flat


def test_a_figure_moves_to_what_was_spent_with_its_marks() -> None:
    line = Line("a", STEPS, STEPS * 0.1, LIGHT.accent)
    fig = lines(LIGHT, "entropy", [line], alerts=alerts(resolved=8))
    stand_over(fig, "tokens", lambda steps: 50.0 * steps)  # 50 tokens a step
    np.testing.assert_allclose(fig.data[0].x, 50 * STEPS)
    fires = next(trace for trace in fig.data if trace.name == "alert fires")
    assert list(fires.x) == [200.0] and list(fires.text) == ["4"]  # a mark goes on telling its step
    assert fires.hovertemplate.startswith("<b>fires at step %{text}</b>")
    upright = [shape for shape in fig.layout.shapes if shape.type == "line"]
    assert [(shape.x0, shape.x1) for shape in upright] == [(200.0, 200.0), (300.0, 300.0)]  # fired at 4, worse at 6
    assert fig.layout.xaxis.title.text == SPENT["tokens"]
    # from 50 to 500 tokens, with a hundredth of that as room
    assert fig.layout.xaxis.autorangeoptions.to_plotly_json() == {"clipmin": 50.0, "clipmax": 504.5}


def test_a_map_moves_to_what_was_spent_before_and_after_its_columns() -> None:
    fig = distributions.histogram_map(LIGHT, matrix("nats96"), "entropy")
    assert list(fig.data[0].x[:2]) == [0.5, 1.5]
    stand_over(fig, "hours", lambda steps: 0.25 * steps)
    np.testing.assert_allclose(fig.data[0].x, 0.25 * np.arange(11))  # the first column from nothing to step 1
    assert "hours of training" in fig.data[0].hovertemplate and "step" not in fig.data[0].hovertemplate


def test_the_cone_leads_to_the_floor_and_ends_with_the_plan() -> None:
    # .2 nat falling by 5 % a step: ln(.1 / .2) / -.05 = 13.9 steps to the floor of .1
    ahead = Outlook(0.2, 1.0, 0.1, "falling", 30, 11.0, 13.863, 18.0, slope=-0.05, error=0.005)
    drawn = [Line("a", np.arange(1.0, 51), np.linspace(1, 0.2, 50), LIGHT.accent)]
    fig = add_outlook(lines(LIGHT, "entropy", drawn), LIGHT, ahead, 50.0, 1000.0)
    low, high, middle = fig.data[-3:]
    assert middle.x[0] == 50 and middle.x[-1] == pytest.approx(63.863)
    assert middle.y[0] == 0.2 and middle.y[-1] == pytest.approx(0.1, abs=1e-4)
    assert np.all(low.y[1:] < middle.y[1:]) and np.all(high.y[1:] > middle.y[1:])
    assert [shape.y0 for shape in fig.layout.shapes] == [1.0, 0.1]
    assert [note.text for note in fig.layout.annotations] == ["baseline 1", "floor 0.1"]
    ended = add_outlook(lines(LIGHT, "entropy", drawn), LIGHT, ahead, 50.0, 0.0)
    assert len(ended.data) == 1 and len(ended.layout.shapes) == 2  # nothing more comes


def test_two_steps_are_drawn_as_shares() -> None:
    one, two = matrix("nats96"), matrix("nats96")
    earlier = {name: column[:1] for name, column in one.items()}
    earlier["counts"] = np.eye(1, n_cells("nats96"), 7, dtype=np.int64) * 4
    fig = distributions.step_against_step(LIGHT, earlier, two)
    assert fig.layout.title.text == "Entropy, step 10 against step 1" and fig.data[0].name == "step 1"
    assert fig.data[0].y[7] == 1.0 and np.sum(fig.data[1].y) == pytest.approx(1.0)


def test_the_law_is_drawn_where_it_fits_and_nothing_broke_it() -> None:
    entropy = np.linspace(0.1, 1.0, 20)
    reward = 1.0 - 0.2 * np.exp(entropy)  # ceiling b - a = .8
    fig = entropy_against_reward(LIGHT, np.arange(20), entropy, reward, LIGHT.accent, law=True)
    assert fig.data[1].name == "law, r² 1.00, ceiling 0.80" and fig.data[1].y[0] == pytest.approx(0.8)
    assert len(entropy_against_reward(LIGHT, np.arange(20), entropy, reward, LIGHT.accent, law=False).data) == 1
    noise = np.random.default_rng(0).normal(size=20)
    unfit = entropy_against_reward(LIGHT, np.arange(20), entropy, noise, LIGHT.accent, law=True)
    assert len(unfit.data) == 1 and "the law does not fit" in unfit.data[0].name


def test_pass_against_distinct_marks_the_newest() -> None:
    fig = pass_against_distinct(LIGHT, [Line("a", STEPS / 10, 3 - STEPS / 10, LIGHT.accent)])
    assert fig.data[0].marker.size[-1] > fig.data[0].marker.size[0]
    assert fig.layout.xaxis.title.text and fig.layout.yaxis.title.text


def test_uniform_is_grey_and_the_weighted_run_the_accent() -> None:
    for theme in (LIGHT, DARK):
        colours = arm_colours(["ict", "uniform", "random"], theme)
        assert colours["uniform"] == theme.uniform and colours["ict"] == theme.accent
        assert len(set(colours.values())) == 3


def test_no_band_under_three_seeds() -> None:
    members = [Line(str(i), STEPS, STEPS + float(i), LIGHT.accent, faint=True) for i in range(3)]
    assert seed_band(LIGHT, members[:2], LIGHT.accent) == []
    low, high = seed_band(LIGHT, members, LIGHT.accent)
    mean = mean_line("ict", members, LIGHT.accent)
    np.testing.assert_allclose(mean.y, STEPS + 1.0)
    assert (low.y <= mean.y).all() and (mean.y <= high.y).all() and (low.y < high.y).all()


def test_the_mean_line_uses_common_steps_only() -> None:
    a, b = Line("a", STEPS, STEPS * 1.0, "#000000"), Line("b", STEPS[:4], STEPS[:4] * 3.0, "#000000")
    mean = mean_line("x", [a, b], "#000000")
    np.testing.assert_array_equal(mean.x, STEPS[:4])
    np.testing.assert_allclose(mean.y, STEPS[:4] * 2.0)


def test_empty_frames_give_empty_figures() -> None:
    empty = {"step": np.zeros(0), "last_step": np.zeros(0), "counts": np.zeros((0, 1)), "edges_id": np.zeros(0, object)}
    assert not distributions.histogram_map(LIGHT, empty, "deviation").data
    assert not distributions.joint_map(LIGHT, np.zeros((0, 0))).data
    assert not distributions.selected_against_all(LIGHT, empty, empty, LIGHT.accent).data


def test_formats() -> None:
    assert number_format("share") == ".1%" and number_format("nats") == ".4~g"


def test_the_dashboard_imports_no_torch_and_launching_no_streamlit() -> None:
    code = "import dashboard.app, dashboard.launch, sys; assert not {'torch', 'trainer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    code = "import dashboard.launch, sys; assert not {'streamlit', 'plotly', 'duckdb', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
