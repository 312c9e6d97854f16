"""Who may import whom (docs/architecture.md)."""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rlvr_monitor", "monitor", "trainer", "dashboard")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = {"torch", "transformers", "triton", "streamlit", "plotly", "wandb", "apprise", "tensorboard", "pandas"}
FORBIDDEN = {
    "rlvr_monitor": {"trainer", "dashboard", "numpy", "duckdb", "pyarrow", *HEAVY},
    "monitor": {"rlvr_monitor", "trainer", "dashboard", *HEAVY},
    "trainer": {"rlvr_monitor", "dashboard", "streamlit", "plotly"},
    "dashboard": {"rlvr_monitor", "trainer", "torch", "transformers", "triton"},
}
ALLOWED_IN = {
    # the check for modules that hide ours, which works where `monitor` is hidden
    "rlvr_monitor": ("monitor/cli.py", "monitor/by_name.py"),
    "torch": (
        "monitor/signals",
        "monitor/integrations/trl/",
        "monitor/integrations/files/dumps.py",  # inside a function, for a file that only torch reads
        "monitor/integrations/loop/",
        "monitor/integrations/slime/",
        "monitor/integrations/verl/",
        "monitor/integrations/weighted.py",
    ),
    "transformers": ("monitor/integrations/slime/", "monitor/integrations/trl/"),
    "triton": ("monitor/signals/group_kernel.py",),  # imported by name where there is a GPU, never with the package
    "wandb": ("monitor/integrations/",),
    "tensorboard": ("monitor/integrations/",),
    "apprise": ("monitor/integrations/apprise.py",),
}
SCREEN = 40  # lines


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    relative = str(path.relative_to(ROOT))
    found = imports_of(path) & FORBIDDEN[relative.split("/")[0]]
    found = {name for name in found if not relative.startswith(ALLOWED_IN.get(name, ()))}
    assert not found, f"{relative} imports {sorted(found)}"


def imported_files(path: Path) -> set[Path]:
    """Files of our packages that a file imports when it is loaded (an import inside a function comes later)."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            base = ROOT.joinpath(*name.split("."))
            found |= {file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()}
    return found - {path}


def test_no_files_import_each_other_in_a_circle():
    after = {path: imported_files(path) for path in SOURCES}
    inits = {path for path in SOURCES if path.name == "__init__.py"}  # a door imports what it shows, which names it
    try:
        list(TopologicalSorter({path: after[path] - inits for path in SOURCES}).static_order())
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(str(path.relative_to(ROOT)) for path in error.args[1])}")


def test_the_training_loop_fits_on_a_screen():
    tree = ast.parse((ROOT / "trainer" / "train.py").read_text())
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    loop = next(node for node in ast.walk(train) if isinstance(node, ast.For))
    assert loop.end_lineno - loop.lineno + 1 <= SCREEN


def test_no_module_shadows_the_standard_library():
    """`streamlit run` puts the script's folder first on sys.path."""
    shadowing = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.parts[len(ROOT.parts)] not in ("rlvr_monitor", "monitor") and path.stem in sys.stdlib_module_names
    ]
    assert not shadowing
    assert not (ROOT / "dashboard" / "pages").exists()


def test_no_source_names_a_package_registry():
    for path in [*SOURCES, *(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "Makefile"]:
        text = path.read_text()
        assert "pypi.org" not in text and "pythonhosted" not in text, path
