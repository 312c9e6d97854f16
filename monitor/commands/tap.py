"""`rlvr tap`: code that logs to wandb, unchanged, records here."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import tyro

from monitor.children import child_environment
from monitor.commands.output import DEFAULT_STORE
from monitor.commands.parsing import call
from monitor.errors import MonitorError
from monitor.store.runs import run_names, safe_name

SHIM = Path(__file__).resolve().parents[1] / "integrations" / "tap"  # holds a module called wandb


def main(argv: list[str]) -> int:
    """`rlvr tap`."""
    split = argv.index("--") if "--" in argv else len(argv)
    command = argv[split + 1 :]

    def tap(
        *, store: str = DEFAULT_STORE, run: Annotated[str, tyro.conf.arg(metavar="NAME")] = "", real: bool = False
    ) -> int:
        """Run a command whose code logs to wandb so that it records into a store: rlvr tap [OPTIONS] -- COMMAND...

        `import wandb` in the command and in its child processes finds our module, which needs no account and sends
        nothing. The exit code is the command's. Python that is started with -I or -E does not see it.

        Args:
            store: folder of the store, made if missing
            run: name of the run; none: the one that the code gives it
            real: the real wandb works as ever, and what it is given is recorded here too
        """
        return _tap(store, run, real, command)

    return call(tap, argv[:split], "tap")


def _tap(store: str, run: str, real: bool, command: list[str]) -> int:
    if not command:
        raise MonitorError("tap has no command. Expected: rlvr tap [OPTIONS] -- COMMAND..., say -- python train.py")
    program = shutil.which(command[0])
    if program is None:
        raise MonitorError(f"{command[0]!r} is no program here. Expected: rlvr tap [OPTIONS] -- COMMAND...")
    root = Path(store).expanduser().resolve()
    if run and run != safe_name(run):
        raise MonitorError(f"--run is {run!r}, expected up to 100 letters, digits, '.', '_' and '-'.")
    if run and (root / "runs").is_dir() and run in run_names(root):
        raise MonitorError(f"Run {run!r} already exists in store {store!r}. Choose another run name.")
    root.mkdir(parents=True, exist_ok=True)
    environment = child_environment()
    path = filter(None, (str(SHIM), environment.get("PYTHONPATH")))
    environment |= {
        "PYTHONPATH": os.pathsep.join(path),
        "RLVR_STORE": str(root),
        "RLVR_TAP": "real" if real else "alone",
    }
    if run:
        environment["RLVR_RUN"] = run
    sys.stdout.flush()
    os.execve(program, command, environment)  # in our place: signals and the exit code are the command's own
