"""The public names: light to import, there when used, known to type checkers."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import rlvr_monitor
from monitor.errors import MissingPackageError

SOURCE = Path(rlvr_monitor.__file__).read_text()
OF_TORCH = {"deviation_cap", "signal_statistics", "step_record", "token_signals"}
TORCH = find_spec("torch") is not None


@pytest.mark.parametrize("name", rlvr_monitor.__all__)
def test_every_name_is_there_when_used(name: str) -> None:
    if name in OF_TORCH and not TORCH:
        with pytest.raises(MissingPackageError, match=r"^monitor\.signals needs torch, which is not installed\."):
            getattr(rlvr_monitor, name)
    else:
        home = importlib.import_module(rlvr_monitor._MODULES[name])
        assert getattr(rlvr_monitor, name) is getattr(home, name)


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    block = next(node for node in ast.parse(SOURCE).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == rlvr_monitor._MODULES
    assert sorted(seen) == sorted(rlvr_monitor.__all__)
    assert set(rlvr_monitor.__all__) <= set(dir(rlvr_monitor))


def test_the_import_is_light() -> None:
    script = (
        "import sys, time; started = time.perf_counter(); import rlvr_monitor; print(time.perf_counter() - started); "
        "heavy = {'torch', 'numpy', 'duckdb', 'pyarrow', 'monitor'} & set(sys.modules); sys.exit(str(heavy or '') or 0)"
    )
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True) for _ in range(3)]
    assert [(done.returncode, done.stderr) for done in runs] == [(0, "")] * 3
    assert min(float(done.stdout) for done in runs) < 0.2


def test_an_unknown_name_is_told_with_those_that_exist() -> None:
    with pytest.raises(AttributeError, match=r"'rlvr_monitor' has no attribute 'Recoder'\. Its names: METRICS, "):
        _ = rlvr_monitor.Recoder


def test_evaluate_alerts_is_what_check_prints() -> None:
    steps = list(range(1, 101))
    entropy = [1.0 if step <= 30 else max(0.02, 1.0 - (step - 30) / 20) for step in steps]
    found = rlvr_monitor.evaluate_alerts({"step": steps, "entropy": entropy, "reward": [0.5] * 100})
    first = found[0]
    assert "collapse" in first["rule"] and 30 < first["step"] < 50 and first["baseline"] == 1.0
    assert rlvr_monitor.evaluate_alerts({"step": steps, "entropy": [1.0] * 100}) == []
