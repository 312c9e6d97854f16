"""Code in the documentation runs as it stands."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rlvr_monitor
from docs import (
    make_actions,
    make_alerts,
    make_api,
    make_install,
    make_integrations,
    make_performance,
    make_reliability,
)
from docs.make_method import page
from docs.make_reproduction import PAGES
from docs.make_reproduction import page as reproduction_page
from monitor.alerts.actions import ACTIONS
from monitor.alerts.rules import RULES, Rule
from monitor.children import RLVR, child_environment
from monitor.cli import main
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


def test_the_alerts_page_is_what_the_rules_and_the_rows_say():
    text = make_alerts.PAGE.read_text()
    assert text == make_alerts.page(text), "Run: python -m docs.make_alerts"
    assert sorted(re.findall(r"<!-- table ([\w-]+) -->", text)) == sorted(make_alerts.BLOCKS)
    for name, rule in RULES.items():
        assert f"\n### {name}\n" in text
        for field in set(rule.model_fields) - set(Rule.model_fields):
            assert f"| `{field}` |" in text.split(f"\n### {name}\n")[1].split("\n### ")[0]


def test_the_page_on_actions_is_what_the_actions_and_the_rows_of_their_study_say():
    text = make_actions.PAGE.read_text()
    assert text == make_actions.page(text), "Run: python -m docs.make_actions"
    assert sorted(re.findall(r"<!-- table ([\w-]+) -->", text)) == sorted(make_actions.BLOCKS)
    for do in ACTIONS:
        assert f"| `{do}` |" in text


DETECTED = (
    "detector,part,group,runs,warned,critical,in_time,late,silent,rate,low,high,median_lead,alerts_a_run,"
    "machine,versions,commit"
)


def test_the_alerts_page_says_what_was_not_measured_and_shows_what_was(tmp_path, monkeypatch):
    monkeypatch.setattr(make_alerts, "RESULTS", tmp_path)
    text = make_alerts.page(make_alerts.PAGE.read_text())
    assert "The test part was not judged yet." in text and "The development part was not judged yet." in text
    assert text.count("How often it is wrong on real runs was not measured yet.") == sum(
        not make_alerts.only_info(name) for name in RULES
    )
    assert "No runs were judged yet." in text and "Judged are none yet." in text

    def row(detector: str, group: str, *cells: object) -> str:
        return ",".join(map(str, [f'"{detector}"', "test", group, *cells, "M", "V", "c1"]))

    rows = [
        row("ours", "healthy", 200, 2, 0, "", "", 198, 0.01, 0.003, 0.036, "", 0.1),
        row("ours", "damaged", 20, 19, 12, 15, 4, 1, 0.75, 0.531, 0.888, 0.3, 1.5),
        row("ours", "stall", 0, 0, 0, "", "", 0, "", "", "", "", ""),
        row("rlwatch tuned, 1 %", "damaged", 20, 1, 0, 1, 0, 19, 0.05, 0.009, 0.236, 0.5, 0.0),
        row("kl_runaway", "healthy", 200, 0, 0, "", "", 200, 0.0, 0.0, 0.019, "", 0.0),
        row("kl_runaway", "damaged", 20, 3, 3, 1, 2, 17, 0.05, 0.009, 0.236, 0.15, 0.0),
        row("repetition", "healthy", 200, 0, 0, "", "", 200, 0.0, 0.0, 0.019, "", 0.0),
        row("repetition", "damaged", 20, 0, 0, 0, 0, 20, 0.0, 0.0, 0.161, "", 0.0),
    ]
    (tmp_path / "detectors.csv").write_text("\n".join([DETECTED, *rows]))
    lines = make_alerts.part_table("test")
    assert lines[2:8] == [
        "| healthy | ours | 2 of 200: 1 % [0, 4] |  | 198 | 0 |  | 0.1 |",
        "| all damaged | ours | 15 of 20: 75 % [53, 89] | 4 | 1 | 12 | 30 % | 1.5 |",
        "| all damaged | rlwatch tuned, 1 % | 1 of 20: 5 % [1, 24] | 0 | 19 | 0 | 50 % |  |",
        "",
        "Not judged yet on this part: rldoctor.",
        "",
    ]
    assert [line.rsplit("| ", 1)[1] for line in lines[10:14]] == ["met |", "met |", "missed |", "met |"]
    assert make_alerts.on_real_runs("kl_runaway")[2:4] == [
        "| healthy | 0 of 200: 0 % [0, 2] |",
        "| all damaged | in time 1 of 20: 5 % [1, 24], late 2, median lead 15 % |",
    ]
    # rows of groups that overlap ("damaged" holds "reward_lost") are not counted twice: 200 healthy runs are left
    assert make_alerts.on_real_runs("repetition") == [
        "It fired in none of the 200 real runs (test part): its recall there is not known."
    ]


def test_simulated_rates_of_a_rule_are_of_the_shapes_where_it_is_right_and_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(make_alerts, "RESULTS", tmp_path)
    head = "shape,right,series,fired,false_alarms,false_critical,by_rule,info,lead_median_steps,lead_p10_steps,"
    rows = [
        "flat,,40,,2,1,kl_runaway:2,tail_noise:3,,,,M,V,c1",
        '"both, at once",kl_runaway reward_lost,40,39,1,0,kl_runaway:30 repetition:1 reward_lost:39,'
        ",12.5,-2.0,0.95,M,V,c1",
    ]
    (tmp_path / "alerts.csv").write_text("\n".join([head + "before_damage_share,machine,versions,commit", *rows]))
    assert make_alerts.on_simulated_series("kl_runaway") == (
        "On simulated series: where it is right (1 shape) it fired in 30 of 40: 75 %; elsewhere in 2 of 40: 5 %, most "
        'often in "flat" (2 of 40).'
    )
    assert "elsewhere in 3 of 80: 4 %" in make_alerts.on_simulated_series("tail_noise")  # info is all that it says
    lines = make_alerts.simulated()
    assert lines[0] == "Healthy shapes; false alarms in all their series together: 2 of 40: 5 %."
    assert "| flat | 2 of 40: 5 % | 1 | kl_runaway 2 |" in lines
    assert (
        "| both, at once | kl_runaway, reward_lost | 39 of 40: 98 % | 95 % | 12.5 | -2.0 | 1 | repetition 1 |" in lines
    )


def test_runs_that_were_judged_wrongly_are_listed_to_be_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr(make_alerts, "RESULTS", tmp_path)
    head = "run,part,outcome,damage_step,first_warning,warned,model,task,weighting,lr,epochs,entropy_coef,temperature"
    rest = "builtin,chain,ict,0.0002,2,0.0,0.8"
    runs = [
        f"c001,test,reward_lost,50,10,reward_lost@10,{rest}",  # in time
        f"c003,test,reward_lost,50,50,kl_runaway@50 reward_lost@52,{rest}",  # late: not before the damage
        f"c005,test,diversity_lost,60,,,{rest}",  # missed
        f"c007,test,healthy,,30,repetition@30,{rest}",
        f"c009,test,healthy,,,,{rest}",
        f"c011,test,stall,,9,no_learning_signal@9,{rest}",  # counts on neither side
    ]
    (tmp_path / "detectors_runs.csv").write_text("\n".join([head, *runs]))
    lines = make_alerts.wrong_runs()
    assert lines[0] == "Of 3 damaged runs 1 were missed and 1 warned late; of 2 healthy runs 1 were warned."
    settings = "builtin, chain, ict, lr 0.0002, epochs 2, entropy bonus 0.0, temperature 0.8"
    assert lines[4:] == [
        f"| c005 | test | diversity lost | 60 | none | {settings} |  |",
        f"| c003 | test | reward lost | 50 | 50 | {settings} | kl_runaway@50, reward_lost@52 |",
        f"| c007 | test | healthy |  | 30 | {settings} | repetition@30 |",
    ]


def test_the_plain_loop_records_and_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks("docs/own_loop.md"):
        exec(block, scope)
    with open_store(tmp_path / "runs") as store:
        found = store.sql(
            "SELECT name, arg_min(value, step), arg_max(value, step) FROM steps WHERE run = 'my-loop' GROUP BY name"
        ).rows
        values = {name: (first, last) for name, first, last in found}
        assert values["entropy"][0] > 2.0 > 1.7 > values["entropy"][1]  # from ln 8 = 2.08 downwards
        assert values["reward"][1] > values["reward"][0]
        counts = "SELECT count(*), max(step), avg((weight > 0)::INT) FROM tokens WHERE run = ?"
        assert store.sql(counts, ["my-loop"]).rows == [(60 * 32 * 12, 60, 1.0)]
        ((n, last, selected),) = store.sql(counts, ["my-parts"]).rows
        assert (n, last) == (32 * 12, 1) and 0.4 < selected < 0.9
    assert json.loads((tmp_path / "runs/runs/my-loop/heartbeat-r000-a001.json").read_text())["status"] == "finished"
    assert (
        len(blocks("docs/own_loop.md")[1].strip().splitlines()) <= 12
    )  # "ten lines", the import and the line below it


def test_the_reward_example_is_a_reward_function(tmp_path, monkeypatch):
    from trainer.rewards.checking import checked_rewards
    from trainer.rewards.loading import load_reward

    (tmp_path / "my_rewards.py").write_text(blocks("docs/extending.md")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    function = load_reward("my_rewards:short_and_right")
    assert checked_rewards(function, ["5:"], ["2+3=5"], [[1, 2, 3]], target=[5]) == [0.97]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_tables_of_the_study_are_those_of_its_rows(path):
    text = path.read_text()
    assert "<!-- table " in text
    assert reproduction_page(text) == text, "Run: python -m docs.make_reproduction"


def test_the_lines_for_other_trainers_import_their_files(tmp_path, monkeypatch):
    """Each `rlvr import` of the page, once, on files where the page says that they are."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "monitor"))
    from test_files_formats import write_events
    from test_import_dumps import SAMPLES, save_rollouts
    from test_import_rollouts import sequence
    from test_import_traces import metrics, write

    files = ROOT / "tests" / "monitor" / "files"
    monkeypatch.chdir(tmp_path)
    shutil.copy(files / "verl" / "metrics.jsonl", "verl.jsonl")
    shutil.copytree(files / "verl" / "rollouts", "rollouts")
    Path("outputs/token_exports/step_1").mkdir(parents=True)
    Path("outputs/token_exports/step_1/rank_0.jsonl").write_text(json.dumps(sequence([1], [2], 1.0, [0.5])))
    Path("outputs/token_exports/step_1/STABLE").touch()
    Path("outputs/metrics.jsonl").write_text('{"step": 1, "time": 1.7e9, "entropy/mean": 0.5}\n')
    write(Path("outputs/monitors/file/traces"))
    metrics(Path("outputs/monitors/file/metrics.jsonl"), range(1, 3))
    write_events(Path("logs"), range(3), 0.5)
    save_rollouts(Path("details/rollout_data/1.pt"), SAMPLES)
    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
    with wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=settings) as run:
        for step in range(3):
            run.log({"train/entropy": 1.0 / (step + 1), "train/global_step": step})
    shutil.copy(files / "trainer_state.json", "outputs/trainer_state.json")
    lines = [line for block in blocks("docs/integrations.md", "sh") for line in block.splitlines()]
    imports = [line.removesuffix(" --follow").split()[1:] for line in lines if line.startswith("rlvr import ")]
    for arguments in imports:
        assert main(arguments) == 0, arguments
    with open_store("runs") as store:
        found = dict(store.sql("SELECT run, count(*) FROM steps WHERE name = 'entropy' GROUP BY run").rows)
        assert found == {"verl": 2, "prime": 1, "newer": 2, "slime": 3, "openrlhf": 3, "tracked": 3, "trl": 4}
        assert store.sql("SELECT run, count(*) FROM samples GROUP BY run ORDER BY run").rows == [
            ("newer", 4), ("prime", 1), ("slime", 4), ("verl", 8),
        ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_lines_for_trl_record_a_run(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import GRPOTrainer

    from trainer.policy.sources import BUILTIN
    from trainer.tasks import make_task

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GRPOTrainer, "_send_telemetry", lambda self: None)  # a test reaches no network
    lines = blocks("docs/integrations.md")[0]
    assert len(lines.splitlines()) <= 10
    lines = lines.replace(
        "max_steps=20", "max_steps=2, use_cpu=True, bf16=False, report_to=[], max_completion_length=9"
    )
    dataset = Dataset.from_list([{"prompt": prompt.text} for prompt in make_task("chain").prompts("train")[:16]])
    scope = {
        "model": str(BUILTIN["builtin"]),
        "reward": lambda completions, **_: [0.0] * len(completions),
        "dataset": dataset,
    }
    exec(lines, scope)
    with open_store("runs") as store:
        found = store.sql(
            "SELECT step, count(*) AS n FROM tokens WHERE run = 'mine' GROUP BY step ORDER BY step"
        ).frame()
        assert found["step"].tolist() == [1, 2] and min(found["n"]) > 0


def test_the_lines_for_code_that_logs_to_wandb_record_a_run(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("WANDB_", "RLVR_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    lines = blocks("docs/integrations.md")[1]
    assert len(lines.splitlines()) <= 10
    exec(lines, {})
    (tmp_path / "train.py").write_text(lines.replace("rlvr_monitor.wandb as wandb", "wandb"))
    (shell,) = [block for block in blocks("docs/integrations.md", "sh") if block.startswith("rlvr tap")]
    environment = child_environment() | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for line, name in zip(shell.splitlines(), ("tracked-2", "tracked"), strict=True):
        if name == "tracked":
            shutil.rmtree("runs/runs/tracked")  # the first line's run took that name
        command = [*RLVR, *shlex.split(line)[1:]]
        command[command.index("python")] = sys.executable
        subprocess.run(command, check=True, env=environment, timeout=200)
    with open_store("runs") as store:
        found = store.sql("SELECT run, name, count(*) FROM steps WHERE name NOT LIKE 'perf/%' GROUP BY ALL").rows
    names = ("entropy", "my/own", "reward")
    assert sorted(found) == [(run, name, 30) for run in ("tracked", "tracked-2") for name in names]


def test_the_options_for_verl_are_those_of_its_logger():
    from monitor.integrations.verl.backend import OPTIONS

    (shell,) = [block for block in blocks("docs/integrations.md", "sh") if "trainer.rlvr" in block]
    assert set(re.findall(r"trainer\.rlvr\.(\w+)=", shell)) <= set(OPTIONS)
    section = (ROOT / "docs/integrations.md").read_text().split("\n## verl\n")[1].split("\n## ")[0]
    assert all(f"`{name}" in section for name in OPTIONS)


def test_the_options_for_slime_are_those_of_its_log_functions():
    from monitor.integrations.slime.hook import OPTIONS

    (shell,) = [block for block in blocks("docs/integrations.md", "sh") if "rlvr_monitor.slime" in block]
    for path in re.findall(r"-path (rlvr_monitor\.\S+)", shell):
        module, _, name = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
    (settings,) = blocks("docs/integrations.md", "yaml")
    assert tuple(re.findall(r"^(\w+):", settings, re.MULTILINE)) == OPTIONS
