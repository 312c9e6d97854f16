"""Text of runs reaches the browser through dashboard/escape.py and by no other way."""

from __future__ import annotations

import ast
from html import unescape
from pathlib import Path

import numpy as np
import pytest

import dashboard
from dashboard.escape import html, markdown, plotly
from dashboard.figures import distributions, intervals, lines, marks
from dashboard.figures.query import query_plot
from dashboard.figures.theme import LIGHT

ROOT = Path(dashboard.__file__).parent
# what draws Markdown or HTML -> the place of that text among its arguments; labels and helps are keywords as well
OURS = {"choose": 1, "link": 1, "_multiselect": 1}
SINKS = OURS | dict.fromkeys(
    "markdown caption write text title header subheader error warning info success toast badge metric html "
    "button checkbox toggle radio expander popover tabs text_input text_area number_input slider select_slider "
    "selectbox multiselect pills segmented_control exception".split(),
    0,
)
KEYWORDS = {"help", "label", "body"}
EVIL = "<b>x</b><a href='http://a.example'>a</a>"


def test_values_are_text_and_templates_are_markdown():
    assert markdown("**{}** `code`", "a_b") == "**a&#95;b** `code`"
    assert markdown("{x:.3g} of {y!r}", x=1 / 3, y="it's") == "0&#46;333 of &#34;it&#39;s&#34;"
    assert markdown("{}", "# a\n\n    code\n- b") == "&#35; a code &#45; b"
    for text in ("![x](http://a)", "$x$", ":smile:", ":material/delete:", ":red[x]", "<b>", "a\\*b", "1. a", "&lt;"):
        assert unescape(markdown("{}", text)).replace("\u2060", "") == text
        assert not set(markdown("{}", text)) & set("![](){}$:<>*`_~\\")


def test_values_are_text_and_templates_are_html():
    assert html("<p title='{}'>{}</p>", "'", html("<b>{}</b>", "<i>")) == "<p title='&#39;'><b>&lt;i&gt;</b></p>"
    assert plotly("<br>%{x}") == "&lt;br&gt;%{x}"


def _safe(node: ast.expr, function: ast.FunctionDef | None) -> bool:
    """Whether nothing of a run can be in the text: a literal, a constant, a template of ours, or made of these."""
    if isinstance(node, ast.Constant):
        return True
    if isinstance(node, ast.IfExp):
        return _safe(node.body, function) and _safe(node.orelse, function)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in ("markdown", "html")  # whose templates are checked on their own
    if not isinstance(node, ast.Name):
        return False
    if function is None or node.id.isupper():
        return node.id.isupper()
    if function.name in SINKS and node.id == function.args.args[SINKS[function.name]].arg:
        return True
    assigned = _assigned(node.id, function)
    return bool(assigned) and all(_safe(value, function) for value in assigned)


def _assigned(name: str, function: ast.FunctionDef) -> list[ast.expr]:
    return [
        each.value
        for each in ast.walk(function)
        if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name) and each.targets[0].id == name
    ]


def _name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def unsafe(source: str) -> list[str]:
    """Every call in `source` that draws something else than literals and templates of dashboard/escape.py."""
    tree, found = ast.parse(source), []
    inside = {node: each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef) for node in ast.walk(each)}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in SINKS and id(node) not in called:
            passed_on = any(
                isinstance(call, ast.Call) and _name(call) == "choose" and node in call.args for call in ast.walk(tree)
            )
            found += [] if passed_on or ast.unparse(node.value) != "st" else [ast.unparse(node)]
        if not isinstance(node, ast.Call):
            continue
        name = _name(node)
        template = isinstance(node.func, ast.Name) and name in ("markdown", "html")
        shown = [keyword.value for keyword in node.keywords if keyword.arg in KEYWORDS and not template]
        if name in SINKS and (isinstance(node.func, ast.Attribute) or name in OURS):
            shown += node.args[SINKS[name] :][:1]
        for text in shown:
            found += [] if _safe(text, inside.get(node)) else [ast.unparse(node)]
        if template and not (node.args and isinstance(node.args[0], ast.Constant)):
            found.append(ast.unparse(node))
    return found


def streamlit_sources() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if "import streamlit" in path.read_text()]


@pytest.mark.parametrize("path", streamlit_sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_draw_only_literals_and_templates(path):
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "st.error(f'No run {name}')",
        "st.caption(describe(entry))",
        "column.markdown('a' + name)",
        "st.badge('x', help=message)",
        "st.markdown(markdown(f'{name}'))",
        "st.html(html(name))",
        "shared.link('run', name, {})",
        "shared.choose(st.selectbox, name, 'run', [])",
        "{'critical': st.error}['critical'](name)",
        "text = markdown('{}', name)\n    text = name\n    st.error(text)",
        "st.metric(label, value)",
    ],
)
def test_the_search_finds_what_it_must(line):
    assert unsafe(f"def f(name):\n    {line}\n") != []
    assert unsafe("def f(name):\n    text = markdown('{}', name)\n    st.error(text)\n    st.caption('a')\n") == []


def test_figures_hold_no_markup_of_a_run():
    """Titles and meta are plain text, which the page escapes; all else Plotly reads as HTML."""
    one = np.array([1.0])
    line = lines.Line(EVIL, one, one, "#123456", group=EVIL)
    arm = dict.fromkeys((EVIL, "b"), (np.array([1]), one))
    alerts = {"severity": [EVIL], "state": ["firing"], "step": [1], "first_step": [1], "until": one + 1, "value": one,
              "baseline": one, "threshold": one, "rule": [EVIL], "message": [EVIL], "action": [EVIL]}  # fmt: skip
    alerts = {key: np.array(column) for key, column in alerts.items()}
    row = {"arm": EVIL, "difference": 0.1, "low": None, "high": None, "p": None, "pairs": 3}
    gap = {"step": np.array([1]), "difference": np.ones((1, 97))}
    drawn = [
        lines.lines(LIGHT, "entropy", [line, line], alerts=alerts),
        lines.lines(LIGHT, "entropy", lines.arm_lines(EVIL, "entropy", arm, "#123456")),
        lines.reward_and_pass(LIGHT, [line], [line]),
        lines.lines(LIGHT, "entropy", lines.smoothed(lines.Line(EVIL, *np.ones((2, 3)), "#123456"), 5)),
        lines.pass_against_distinct(LIGHT, [line]),
        intervals.difference_intervals(LIGHT, "entropy", [row], {EVIL: "#123456"}),
        distributions.difference_map(LIGHT, gap, "entropy", (EVIL, EVIL)),
        marks.add_alerts(lines.lines(LIGHT, "entropy", [line]), alerts, 3.0, LIGHT),
        query_plot(LIGHT, {EVIL: one, "y": one, "by": np.array([EVIL], object)}, EVIL, "y", "by")[0],
    ]
    for fig in drawn:
        fig.layout.title, fig.layout.meta = None, None
        for trace in fig.data:
            trace.legendgroup = None  # a key, never drawn
        assert "<a " not in fig.to_json() and "<b>x" not in fig.to_json()
    assert sum("&lt;b&gt;x" in fig.to_json().replace("\\u0026", "&") for fig in drawn) >= 6
