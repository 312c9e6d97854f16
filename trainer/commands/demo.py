"""`rlvr demo`: two monitored runs, uniform and entropy_budget, and the live dashboard.

This module only starts processes and reads the store. Both runs start from the same base policy, seed and prompts with
the settings of presets/demo.toml, on one CPU core each.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from monitor.children import RLVR, child_environment
from monitor.commands.parsing import parse
from monitor.queries.alerts import alert_log
from monitor.queries.differences import final_figures
from monitor.queries.frames import Frame
from monitor.queries.series import latest_scalars, scalar_series, series_of, value_at
from monitor.stats.comparison import live_verdicts
from monitor.store.tail import Tail
from trainer.runtime.children import ending, interrupts_raise, run_bars, start_trainer

ARMS = ("uniform", "entropy_budget")
PRESET = Path(__file__).parents[1] / "presets" / "demo.toml"
LEVEL = "eval/heldout/pass@1"
FIGURES = {  # row of the table -> (series, format)
    "Entropy, nats": ("entropy", "{:.3f}"),
    "pass@1, held-out": (LEVEL, "{:.3f}"),
    "pass@4, held-out": ("eval/heldout/pass@4", "{:.3f}"),
    "Distinct correct of 16": ("eval/heldout/distinct", "{:.2f}"),
}


@dataclass(frozen=True)
class Options:
    """Train uniform and entropy_budget side by side and watch them."""

    store: str = "runs"  # folder of the store
    seed: int = 0  # seed of both runs
    steps: int | None = None  # training steps; none: the preset's
    no_browser: bool = False  # do not open the dashboard in a browser
    exit_when_done: bool = False  # no dashboard; exit after the result


def main(argv: list[str]) -> int:
    """Exit codes: 0 both runs finished, 1 a run failed, 2 wrong use, 130 stopped by Ctrl-C while training."""
    options = parse(Options, argv, "demo")
    console = Console(highlight=False, markup=False, emoji=False)  # texts of runs must not be read as markup
    store = Path(options.store)
    if store.exists() and not store.is_dir():
        print(f"rlvr demo: the store {store} is a file, expected a folder. Choose another --store.", file=sys.stderr)
        return 2
    (store / "logs").mkdir(parents=True, exist_ok=True)
    name = _free_comparison(store)
    interrupts_raise()
    try:
        with ExitStack() as stack:
            if not options.exit_when_done:
                url = stack.enter_context(_dashboard(store, browser=not options.no_browser))
                console.print(Text.assemble("Dashboard: ", (url, "bold"), f"   store: {store}"))
            runs = {f"{name}-{arm}": stack.enter_context(_trainer(store, name, arm, options)) for arm in ARMS}
            failed = _follow(store, runs, console)
            if failed:
                console.print(f"Failed: {', '.join(failed)}. See {store / 'logs'}.", style="red")
                return 1
            for part in _result(store, dict(zip(ARMS, runs, strict=True)), options.seed):
                console.print(part)
            if not options.exit_when_done:
                console.print(f"The dashboard stays at {url} until Ctrl-C.")
                signal.pause()
        return 0
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130 if not _all_finished(store, name) else 0


def _free_comparison(store: Path) -> str:
    """The first of demo, demo-2, ... of which the store holds no run."""
    names = (f"demo-{i}" if i > 1 else "demo" for i in count(1))
    return next(name for name in names if not any((store / "runs" / f"{name}-{arm}").exists() for arm in ARMS))


@contextmanager
def _dashboard(store: Path, *, browser: bool) -> Iterator[str]:
    """Starts `rlvr dashboard` and yields its address."""
    command = [*RLVR, "dashboard", str(store), *([] if browser else ["--no-browser"])]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=child_environment()
    )
    with ending(process, 8):
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("Dashboard: "):
            raise SystemExit("rlvr demo: the dashboard did not start; its message is above.")
        yield line.removeprefix("Dashboard: ").strip()


@contextmanager
def _trainer(store: Path, name: str, arm: str, options: Options) -> Iterator[subprocess.Popen[str]]:
    """Starts one arm, and ends it on the way out."""
    settings = {
        "weighting.kind": arm,
        "run": f"{name}-{arm}",
        "comparison": name,
        "store": str(store),
        "seed": str(options.seed),
    }
    if options.steps:
        settings["steps"] = str(options.steps)
    arguments = [text for key, value in settings.items() for text in (f"--{key}", value)]
    with ending(start_trainer([str(PRESET), *arguments], store / "logs" / f"{name}-{arm}.log")) as process:
        yield process


def _follow(store: Path, runs: dict[str, subprocess.Popen[str]], console: Console) -> list[str]:
    """Shows progress read from the store until every process has ended; returns the runs whose process failed."""
    tail, told = Tail(store, histograms=False), set[tuple[Any, ...]]()
    with run_bars(console) as bars:
        tasks = {run: bars.add_task(run, total=None, now="starting") for run in runs}
        while True:
            alive = any(process.poll() is None for process in runs.values())
            tail.poll()
            _advance(tail, bars, tasks)
            _tell_alerts(tail, list(runs), told, console)
            if not alive:
                break
            time.sleep(0.5)
    tail.close()
    return [run for run, process in runs.items() if process.returncode != 0]


def _advance(tail: Tail, bars: Progress, tasks: dict[str, TaskID]) -> None:
    latest = latest_scalars(tail.cursor(), list(tasks))
    for run, task in tasks.items():
        steps = latest["step"][latest["run"] == run]
        if run in tail.runs and len(steps) and steps.max() > 0:
            now = f"reward {value_at(latest, run, 'reward'):.2f}  entropy {value_at(latest, run, 'entropy'):.2f} nats"
            total = tail.runs[run].info.get("config", {}).get("steps")
            bars.update(task, completed=int(steps.max()), total=total, now=now)


def _tell_alerts(tail: Tail, runs: list[str], told: set[tuple[Any, ...]], console: Console) -> None:
    """Prints each alert once when it fires, and once when it is resolved after it fired."""
    log = alert_log(tail.cursor(), runs)
    columns = ("run", "rule", "state", "first_step", "step", "severity", "message")
    for run, rule, state, first, step, severity, message in zip(*(log[c] for c in columns), strict=True):
        key = (run, rule, first, severity if state == "firing" else "resolved")
        known = any((run, rule, first) == other[:3] for other in told)
        if key not in told and (state == "firing" or (state == "resolved" and known)):
            told.add(key)
            console.print(Text.assemble((f"{run}: {rule} {state} at step {step}.", "yellow"), f" {message}"))


def _result(store: Path, runs: Mapping[str, str], seed: int) -> tuple[Table, Text]:
    """The paired result, at the last step and at equal pass@1, and in words. runs: {arm: run}."""
    tail = Tail(store, histograms=False)
    tail.poll()
    con, names = tail.cursor(), list(runs.values())
    figures = final_figures(con, names, [series for series, _ in FIGURES.values()], LEVEL)
    entropy = scalar_series(con, names, ["entropy"], max_points=10**9)
    log = alert_log(con, names)
    configs = {run: entry.info.get("config", {}) for run, entry in tail.runs.items()}
    verdict = live_verdicts(con, {arm: {seed: run} for arm, run in runs.items()}, configs)[ARMS[1]]
    tail.close()
    equal = figures["equal"]
    table = Table(title="Same base policy, seed and prompts; only the weighting differs")
    table.add_column("", no_wrap=True)
    for arm in ARMS:
        table.add_column(f"{arm}\nat the\nlast step", justify="right")
    for arm in ARMS if equal else ():
        table.add_column(f"{arm}\nat equal\npass@1", justify="right")
    columns = [figures["last"][run] for run in names] + [equal[run] for run in names if equal]
    table.add_row("Step", *(f"{column['step']:.0f}" for column in columns))
    for row, (series, form) in FIGURES.items():
        table.add_row(row, *(form.format(column.get(series, np.nan)) for column in columns))
    first = [series_of(entropy, run, "entropy")[1][0] for run in names]
    kept = [column["entropy"] / start for column, start in zip(columns, first * 2, strict=False) if "entropy" in column]
    table.add_row("Entropy kept", *(f"{share:.0%}" for share in kept))
    warnings = {run: _warnings(log, run) for run in names}
    table.add_row("Warnings", *(str(len(of)) for of in warnings.values()))
    told = "; ".join(f"{arm}: {_first(warnings[run])}" for arm, run in runs.items())
    return table, Text(f"{verdict}\nFirst warning, {told}.\nThe study behind this pair: docs/reproduction.md.")


def _warnings(log: Frame, run: str) -> dict[tuple[str, int], int]:
    """{(rule, first step of the episode): step at which it first was a warning or worse} of one run."""
    found: dict[tuple[str, int], int] = {}
    columns = ("run", "rule", "state", "first_step", "step", "severity")
    for name, rule, state, first, step, severity in zip(*(log[c] for c in columns), strict=True):
        if name == run and state == "firing" and severity != "info":
            found.setdefault((rule, int(first)), int(step))
    return found


def _first(warnings: Mapping[tuple[str, int], int]) -> str:
    if not warnings:
        return "none"
    (rule, _), step = min(warnings.items(), key=lambda item: item[1])
    return f"{rule} at step {step}"


def _all_finished(store: Path, name: str) -> bool:
    tail = Tail(store, histograms=False)
    tail.poll()
    runs = [tail.runs.get(f"{name}-{arm}") for arm in ARMS]
    tail.close()
    return all(run is not None and run.status == "finished" for run in runs)
