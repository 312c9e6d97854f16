"""Fills the tables of docs/reliability.md from reliability.csv and damage.csv: python -m docs.make_reliability"""

from __future__ import annotations

import re
from pathlib import Path

from docs.make_performance import Table, lines

PAGE = Path(__file__).with_name("reliability.md")
TABLES = {
    "reliability": Table("reliability.csv", "bench_reliability.py", {
        "probe": "probe", "setting": "setting", "rounds": "rounds", "checked": lambda row: f"{int(row['checked']):,}",
        "of": "of", "faults": "faults", "s": "seconds",
    }),
    "damage": Table("damage.csv", "bench_damage.py", {
        name: name for name in ("probe", "tries", "right", "not named", "wrong", "raised", "file changed")
    }),
}  # fmt: skip


def page(text: str) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        made = "\n".join([f"<!-- table {name} -->", *lines(table), "<!-- end -->"])
        text = re.sub(rf"<!-- table {name} -->\n.*?<!-- end -->", lambda _, made=made: made, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
