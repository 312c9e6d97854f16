"""A stored comparison as tables: in the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from monitor.stats.comparison import TITLES, figure_label
from monitor.stats.comparison_verdict import headline

Row = Mapping[str, Any]


def cells(comparison: Mapping[str, Any], when: str) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of one moment: a row for each figure, a column for each arm."""
    rows = [row for row in comparison["rows"] if row["when"] == when]
    arms = [arm for arm in comparison["arms"] if any(row["arm"] == arm for row in rows)]
    table = []
    for name in dict.fromkeys(row["figure"] for row in rows):
        label, unit = figure_label(name)
        title = label if unit in ("", "share") else f"{label} ({unit})"
        found = {row["arm"]: row for row in rows if row["figure"] == name}
        table.append([title, *(_cell(found.get(arm), when) for arm in arms)])
    return ["", *arms], table


def _cell(row: Row | None, when: str) -> str:
    """mean ± sd, and on a second line the difference to the baseline with its interval and p."""
    if row is None:
        return ""
    text = _mean(row) + (f" against {number(row['baseline_mean'])}" if when == "equal" else "")
    if row.get("difference") is None:
        return text
    return f"{text}\n{_difference(row)}" + (f", p {row['p']:.2g}" if row["p"] is not None else "")


def _mean(row: Row) -> str:
    return f"{number(row['mean'])} ± {number(row['sd'])}" if row["sd"] is not None else number(row["mean"])


def _difference(row: Row) -> str:
    if row.get("difference") is None:
        return ""
    interval = f" [{row['low']:+.3g}, {row['high']:+.3g}]" if row["low"] is not None else ""
    return f"{row['difference']:+.3g}{interval}"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def notes(comparison: Mapping[str, Any]) -> list[str]:
    """What a reader must know to read the tables."""
    pairs = max((row["pairs"] for row in comparison["rows"] if row.get("pairs")), default=0)
    seeds = sorted({int(seed) for of in comparison["arms"].values() for seed in of})
    said = [
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}; then the difference to "
        f"{comparison['baseline']}, paired by seed, with its bootstrap 95 % interval (from three pairs on) and the p "
        "of the exact sign-flip test."
    ]
    if pairs >= 2:
        said.append(
            f"With {pairs} pairs p cannot be below {2.0 ** (1 - pairs):.2g}. Every row is a test of its own: of twenty "
            "rows without any true difference, one reaches p 0.05 by chance."
        )
    if pairs >= 3:
        said.append(
            "With so few pairs a bootstrap interval is too narrow: it holds the truth in 75 % of cases with 3 pairs, "
            "83 % with 5 and 91 % with 10."
        )
    said += several_arms(comparison)
    normalised = ", ".join(f"{arm} {value}" for arm, value in comparison["normalise"].items())
    said.append(f"Denominators of the loss (weighting.normalise): {normalised}.")
    if comparison.get("stopped"):
        told = ", ".join(f"{run} at step {step}" for run, step in comparison["stopped"].items())
        said.append(f"Stopped by an alert, with fewer steps than the others: {told}.")
    if comparison["failed"]:
        said.append(f"Failed and left out: {', '.join(comparison['failed'])}.")
    return said


def several_arms(comparison: Mapping[str, Any]) -> list[str]:
    """What to know where more than one arm stands against the baseline."""
    arms = len(comparison["arms"]) - 1
    if arms < 2:
        return []
    return [
        f"{arms} arms were compared with {comparison['baseline']}, and the intervals are not corrected for that: the "
        "more arms, the likelier that one looks better by chance. The files hold p corrected for it (p_holm)."
    ]


def print_tables(comparison: Mapping[str, Any]) -> None:
    """Prints the verdicts and the tables, with one line for each figure and arm, so that eight arms fit too."""
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=140)
    for sentence in comparison["verdicts"].values():
        head, rest = headline(sentence)
        # a file gets it as one line
        console.print(Text.assemble((head, "bold"), rest), soft_wrap=not console.is_terminal)
    console.print()
    for when, title in TITLES.items():
        rows = [row for row in comparison["rows"] if row["when"] == when]
        if rows:
            console.print(title, style="bold")
            console.print(_terminal_table(rows, when, comparison["baseline"]))
    for note in notes(comparison):
        console.print(note)


def _terminal_table(rows: Sequence[Row], when: str, baseline: str) -> Table:
    names = list(dict.fromkeys(row["figure"] for row in rows))
    header = ["", "arm", "mean ± sd", *([baseline] if when == "equal" else []), "difference [95 %]", "p"]
    table = Table(header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index > 1 else "left", overflow="fold")
    for name in names:
        label, unit = figure_label(name)
        title = label if unit in ("", "share") else f"{label} ({unit})"
        for row in (row for row in rows if row["figure"] == name):
            against = [number(row["baseline_mean"])] if when == "equal" else []
            p = f"{row['p']:.2g}" if row.get("p") is not None else ""
            table.add_row(title, row["arm"], _mean(row), *against, _difference(row), p)
            title = ""
        table.add_section()
    return table


def markdown(comparison: Mapping[str, Any]) -> str:
    """The same verdicts and tables as Markdown, with the options that differ between the arms."""
    parts = ["\n".join(f"- {sentence}" for sentence in comparison["verdicts"].values())]
    for when, title in TITLES.items():
        header, rows = cells(comparison, when)
        if rows:
            parts.append(f"**{title}**\n\n{_markdown_table(header, rows)}")
    configuration = comparison["configuration"]
    if configuration:
        arms = list(comparison["arms"])
        rows = [[option, *(str(row.get(arm, "")) for arm in arms)] for option, row in configuration.items()]
        parts.append(f"**Options that differ**\n\n{_markdown_table(['', *arms], rows)}")
    return "\n\n".join([*parts, *notes(comparison)])


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    safe = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in (header, *rows)]
    safe.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in safe)
