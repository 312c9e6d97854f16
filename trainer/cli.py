"""`rlvr train`: parse and check, then train, record, and save; Ctrl-C and SIGTERM end it cleanly."""

from __future__ import annotations

import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from monitor.errors import MonitorError
from monitor.metrics import nearest
from trainer.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from monitor.recorder import Recorder
    from monitor.records import Alert, StepRecord
    from trainer.setup import Parts

PRESETS = Path(__file__).parent / "presets"
TOKEN_BYTES, SAMPLE_BYTES, STEP_BYTES = 20, 150, 15_000  # on disk, measured by benchmarks/bench_recorder.py

HELP = """Train a policy with group-relative policy optimisation, recording every token.

rlvr train [CONFIG.toml or preset] [--dotted.options]: the defaults, then the file, then the options. Presets: demo,
smollm2-chain-sum, paper-gsm8k, paper-math."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. Like KeyboardInterrupt no Exception, so that no handler on the way keeps it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def parse_config(argv: list[str]) -> TrainConfig:
    """The configuration of a command line. Raises ConfigError; wrong options end the process with code 2."""
    settings: dict[str, Any] = {}
    if argv and not argv[0].startswith("-"):
        settings, argv = _read_toml(_config_path(argv[0])), argv[1:]
    return tyro.cli(TrainConfig, args=argv, default=TrainConfig(**settings), prog="rlvr train", description=HELP)


def _config_path(text: str) -> Path:
    """The file that CONFIG means: a path, or the name of a preset."""
    if text.endswith(".toml") or Path(text).exists():
        return Path(text)
    known = {path.stem: path for path in sorted(PRESETS.glob("*.toml"))}
    if text not in known:
        raise ConfigError(
            f"No preset {text!r}.{nearest(text, known)} Known presets: {', '.join(known)}. A configuration of your own "
            "is a file that ends in .toml."
        )
    return known[text]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}. Expected a TOML file.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None


def main(argv: list[str]) -> int:
    """Exit codes: 0 trained to the end, 1 the run failed, 2 wrong use, 128 + n stopped by signal n."""
    try:
        config = parse_config(argv)
    except ConfigError as error:
        return _refuse(error)
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status(f"Loading {config.model} and {config.task}"):
        from trainer.setup import prepare

        try:
            parts = prepare(config)
            recorder, name = _open_recorder(config, console)
        except (ValueError, MonitorError, OSError) as error:  # OSError: a hub id that cannot be loaded
            return _refuse(error)
    console.print(_what_starts(parts, name))
    status, code = _guarded_run(parts, recorder, console, name)
    if status != "failed":
        parts.policy.save(folder := _policy_folder(config, name))
        console.print(f"Run {name} {status}. Policy: {folder}  Look at it: rlvr dashboard {config.store}")
    recorder.close(status)
    return code


def _guarded_run(parts: Parts, recorder: Recorder, console: Console, name: str) -> tuple[str, int]:
    """(status, exit code) of the training; only unforeseen errors propagate, recorded like the foreseen ones."""
    from trainer.rewards import RewardError
    from trainer.rollout import NonFiniteError
    from trainer.train import train

    try:
        with _signals_raise(), _progress(console, parts.config.steps, recorder) as progress:
            train(parts, recorder, progress)
        return "finished", 0
    except Interrupted as stop:
        console.print(f"{stop}: saving the policy, closing the run.")
        return "stopped", 128 + stop.number
    except (NonFiniteError, RewardError) as error:
        recorder.event("failed", str(error))
        console.print(f"Run {name} failed. {error} What was recorded stays: rlvr show {name}", style="red")
        return "failed", 1
    except Exception as error:
        recorder.event("failed", f"{type(error).__name__}: {error}")
        recorder.close("failed")
        raise


def _refuse(error: Exception) -> int:
    print(f"rlvr train: {error}", file=sys.stderr)
    return 2


def _open_recorder(config: TrainConfig, console: Console) -> tuple[Recorder, str]:
    """The recorder of a new run, with alerts and, if asked for, wandb; and the run's name."""
    from monitor.alerts.engine import AlertEngine
    from monitor.recorder import Recorder
    from trainer.setup import run_info

    name = config.run or _free_name(config)
    sinks: list[Any] = []
    if config.wandb != "off":
        from monitor.integrations.wandb import WandbSink

        sinks.append(WandbSink(mode=config.wandb, dir=config.store))
    recorder = Recorder(
        config.store,
        run_info(config, name),
        engine=AlertEngine(warmup_steps=config.weighting.warmup_steps),
        sinks=sinks,
        on_alert=partial(_print_alert, console, set()),
        max_gb=config.record.max_gb,
        tokens_every=config.record.tokens_every,
    )
    return recorder, name


def _free_name(config: TrainConfig) -> str:
    """<weighting>-s<seed>, with a number behind it if the store has that run."""
    base = f"{config.weighting.kind}-s{config.seed}"
    taken = {path.name for path in (Path(config.store) / "runs").glob(f"{base}*")}
    return next(name for i in count(1) if (name := base if i == 1 else f"{base}-{i}") not in taken)


def _policy_folder(config: TrainConfig, name: str) -> Path:
    return Path(config.save) if config.save else Path(config.store) / "policies" / name


def _what_starts(parts: Parts, name: str) -> str:
    """What is about to run and how much it will write."""
    config, rollout = parts.config, parts.config.rollout
    n = rollout.prompts * rollout.group_size
    upper = n * rollout.max_new_tokens * TOKEN_BYTES / config.record.tokens_every + STEP_BYTES + n * SAMPLE_BYTES
    parameters = sum(p.numel() for p in parts.policy.model.parameters())
    return (
        f"Run {name}: {config.weighting.kind} on {config.task}, {config.model} ({parameters / 1e6:.1f} M parameters, "
        f"{parts.policy.device.type}), {config.steps} steps of {rollout.prompts} x {rollout.group_size} rollouts. "
        f"Store {config.store}: at most about {upper / 1e3:.0f} kB a step, {upper * config.steps / 1e6:.0f} MB in all."
    )


def _print_alert(console: Console, fired: set[tuple[str, int]], alert: Alert) -> None:
    """Alerts that fire, and the end of those that did, in the terminal; pending ones stay in the store."""
    if alert.state == "firing":
        fired.add((alert.rule, alert.first_step))
        colour = {"critical": "bold red", "warning": "yellow"}.get(alert.severity, "cyan")
        console.print(f"[{colour}]ALERT {alert.rule}[/] ({alert.severity}) at step {alert.step}: {alert.message}")
    elif alert.state == "resolved" and (alert.rule, alert.first_step) in fired:
        console.print(f"[green]RESOLVED {alert.rule}[/] at step {alert.step}: {alert.message}")


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise Interrupted between two bytecodes; a second one kills as usual."""

    def handler(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def _progress(console: Console, steps: int, recorder: Recorder) -> Iterator[Callable[[StepRecord], None]]:
    """A progress bar with rate, time left, reward and entropy; a line every tenth of the run without a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("step"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("step", total=steps, speed="", now="")
        truncated = False

        def show(record: StepRecord) -> None:
            nonlocal truncated
            s = record.scalars
            now = f"reward {s['reward']:.3f}  entropy {s['entropy']:.3f} nats"
            bar.update(task, completed=record.step, speed=f"{s['perf/step_s']:.2f} s/step", now=now)
            if not console.is_terminal and record.step % max(1, steps // 10) == 0:
                console.print(f"step {record.step}/{steps}  {now}  {s['perf/step_s']:.2f} s/step")
            before, truncated = truncated, s["truncated_share"] == 1.0
            if truncated and not before:  # said once for a stretch of such steps
                limit = "every completion was truncated. Raise rollout.max_new_tokens."
                recorder.event("truncated", f"Step {record.step}: {limit}", record.step)
                console.print(f"step {record.step}: {limit}", style="yellow")

        yield show
