"""Imports that are named as text and made when called: of the other packages, which `monitor` never imports itself."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rlvr_monitor.shadowing import require_own


def resolve(target: str) -> Any:
    """What "package.module:name" names. Raises ShadowedError if a module of the user's hides our package.

    Example: resolve("trainer.commands.train:main")
    """
    module, _, name = target.partition(":")
    require_own(module.split(".")[0])
    return getattr(import_module(module), name)
