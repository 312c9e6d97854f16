"""Fills the tables of docs/reproduction.md from benchmarks/reproduction.py's rows: python -m docs.make_reproduction"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

PAGE = Path(__file__).with_name("reproduction.md")
ROWS = PAGE.parent.parent / "benchmarks" / "results" / "reproduction.csv"
RATES = ("1e-4", "3e-4")  # the learning rates with several seeds
Row = dict[str, str]


def rows() -> list[Row]:
    with ROWS.open(newline="", encoding="utf-8") as source:
        return list(csv.DictReader(source))


def number(text: str, sign: str = "") -> str:
    if not text:
        return ""
    value = float(text) if abs(float(text)) > 1e-9 else 0.0  # an interpolation's rounding
    return f"{value:{sign},.0f}" if abs(value) >= 1e3 else f"{value:{sign}.3g}"


def level(row: Row) -> str:
    return f"{number(row['mean'])} ± {number(row['sd'])}" if row["sd"] else number(row["mean"])


def difference(row: Row) -> str:
    if not row["difference"]:
        return ""
    return f"{number(row['difference'], '+')} [{number(row['low'], '+')}, {number(row['high'], '+')}]"


def table(found: Sequence[Row], figures: dict[str, str], cell: Callable[[Row], str]) -> list[str]:
    """A line for each arm, a column for each figure."""
    by_place = {(row["arm"], row["figure"]): row for row in found}
    arms = list(dict.fromkeys(row["arm"] for row in found))
    lines = [f"| arm | {' | '.join(figures.values())} |", "|---|" + "---|" * len(figures)]
    for arm in arms:
        cells = [cell(by_place[arm, key]) if (arm, key) in by_place else "" for key in figures]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def tables() -> dict[str, list[str]]:
    """The page's tables by name: "RATE-last", ... for each of RATES, and "grid"."""
    every = rows()
    made = {"grid": grid(every)}
    for rate in RATES:
        found = tables_of([row for row in every if row["lr"] == rate])
        made |= {f"{rate}-{name}": lines for name, lines in found.items()}
    return made


def tables_of(found: Sequence[Row]) -> dict[str, list[str]]:
    """The tables of one learning rate."""
    last, equal, run = ([row for row in found if row["when"] == when] for when in ("last", "equal", "run"))
    held = {"eval/heldout/pass@1": "pass@1", "eval/heldout/pass@4": "pass@4", "eval/heldout/distinct": "distinct of 16"}
    more = {"entropy": "entropy, nats", "entropy_kept": "entropy kept"}
    at_equal = {"step": "step", **{key: held[key] for key in list(held)[1:]}, **more}
    cost = {"tokens_trained": "tokens trained on", "weight_mean": "mean weight", "alerts_fired": "alerts"}
    return {
        "last": table(last, held | more, level),
        "last-difference": table([row for row in last if row["arm"] != "uniform"], held | more, difference),
        "equal-difference": table(equal, at_equal, difference),
        "equal-level": table(
            equal, at_equal, lambda row: f"{number(row['mean'])} against {number(row['baseline_mean'])}"
        ),
        "cost": table(run, cost, level),
    }


def grid(every: Sequence[Row]) -> list[str]:
    """Each arm at each learning rate, first seed: pass@1 / distinct / entropy."""
    rates = sorted({row["lr"] for row in every}, key=float)
    figures = ("eval/heldout/pass@1", "eval/heldout/distinct", "entropy")
    found = {(r["lr"], r["arm"], r["figure"]): r["values"].split(";")[0] for r in every if r["when"] == "last"}
    arms = list(dict.fromkeys(row["arm"] for row in every if row["when"] == "last"))
    lines = [f"| arm | {' | '.join(f'lr {rate}' for rate in rates)} |", "|---|" + "---|" * len(rates)]
    for arm in arms:
        cells = [" / ".join(number(found.get((rate, arm, figure), "")) for figure in figures) for rate in rates]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def page(text: str) -> str:
    """The page with every table between its marks made anew."""
    made = tables()

    def fill(found: re.Match[str]) -> str:
        lines = "\n".join(made[found[1]])
        return f"<!-- table {found[1]} -->\n{lines}\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
