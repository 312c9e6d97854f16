"""Fills the tables of docs/actions.md from the actions and the rows of their study: python -m docs.make_actions"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from monitor.alerts.actions import ACTIONS, RECOMMENDED_ACTIONS, Intervention

PAGE = Path(__file__).with_name("actions.md")
RESULTS = PAGE.parent.parent / "benchmarks" / "results"
MEASURES = {
    "heldout/pass@1": "pass@1, held-out",
    "heldout/pass@8": "pass@8, held-out",
    "heldout/distinct": "distinct correct of 16",
    "ood/pass@1": "pass@1, out of distribution",
}


def actions() -> str:
    """Each action with its settings and their defaults."""
    rows = []
    for do, model in ACTIONS.items():
        own = [name for name in model.model_fields if name not in Intervention.model_fields]
        fields = {name: model.model_fields[name] for name in own}
        told = [f"`{n}` ({'required' if f.is_required() else f.default}): {f.description}" for n, f in fields.items()]
        what = " ".join((model.__doc__ or "").split())
        rows.append(f"| `{do}` | {what} | {'; '.join(told) or '–'} |")
    return "\n".join(["| `do` | what happens | settings |", "|---|---|---|", *rows])


def recommended() -> str:
    return ", ".join(f"`{action.do}`" for action in RECOMMENDED_ACTIONS)


def study(part: str) -> Callable[[], str]:
    """The table of one part: a row for each action, with the difference to doing nothing and its interval."""

    def table() -> str:
        path = RESULTS / "actions.csv"
        if not path.exists():
            return "The study has no rows yet: `python -m benchmarks.study_actions --work FOLDER`."
        with path.open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["part"] == part]
        found = {(row["arm"], row["measure"]): row for row in rows}
        head = ["action", "runs", "with an alert", *MEASURES.values()]
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *_rows(arms, found)])

    return table


def _rows(arms: Iterable[str], found: dict[tuple[str, str], dict[str, str]]) -> Iterable[str]:
    for arm in arms:
        some = found[arm, next(measure for measure in MEASURES if (arm, measure) in found)]
        cells = [_cell(found.get((arm, measure)), arm) for measure in MEASURES]
        yield "| " + " | ".join([f"`{arm}`", some["pairs"], some["alerted"], *cells]) + " |"


def _cell(row: dict[str, str] | None, arm: str) -> str:
    if row is None:
        return "–"
    mean, gap, low, high = (float(row[key]) for key in ("mean", "difference", "low", "high"))
    if arm == "nothing":
        return f"{mean:.2f}"
    sure = low > 0 or high < 0
    text = f"{mean:.2f}: {gap:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"**{text}**" if sure else text


BLOCKS: dict[str, Callable[[], str]] = {
    "actions": actions, "recommended": recommended, "prone": study("prone"), "healthy": study("healthy"),
}  # fmt: skip


def page(text: str) -> str:
    """The page with its blocks made anew: what stands between "<!-- table NAME -->" and "<!-- end -->"."""
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
