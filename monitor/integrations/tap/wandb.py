"""What `import wandb` finds under `rlvr tap`, which puts this folder first on PYTHONPATH. It is no part of a package.

Either our module takes the name wandb, or, with --real, the real one is imported and told to record here too.
"""

import importlib
import os
import sys

_FOLDER = os.path.realpath(os.path.dirname(__file__))
_NAME = __name__


def _real():
    """The wandb that is installed; ModuleNotFoundError if there is none."""
    path = sys.path[:]
    shim = sys.modules.pop(_NAME)
    sys.path[:] = [folder for folder in path if os.path.realpath(folder or ".") != _FOLDER]
    try:
        return importlib.import_module(_NAME)
    except BaseException:
        sys.modules[_NAME] = shim
        raise
    finally:
        sys.path[:] = path


def _missing(error):
    return (
        f"rlvr tap: the Python that runs this, {sys.executable}, cannot import rlvr-monitor ({error}). Install it "
        "there, or give the command the Python that has it."
    )


if os.environ.get("RLVR_TAP") == "real":
    _module = _real()
    try:
        from monitor.integrations.like_wandb.beside import listen

        listen(_module)
    except Exception as _error:  # the command must run as it does without us
        print(_missing(_error) if isinstance(_error, ImportError) else f"rlvr tap: {_error}", file=sys.stderr)
else:
    try:
        import monitor.integrations.like_wandb as _module
    except ImportError as _error:
        raise ImportError(_missing(_error)) from None
    for _sub, _found in _module.SUBMODULES.items():
        sys.modules[f"{_NAME}.{_sub}"] = _found
    sys.modules[_NAME] = _module
