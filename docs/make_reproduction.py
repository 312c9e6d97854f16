"""Fills the tables of docs/reproduction.md and of README.md from the study's rows: python -m docs.make_reproduction"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "docs" / "reproduction.md", ROOT / "README.md")
ROWS = ROOT / "benchmarks" / "results" / "weightings.csv"
SETTINGS = ("off-policy", "on-policy", "paths")
LAST = {
    "heldout/pass@1": "pass@1", "heldout/distinct": "distinct of 16", "multipath/distinct": "distinct, multi-path",
    "ood/pass@1": "pass@1, out of distribution", "entropy": "entropy, nats",
}  # fmt: skip
EQUAL = {
    "step": "step", "heldout/distinct": "distinct of 16", "multipath/distinct": "distinct, multi-path",
    "ood/pass@1": "pass@1, out of distribution", "entropy": "entropy, nats",
}  # fmt: skip
AREAS = {"area of distinct": "pass@1 x distinct", "area of pass@16": "pass@1 x pass@16"}
WARNED = {"warned": "runs that were warned", "first_warning": "step of the first warning"}
LEVELS = {f"distinct at {level}": f"{level:.1f}"[1:] for level in (0.5, 0.6, 0.7, 0.8, 0.9)}
Row = dict[str, str]


def rows() -> list[Row]:
    with ROWS.open(newline="", encoding="utf-8") as source:
        return list(csv.DictReader(source))


def number(text: str, sign: str = "") -> str:
    """Two decimals below 1, one above."""
    value = float(text)
    if value != value:
        return "–"
    return f"{value:{sign}.2f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:{sign}.1f}"


def level(row: Row) -> str:
    return number(row["mean"]) + (f" ± {number(row['sd'])}" if row["sd"] != "nan" else "")


def against(row: Row) -> str:
    return f"{number(row['mean'])} against {number(row['uniform'])}"


def difference(row: Row) -> str:
    """Difference and interval; bold where the corrected p is below .05."""
    text = number(row["difference"], "+")
    if row["low"] != "nan":
        text += f" [{number(row['low'], '+')}, {number(row['high'], '+')}]"
    return f"**{text}**" if float(row["p_t_holm"]) < 0.05 else text


def reached(row: Row) -> str:
    """The mean of the seeds that reached the level, and how many they are where not all did."""
    n, seeds = int(row["n"]), int(row["seeds"])
    return "–" if not n else number(row["mean"]) + (f" ({n} of {seeds})" if n < seeds else "")


def warned(row: Row) -> str:
    """How many runs, or the mean step of those."""
    if row["figure"] != "warned":
        return reached(row)
    return f"{round(float(row['mean']) * int(row['n']))} of {row['n']}"


def table(found: Sequence[Row], figures: dict[str, str], cell: Callable[[Row], str]) -> list[str]:
    """A line for each arm, a column for each figure."""
    by_place = {(row["arm"], row["figure"]): row for row in found}
    arms = list(dict.fromkeys(row["arm"] for row in found))
    lines = [f"| arm | {' | '.join(figures.values())} |", "|---|" + "---|" * len(figures)]
    return lines + [f"| {arm} | {' | '.join(cell(by_place[arm, key]) for key in figures)} |" for arm in arms]


def tables() -> dict[str, list[str]]:
    """The page's tables by name: SETTING-RATE-last, ..."""
    made: dict[str, list[str]] = {}
    every = rows()
    for setting in SETTINGS:
        for rate in ("usual", "best", "demo", "faster", "shares"):
            own = [row for row in every if (row["setting"], row["rate"]) == (setting, rate)]
            name = f"{setting}-{rate}"
            if not own:
                made |= {f"{name}-{kind}": ["(not trained yet)"] for kind in ("last", "difference", "equal", "frontier",
                         "area", "runs", "warned")}  # fmt: skip
                continue
            last, equal, frontier = ([row for row in own if row["way"] == w] for w in ("last", "equal", "frontier"))
            others = [row for row in last if row["arm"] != "uniform"]
            made |= {
                f"{name}-last": table(last, LAST, level),
                f"{name}-difference": table(others, LAST, difference),
                f"{name}-equal": table(equal, EQUAL, lambda row: f"{against(row)}: {difference(row)}"),
                f"{name}-frontier": table(frontier, LEVELS, reached),
                f"{name}-area": table([row for row in frontier if row["arm"] != "uniform"], AREAS, difference),
                f"{name}-runs": runs_of(last),
                f"{name}-warned": table(last, WARNED, warned),
            }
    return made


def runs_of(last: Sequence[Row]) -> list[str]:
    """Learning rate and number of seeds of each arm."""
    arms = {row["arm"]: (row["lr"], row["n"]) for row in last if row["figure"] == "heldout/pass@1"}
    lines = ["| arm | learning rate | seeds |", "|---|---|---|"]
    return lines + [f"| {arm} | {lr} | {n} |" for arm, (lr, n) in arms.items()]


def page(text: str) -> str:
    """The page with every table between its marks made anew."""
    made = tables()

    def fill(found: re.Match[str]) -> str:
        lines = "\n".join(made[found[1]])
        return f"<!-- table {found[1]} -->\n{lines}\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text()))
