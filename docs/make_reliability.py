"""Fills the table of docs/reliability.md from benchmarks/results/reliability.csv: python -m docs.make_reliability"""

from __future__ import annotations

import re
from pathlib import Path

from docs.make_performance import Table, lines

PAGE = Path(__file__).with_name("reliability.md")
TABLE = Table("reliability.csv", "bench_reliability.py", {
    "probe": "probe", "setting": "setting", "rounds": "rounds", "checked": lambda row: f"{int(row['checked']):,}",
    "of": "of", "faults": "faults", "s": "seconds",
})  # fmt: skip


def page(text: str) -> str:
    """The page with its table made anew."""
    made = "\n".join(["<!-- table -->", *lines(TABLE), "<!-- end -->"])
    return re.sub(r"<!-- table -->\n.*?<!-- end -->", lambda _: made, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
