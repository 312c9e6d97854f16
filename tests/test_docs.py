"""Code in the documentation runs as it stands."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import rlvr_monitor
from docs import make_api, make_install, make_integrations, make_performance, make_reliability
from docs.make_method import page
from docs.make_reproduction import page as reproduction_page
from monitor.store.reader import open_store

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_method_page_is_what_the_code_says():
    assert (ROOT / "docs/method.md").read_text() == page(), "Run: python -m docs.make_method"


def test_the_page_of_aliases_is_what_their_table_says():
    assert (ROOT / "docs/integrations.md").read_text() == make_integrations.page(), (
        "Run: python -m docs.make_integrations"
    )


def test_the_page_of_public_names_is_what_their_docstrings_say():
    assert (ROOT / "docs/api.md").read_text() == make_api.page(), "Run: python -m docs.make_api"
    assert sorted(name for names in make_api.groups().values() for name in names) == sorted(rlvr_monitor.__all__)


def test_the_example_of_the_public_names_finds_its_alert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(blocks("docs/api.md")[0], scope)
    assert [alert["rule"] for alert in scope["alerts"]] == ["entropy_collapse"]


def test_the_table_of_environments_is_that_of_its_rows():
    text = (ROOT / "docs/install.md").read_text()
    assert make_install.page(text) == text, "Run: python -m docs.make_install"


def test_the_performance_page_is_what_the_rows_say():
    text = (ROOT / "docs/performance.md").read_text()
    assert text == make_performance.page(text), "Run: python -m docs.make_performance"
    assert sorted(re.findall(r"<!-- table ([\w-]+) -->", text)) == sorted(make_performance.TABLES)


def test_figures_that_are_not_there_are_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(make_performance, "RESULTS", tmp_path)
    table = make_performance.Table(
        "x.csv", "gpu.py", {"arm": "arm", "s": "s", "of it": make_performance.share("r", "s")}
    )
    assert make_performance.lines(table) == [
        "Not measured yet: `benchmarks/gpu.py` writes these rows on a machine with a GPU."
    ]
    (tmp_path / "x.csv").write_text("arm,s,r,machine,versions,commit\nict,1234.5,12.345,M,V,c1\n")
    assert make_performance.lines(table) == [
        "| arm | s | of it |", "|---|---|---|", "| ict | 1,234 | 1.0% |", "", "M; V; commit c1; `benchmarks/gpu.py`.",
    ]  # fmt: skip


def test_the_reliability_page_is_made_from_rows_without_faults():
    text = make_reliability.PAGE.read_text()
    assert text == make_reliability.page(text), "Run: python -m docs.make_reliability"
    with (make_performance.RESULTS / "reliability.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and {row["faults"] for row in rows} == {"0"}


def test_the_plain_loop_records_and_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks("docs/own_loop.md"):
        exec(block, scope)
    with open_store(tmp_path / "runs") as store:
        found = store.sql("SELECT name, arg_min(value, step), arg_max(value, step) FROM steps GROUP BY name").rows
        values = {name: (first, last) for name, first, last in found}
        assert values["entropy"][0] > 2.0 > 1.7 > values["entropy"][1]  # from ln 8 = 2.08 downwards
        assert values["reward"][1] > values["reward"][0]
        assert store.sql("SELECT count(*), max(step) FROM tokens").rows == [(60 * 32 * 12, 60)]
    assert json.loads((tmp_path / "runs/runs/my-loop/heartbeat-r000-a001.json").read_text())["status"] == "finished"
    loop = blocks("docs/own_loop.md")[1].split("for step in")[1]
    assert len(loop.strip().splitlines()) <= 11  # "ten lines" and the for itself


def test_the_reward_example_is_a_reward_function(tmp_path, monkeypatch):
    from trainer.rewards.checking import checked_rewards
    from trainer.rewards.loading import load_reward

    (tmp_path / "my_rewards.py").write_text(blocks("docs/extending.md")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    function = load_reward("my_rewards:short_and_right")
    assert checked_rewards(function, ["5:"], ["2+3=5"], [[1, 2, 3]], target=[5]) == [0.97]


def test_the_tables_of_the_first_comparison_are_those_of_its_rows():
    text = (ROOT / "docs/reproduction.md").read_text()
    assert reproduction_page(text) == text, "Run: python -m docs.make_reproduction"
