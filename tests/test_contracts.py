"""What must change together: exports, metrics and their page, weightings, commands, docs and code."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import monitor
from docs.make_metrics import page
from monitor.cli import COMMANDS
from monitor.metrics import METRICS
from trainer.config import WEIGHTINGS, LossConfig, TrainConfig
from trainer.learning.loss import LOSSES
from trainer.tasks import TASKS

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}


def test_exports_exist_and_are_about_ten():
    assert all(hasattr(monitor, name) for name in monitor.__all__)
    assert len(monitor.__all__) <= 12
    assert {"Recorder", "open_store"} <= set(monitor.__all__)


def test_the_metrics_page_is_current():
    assert DOCS["metrics.md"] == page(), "Run: python -m docs.make_metrics"


@pytest.mark.parametrize("key", METRICS)
def test_every_metric_has_a_label_a_help_and_a_unit_or_none(key):
    spec = METRICS[key]
    assert spec.label and spec.help.endswith(".") and spec.key == key


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_resolves_and_is_documented(name):
    target = COMMANDS[name][0]
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert any(f"rlvr {name}" in text for text in DOCS.values()), f"no page mentions `rlvr {name}`"


def test_every_weighting_and_task_is_documented():
    text = DOCS["extending.md"] + DOCS["README.md"] + DOCS["method.md"]
    for name in [*WEIGHTINGS, *(kind.rstrip(":") for kind in TASKS)]:
        assert name in text, name


def test_every_loss_has_a_kind_and_every_kind_a_loss():
    assert set(get_args(LossConfig.model_fields["kind"].annotation)) == set(LOSSES)


def test_links_between_pages_lead_somewhere():
    for name, text in DOCS.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text):
            assert (folder / target).exists(), f"{name} links to {target}"


def test_presets_are_valid():
    import tomllib

    presets = {path.stem: tomllib.loads(path.read_text()) for path in (ROOT / "trainer" / "presets").glob("*.toml")}
    assert {"demo", "paths", "smollm2-chain-sum", "paper-gsm8k", "paper-math"} <= presets.keys()
    assert [TrainConfig(**settings).steps for settings in presets.values()] == [s["steps"] for s in presets.values()]


def test_the_command_line_answers_without_torch():
    code = (
        "import sys\nfrom monitor.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'duckdb' not in sys.modules, 'slow import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
