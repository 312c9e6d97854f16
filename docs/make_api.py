"""Writes docs/api.md from the public names of rlvr_monitor: python -m docs.make_api"""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

import rlvr_monitor
from monitor.integrations.loop import Monitor
from monitor.signals import definition
from monitor.store.reader import Store

HEAD = """# The public names

Made from the docstrings by `python -m docs.make_api`.

```python
from rlvr_monitor import Recorder, StepRecord, evaluate_alerts, open_store

with Recorder("runs", "mine") as recorder:
    for step in range(1, 61):
        recorder.record(StepRecord(step, {"entropy": 1.0 / step, "reward": step / 60}))
with open_store("runs") as store:
    entropy = store.sql("SELECT step, value AS entropy FROM steps WHERE name = 'entropy' ORDER BY step").frame()
alerts = evaluate_alerts(entropy)
```

These names stay; where they live in `monitor` may change. Each is imported when it is first used. Those marked *torch*
need torch, which the core does not bring.
"""


def groups() -> dict[str, list[str]]:
    """The headings of the module's docstring with the names under each."""
    found: dict[str, list[str]] = {}
    for block in inspect.getdoc(rlvr_monitor).split("\n\n"):
        heading, *lines = block.splitlines()
        if lines and all(line.startswith("    ") for line in lines):
            found[heading] = [line.split()[0] for line in lines]
    return found


def _signature(name: str, value: Any) -> str:
    """The call as its source writes it, without types; for a dataclass its fields."""
    node = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    if isinstance(node, ast.ClassDef):
        made = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        if not made:
            return f"{name}({', '.join(_field(item) for item in node.body if isinstance(item, ast.AnnAssign))})"
        node = made[0]
    for argument in [*node.args.args, *node.args.kwonlyargs]:
        argument.annotation = None
    node.args.args = [argument for argument in node.args.args if argument.arg != "self"]
    return f"{name}({ast.unparse(node.args)})"


def _field(item: ast.AnnAssign) -> str:
    default = "..." if isinstance(item.value, ast.Call) else item.value and ast.unparse(item.value)
    return ast.unparse(item.target) + (f"={default}" if default else "")


def _methods(owner: type) -> list[str]:
    """Public methods and properties, a line each."""
    lines = []
    for name, value in vars(owner).items():
        if not name.startswith("_") and (doc := inspect.getdoc(value)):
            call = name if isinstance(value, property) else _signature(name, value)
            lines.append(f"- `.{call}`: {' '.join(doc.split(chr(10) + chr(10))[0].split())}")
    return [*lines, ""] if lines else []


def _section(name: str) -> list[str]:
    value = getattr(rlvr_monitor, name)
    if not callable(value):
        return [f"### {name}", "", "A mapping from keys to metrics: [metrics.md](metrics.md).", ""]
    torch = ", *torch*" if value.__module__.startswith(("monitor.signals", "monitor.integrations.trl")) else ""
    described = {"token_signals": definition.token_signals}.get(name, value)
    doc = ["```text", inspect.getdoc(described) or "", "```", ""]
    methods = _methods({"open_store": Store, "init": Monitor}.get(name, value if isinstance(value, type) else object))
    return [f"### {name}", "", f"`{_signature(name, value)}`{torch}", "", *doc, *methods]


def page() -> str:
    """The text of docs/api.md."""
    lines = [HEAD]
    for heading, names in groups().items():
        lines += [f"## {heading}", ""]
        for name in names:
            lines += _section(name)
    return "\n".join(lines)


if __name__ == "__main__":
    (Path(__file__).parent / "api.md").write_text(page())
