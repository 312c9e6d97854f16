"""`make bench` runs every benchmarks/bench_*.py without arguments; what takes hours and arguments is a study_*.py."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("bench_*.py"))


def calls(script: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_runs_without_arguments_and_explains_itself(script):
    """It parses its command line, so --help prints and does not measure. No argument is required."""
    found = calls(script)
    assert any(name_of(call) in ("parse_args", "no_options") for call in found)
    for call in found:
        if name_of(call) == "add_argument":
            option, settings = ast.literal_eval(call.args[0]), {one.arg: one.value for one in call.keywords}
            assert option.startswith("-") and "required" not in settings, option
