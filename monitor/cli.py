"""The `rlvr` command. Commands are imported when called, so that `rlvr --help` loads no torch."""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Callable, Sequence

from monitor.by_name import resolve
from monitor.children import HOME
from monitor.errors import MissingPackageError, MonitorError
from monitor.extras import require_extras
from rlvr_monitor.shadowing import ShadowedError

# command: ("module:function", one line of help). The function takes the other arguments and returns the exit code.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("trainer.commands.demo:main", "two monitored runs, uniform and ict, and the live dashboard"),
    "train": ("trainer.commands.train:main", "train a policy and record the run"),
    "preflight": ("trainer.commands.preflight:main", "say whether a run can learn, before it is paid for"),
    "plan": ("trainer.commands.plan:main", "say whether a run fits its device, and with which settings"),
    "eval": ("trainer.commands.eval:main", "pass@k and distinct answers of a run's final policy or of any model"),
    "compare": ("trainer.commands.compare:main", "train every arm with every seed and print the paired table"),
    "report": ("dashboard.report:main", "a stored comparison as one HTML file"),
    "fetch": ("trainer.commands.fetch:main", "download a model, or problems as JSONL"),
    "dashboard": ("dashboard.launch:main", "show a store in the browser, live"),
    "ls": ("monitor.commands.ls:main", "list the runs of a store"),
    "show": ("monitor.commands.show:main", "show one run: status, configuration, latest values, alerts"),
    "sql": ("monitor.commands.sql:main", "ask a store any question, also while runs write into it"),
    "check": ("monitor.commands.check:main", "replay the alert rules on a run or on any series"),
    "import": ("monitor.commands.imports:main", "record the files of another trainer as a run, once or live"),
    "watch": ("monitor.commands.watch:main", "judge every run of a live store and tell of alerts, also elsewhere"),
    "tap": ("monitor.commands.tap:main", "run code that logs to wandb, unchanged, so that it records here"),
    "alerts": ("monitor.commands.alerts:main", "list, acknowledge and mute alerts; test where they are sent"),
    "doctor": ("trainer.commands.doctor:main", "say what this machine has and lacks, and for which part"),
    "store": ("monitor.commands.store:main", "check, compact, prune or merge stores"),
    "export": ("monitor.commands.export:main", "one run as a native DuckDB file, Parquet or CSV"),
}
NEEDS = {  # command: the extras it needs, as pip takes them
    "demo": "train,dashboard",
    "train": "train",
    "preflight": "train",
    "plan": "train",
    "eval": "train",
    "compare": "train",
    "fetch": "train",
    "report": "dashboard",
    "dashboard": "dashboard",
}
FINE, NOT_FINE, WRONG_USE = 0, 1, 2


def help_text() -> str:
    """What `rlvr --help` prints."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rlvr COMMAND [ARGUMENTS]",
            "",
            "Train with verifiable rewards and watch the entropy of the policy, live.",
            "",
            *lines,
            "",
            "`rlvr COMMAND --help` explains a command. The store is the folder 'runs' unless given.",
            "Exit codes: 0 fine, 1 the thing asked about is not fine, 2 wrong use.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 fine, 1 the thing asked about is not fine, 2 wrong use)."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # names of files and texts of runs may hold what a terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text())
        return FINE if args else WRONG_USE
    if args[0] == "--version":
        from importlib.metadata import version

        print(version("rlvr-monitor"))
        return FINE
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return _wrong(f"Unknown command {name!r}.{hint} `rlvr --help` lists the commands.")
    try:
        if name in NEEDS:
            require_extras(f"rlvr {name}", NEEDS[name])
        command: Callable[[list[str]], int] = resolve(COMMANDS[name][0])
        return command(rest)
    except MissingPackageError as error:  # its text already names who needs the package
        print(error, file=sys.stderr)
        return WRONG_USE
    except (MonitorError, ShadowedError) as error:
        return _wrong(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `rlvr ls | head`: leave nothing for the interpreter to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE


def _wrong(message: str) -> int:
    print(f"rlvr: {message}", file=sys.stderr)
    return WRONG_USE


if __name__ == "__main__":  # python -m monitor.cli: the working folder is searched first, and may hold a trainer.py
    if not sys.flags.safe_path and os.path.realpath(sys.path[0]) != str(HOME):
        del sys.path[0]
    sys.exit(main())
