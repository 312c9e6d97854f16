"""`rlvr report`: a stored comparison as one HTML file with the dashboard's figures. The file needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from time import gmtime, strftime
from typing import Annotated, Any

import numpy as np
import plotly.graph_objects as go
import tyro
from markupsafe import escape
from plotly.offline import get_plotlyjs

from dashboard.figures.intervals import difference_intervals
from dashboard.figures.lines import Line, arm_lines, lines, pass_against_distinct, seed_band
from dashboard.figures.theme import DARK, LIGHT, THEMES, Theme, arm_colours, template
from monitor.commands.comparison_table import cells, notes
from monitor.commands.parsing import StoreFolder, call
from monitor.queries.frames import Frame
from monitor.queries.series import Series, scalar_series, series_of
from monitor.stats.comparison import LEVEL, TITLES, load_comparison
from monitor.stats.comparison_verdict import headline
from monitor.store.runs import require_store
from monitor.store.tail import Tail

DISTINCT = "eval/heldout/distinct"
CURVES = ("entropy", "reward", LEVEL, DISTINCT)
CROWDED = 2  # with more arms than this, only means are drawn and no single seeds


def main(argv: list[str]) -> int:
    """`rlvr report`."""
    return call(report, argv, "report")


def report(
    comparison: Annotated[str, tyro.conf.arg(metavar="COMPARISON")],
    folder: StoreFolder = "runs",
    /,
    *,
    out: Path | None = None,
) -> int:
    """Write a stored comparison as one HTML file.

    Args:
        comparison: its name, as rlvr compare stored it
        folder: folder of the store
        out: the file; none: STORE/comparisons/COMPARISON.html
    """
    store = require_store(folder)
    out = out or store / "comparisons" / f"{comparison}.html"
    found = load_comparison(store, comparison)
    tail = Tail(store)
    tail.poll()
    runs = [run for of in found["arms"].values() for run in of.values()]
    rows = scalar_series(tail.cursor(), runs, CURVES)
    info = next((tail.runs[run].info for run in runs if run in tail.runs), {})
    tail.close()
    part = out.with_suffix(".tmp")
    part.write_text(page(found, rows, info), encoding="utf-8")
    part.replace(out)
    print(f"Report: {out}")
    return 0


def page(comparison: Mapping[str, Any], rows: Frame, info: Mapping[str, Any]) -> str:
    """The HTML of a comparison. `rows`: the runs' series of CURVES. `info`: run.json of one of the runs."""
    charts = {theme.name: figures(comparison, rows, theme) for theme in (LIGHT, DARK)}
    places = [(key, _place(index, fig)) for index, (key, fig) in enumerate(charts["light"].items())]
    curves = "".join(place for key, place in places if not key.startswith("gap "))
    gaps = "".join(place for key, place in places if key.startswith("gap "))
    drawn = {
        name: [json.loads(_bare(fig, THEMES[name]).to_json()) for fig in of.values()] for name, of in charts.items()
    }
    created = strftime("%Y-%m-%d %H:%M UTC", gmtime(comparison["created"]))
    what = f"{info.get('model', '')} on {info.get('task', '')}"
    body = [
        f"<h1>{escape(comparison['comparison'])}</h1>",
        f'<p class="muted">{escape(what)}; arms {escape(", ".join(comparison["arms"]))}; {created}</p>',
        *_verdicts(comparison),
        *(f"<p>{escape(note)}</p>" for note in notes(comparison)),
        f'<h2>Curves</h2><p class="muted">{_CURVES_NOTE}</p>{_legend(list(comparison["arms"]))}',
        f'<div class="grid">{curves}</div>',
        f'<h2>Differences to {escape(comparison["baseline"])} at the last step</h2><div class="grid">{gaps}</div>',
        *_tables(comparison),
    ]
    return Template((Path(__file__).parent / "report.html").read_text()).substitute(
        title=escape(comparison["comparison"]),
        body="\n".join(body),
        plotly=get_plotlyjs(),
        charts=json.dumps(drawn).replace("<", "\\u003c"),  # nothing in a script may look like a tag
    )


_CURVES_NOTE = (
    "Mean over an arm's runs; from three runs on with its bootstrap 95 % band. Large dots: the last evaluation."
)


def figures(comparison: Mapping[str, Any], rows: Frame, theme: Theme) -> dict[str, go.Figure]:
    """Every chart of the report by name; differences are called "gap <figure>". Charts without data are left out."""
    arms = {arm: list(of.values()) for arm, of in comparison["arms"].items()}
    colours = arm_colours(list(arms), theme)
    found: dict[str, go.Figure] = {}
    paths = [line for arm, runs in arms.items() for line in _paths(arm, runs, rows, colours[arm], len(arms))]
    if paths:
        found["distinct"] = pass_against_distinct(theme, paths, height=460)
    for key in CURVES:
        drawn = {arm: arm_lines(arm, key, _of(runs, key, rows), colours[arm]) for arm, runs in arms.items()}
        shown = [line for of in drawn.values() for line in of if not line.faint or len(arms) <= CROWDED]
        if shown:
            found[key] = lines(theme, key, shown, height=320)
            for arm, of in drawn.items():
                members = [line for line in of if line.faint]
                found[key].add_traces(seed_band(theme, members, colours[arm]) if members else [])
    gaps = [row for row in comparison["rows"] if row["when"] == "last" and row.get("difference") is not None]
    for name in dict.fromkeys(row["figure"] for row in gaps):
        of_figure = [row for row in gaps if row["figure"] == name]
        found[f"gap {name}"] = difference_intervals(theme, name, of_figure, colours)
    return found


def _of(runs: Sequence[str], key: str, rows: Frame) -> dict[str, Series]:
    return {run: series_of(rows, run, key) for run in runs}


def _paths(arm: str, runs: Sequence[str], rows: Frame, colour: str, n_arms: int) -> list[Line]:
    """pass@1 against distinct answers: the mean over an arm's runs and, unless it gets crowded, single runs faintly."""
    passed = {line.name: line for line in arm_lines(arm, LEVEL, _of(runs, LEVEL, rows), colour)}
    members = []
    for run in runs:
        (steps, x), (seen, y) = series_of(rows, run, LEVEL), series_of(rows, run, DISTINCT)
        _, at, of = np.intersect1d(steps, seen, return_indices=True)
        if len(at):
            members.append(Line(run, x[at], y[of], colour, faint=True, group=arm))
    distinct = {line.name: line for line in arm_lines(arm, DISTINCT, _of(runs, DISTINCT, rows), colour)}
    mean = next((name for name, line in passed.items() if not line.faint and name in distinct), None)
    if mean is None:
        return []
    _, at, of = np.intersect1d(passed[mean].x, distinct[mean].x, return_indices=True)
    middle = Line(mean, passed[mean].y[at], distinct[mean].y[of], colour, group=arm)
    return [*(members if n_arms <= CROWDED and len(runs) > 1 else []), middle]


def _verdicts(comparison: Mapping[str, Any]) -> list[str]:
    """The sentence about each arm, in its colour."""
    light, dark = (arm_colours(list(comparison["arms"]), theme) for theme in (LIGHT, DARK))
    parts = []
    for arm, sentence in comparison["verdicts"].items():
        head, rest = headline(sentence)
        colour = f"border-color:light-dark({light[arm]},{dark[arm]})"
        parts.append(f'<p class="verdict" style="{colour}"><b>{escape(head)}</b>{escape(rest)}</p>')
    return parts


def _place(index: int, fig: go.Figure) -> str:
    """Where a chart goes, under its title and unit."""
    title, unit = fig.layout.title.text, fig.layout.title.subtitle.text
    told = escape(title if unit in ("", "share") else f"{title} ({unit})")
    return f"""<figure{' class="wide"' if index == 0 else ""}>
<figcaption>{told}</figcaption><div data-chart="{index}"></div></figure>"""


def _bare(fig: go.Figure, theme: Theme) -> go.Figure:
    """With its style, and without title and legend, which the page shows once."""
    fig.layout.template = template(theme)
    fig.layout.title, fig.layout.showlegend, fig.layout.margin.t = None, False, 8
    return fig


def _legend(arms: Sequence[str]) -> str:
    light, dark = (arm_colours(arms, theme) for theme in (LIGHT, DARK))
    marks = (
        f'<span><i style="background:light-dark({light[arm]},{dark[arm]})"></i>{escape(arm)}</span>' for arm in arms
    )
    return f'<p class="legend">{"".join(marks)}</p>'


def _tables(comparison: Mapping[str, Any]) -> list[str]:
    parts = []
    for when, title in TITLES.items():
        header, rows = cells(comparison, when)
        if rows:
            parts.append(f"<h2>{escape(title)}</h2>{_table(header, rows)}")
    arms, options = list(comparison["arms"]), comparison["configuration"]
    if options:
        rows = [[option, *(str(row.get(arm, "")) for arm in arms)] for option, row in options.items()]
        parts.append(f"<h2>Options that differ</h2>{_table(['', *arms], rows)}")
    runs = "".join(f"<p>{escape(arm)}: {escape(', '.join(of.values()))}</p>" for arm, of in comparison["arms"].items())
    return [*parts, f"<h2>Runs</h2>{runs}"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    value, _, rest = text.partition("\n")
    return f"{escape(value)}<br><small>{escape(rest)}</small>" if rest else str(escape(value))
