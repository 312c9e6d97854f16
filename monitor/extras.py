"""What each extra of the distribution brings, and the error for a user who lacks the extra."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from monitor.errors import MissingPackageError

EXTRAS = {  # extra: modules it brings, the telling one first; a test holds this to pyproject.toml
    "dashboard": ("streamlit", "plotly", "markupsafe"),
    "train": (
        "torch", "transformers", "accelerate", "datasets", "gguf", "math_verify", "pebble", "peft",
        "reasoning_gym", "safetensors",
    ),
    "cloud": ("obstore",),
    "login": ("authlib", "httpx"),
    "notify": ("apprise",),
    "bitsandbytes": ("bitsandbytes",),
    "wandb": ("wandb",),
    "trl": ("trl",),
}  # fmt: skip


def require_extras(what: str, extras: str) -> None:
    """Raise MissingPackageError unless all of the comma-separated extras are installed. Imports none of them."""
    modules = [module for extra in extras.split(",") for module in EXTRAS[extra]]
    require(what, modules, f'"rlvr-monitor[{extras}]"')


def require(what: str, modules: Iterable[str], install: str) -> None:
    """Raise MissingPackageError for the first module that is not installed. install: what to give to pip."""
    for module in modules:
        if not _installed(module):
            raise MissingPackageError(f"{what} needs {module}, which is not installed. Type: pip install {install}")


def _installed(module: str) -> bool:
    try:
        spec = find_spec(module)
    except ValueError:  # put into sys.modules by hand
        return True
    return spec is not None and spec.origin is not None  # a plain folder, such as wandb's output, has no origin
