"""An error for a user's module that hides one of our packages, which have generic names.

`monitor` imports nothing else from this package. The check lives here because where `monitor` itself is hidden, nothing
in it can run.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent  # the folder that holds rlvr_monitor, monitor, trainer and dashboard


class ShadowedError(ImportError):
    """`import name` finds a module that is not ours. The text is for the user."""


def require_own(name: str) -> None:
    """Make sure that `import name` gives this distribution's package. Imports nothing; raises ShadowedError.

    name: monitor, trainer or dashboard.
    """
    own, found = HOME / name, _file_of(name)
    if found is None or Path(found).resolve() != own / "__init__.py":
        raise ShadowedError(
            f"`import {name}` finds {found or 'nothing'}, expected the package {name!r} of rlvr-monitor in {own}. "
            f"Rename your module or folder {name!r}, or start Python where its folder is not searched first: "
            "from another folder, with `python -P`, or without that folder on PYTHONPATH."
        )


def _file_of(name: str) -> str | None:
    module = sys.modules.get(name)
    if module is not None:  # already imported: sys.path no longer matters
        return getattr(module, "__file__", None)
    spec = find_spec(name)
    return None if spec is None else spec.origin
