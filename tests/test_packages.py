"""The distribution: its wheel works from any folder and its lower bounds are told where users read them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import pytest
from checkout_wheel import ROOT, build_wheel
from oldest import lower_bounds


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"), sys.executable, "--no-build-isolation")


def test_the_wheel_holds_the_four_packages_and_their_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = next(name.split("/")[0] for name in names if name.split("/")[0].endswith(".dist-info"))
    assert {name.split("/")[0] for name in names} == {"rlvr_monitor", "monitor", "trainer", "dashboard", info}
    wanted = {"rlvr_monitor/py.typed", "monitor/py.typed", "trainer/presets/demo.toml", "dashboard/report.html"}
    wanted |= {f"trainer/base_models/{name}/model.safetensors" for name in ("chain", "chain_small", "paths")}
    wanted |= {
        "dashboard/components/chart.js",
        "monitor/alerts/rates.json",
        "monitor/alerts/judged_runs.csv",
        "monitor/integrations/files/series.py",
    }
    wanted |= {"rlvr_monitor/wandb.py", "rlvr_monitor/verl.py"}
    wanted |= {f"monitor/integrations/tap/{name}" for name in ("wandb.py", "wandb-0.31.0.dist-info/METADATA")}
    assert wanted <= names
    points = zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert "[verl.plugins]\nrlvr = rlvr_monitor.verl" in points


def test_the_wheel_works_from_any_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)

    def run(*command: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    script = "import rlvr_monitor, trainer, dashboard; print(*(m.__file__ for m in (rlvr_monitor, trainer, dashboard)))"
    packages = ("rlvr_monitor", "trainer", "dashboard")
    assert run(sys.executable, "-c", script).split() == [str(site / name / "__init__.py") for name in packages]
    runs = json.loads(run(str(site / "bin" / "rlvr"), "ls", str(ROOT / "sample_runs"), "--json"))
    assert {"explosion", "uniform-s0", "entropy_budget-s0", "ict-s0"} <= {row["run"] for row in runs}


def test_the_install_page_names_the_oldest_versions():
    text = (ROOT / "docs/install.md").read_text()
    for pin in lower_bounds():
        assert pin.replace("==", " ") in text, pin
