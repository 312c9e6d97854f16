"""`rlvr train`: parse and check, then train, record, and save; Ctrl-C and SIGTERM end it cleanly."""

from __future__ import annotations

import argparse
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from pydantic import create_model

from monitor.errors import MonitorError, nearest
from monitor.store.runs import get_run
from trainer.config import ConfigError, TrainConfig, changed_weighting, make_weighting
from trainer.config.weighting import weightings_help

if TYPE_CHECKING:
    from rich.console import Console

    from monitor.recorder import Recorder
    from monitor.records import StepRecord
    from trainer.runtime.build import Parts
    from trainer.runtime.ranks import Ranks
    from trainer.runtime.runs import Run

PRESETS = Path(__file__).parents[1] / "presets"
TOKEN_BYTES, SAMPLE_BYTES, STEP_BYTES = 20, 150, 15_000  # on disk, measured by benchmarks/bench_recorder.py

HELP = f"""Train a policy with group-relative policy optimisation, recording every token.

rlvr train [CONFIG.toml or preset] [--dotted.options]: the defaults, then the file, then the options. Presets: demo,
smollm2-chain-sum, paper-gsm8k, paper-math.

rlvr train --resume RUN [--store STORE] [--steps N]: go on from the run's newest checkpoint, as if it had never
stopped; only --steps may be raised.

Weightings (--weighting.kind) and their own parameters (--weighting.NAME); below are those of the chosen kind:
{weightings_help()}"""


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
    options = _weighting_options(argv)
    settings["weighting"] = make_weighting(changed_weighting(settings.get("weighting", {}), options))
    kind = type(settings["weighting"])
    # The options of the chosen kind, and no others, are those of the command line.
    of_kind = create_model("TrainConfig", __base__=TrainConfig, weighting=(kind, settings["weighting"]))
    parsed = tyro.cli(of_kind, args=argv, default=_unchecked(of_kind, settings), prog="rlvr train", description=HELP)
    return TrainConfig(**parsed.model_dump())


def _unchecked(model: type[TrainConfig], settings: Mapping[str, Any]) -> TrainConfig:
    """The defaults with a file's settings over them; groups are judged together only once the options have come."""
    known = model.model_construct()
    if unknown := settings.keys() - model.model_fields.keys():
        model(**{name: settings[name] for name in unknown})  # refuses them
    given = {
        name: type(getattr(known, name))(**value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
    }
    return known.model_copy(update=given)


def _weighting_options(argv: Sequence[str]) -> dict[str, str]:
    """{name: value} of `--weighting.NAME VALUE` and `--weighting.NAME=VALUE`: they decide which other options exist."""
    found = {}
    for text, following in zip(argv, [*argv, ""][1:], strict=True):
        if text.startswith("--weighting."):
            name, equals, value = text.removeprefix("--weighting.").partition("=")
            found[name.replace("-", "_")] = value if equals else following
    return found


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


def resumed_config(argv: list[str]) -> TrainConfig | None:
    """The stored configuration of `--resume RUN [--store STORE] [--steps N]`; None without --resume."""
    if not any(text == "--resume" or text.startswith("--resume=") for text in argv):
        return None
    parser = argparse.ArgumentParser(prog="rlvr train", description="Continue a run from its newest checkpoint.")
    parser.add_argument("--resume", metavar="RUN", required=True)
    parser.add_argument("--store", default="runs")
    parser.add_argument("--steps", type=int)
    options, others = parser.parse_known_args(argv)
    if others:
        raise ConfigError(
            f"--resume takes the stored configuration of {options.resume!r}, of which only --steps may be raised: "
            f"{' '.join(others)} cannot be given. Leave it out, or start a new run."
        )
    stored = get_run(options.store, options.resume).info.get("config", {})
    if not stored:
        raise ConfigError(
            f"Run {options.resume!r} has no configuration of `rlvr train`: only its own trainer can go on."
        )
    steps = options.steps or stored["steps"]
    if steps < stored["steps"]:
        raise ConfigError(f"--steps is {steps} but the run is to have {stored['steps']}: it may only be raised.")
    return TrainConfig.of_run(stored, run=options.resume, store=options.store, steps=steps)


def main(argv: list[str]) -> int:
    """Exit codes: 0 trained to the end, 1 the run failed, 2 wrong use, 128 + n stopped by signal n."""
    try:
        resumed = resumed_config(argv)
        config = resumed or parse_config(argv)
    except (ConfigError, MonitorError) as error:
        return _refuse(error)
    from rich.console import Console

    from trainer.runtime.ranks import join_ranks, leave_ranks

    ranks = join_ranks()
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=ranks.rank > 0)
    with console.status(f"Loading {config.model} and {config.task}"):
        from trainer.runtime.build import prepare
        from trainer.runtime.runs import open_run

        try:
            parts = prepare(config, ranks)
            run = open_run(config, parts, console, resume=resumed is not None)
        except (ValueError, MonitorError, OSError) as error:  # OSError: a hub id that cannot be loaded
            return _refuse(error)
    console.print(_what_starts(parts, run))
    status, code = _guarded_run(parts, run, console)
    if status != "failed":
        parts.policy.save(folder := _policy_folder(config, run.name))
        console.print(f"Run {run.name} {status}. Policy: {folder}  Look at it: rlvr dashboard {config.store}")
    run.recorder.close(status)
    leave_ranks()
    return code


def _guarded_run(parts: Parts, run: Run, console: Console) -> tuple[str, int]:
    """(status, exit code) of the training; only unforeseen errors propagate, recorded like the foreseen ones."""
    from trainer.errors import NonFiniteError
    from trainer.rewards.loading import RewardError
    from trainer.train import train

    recorder = run.recorder
    try:
        with _stops(parts.ranks) as check, _progress(console, parts.config.steps, recorder) as progress:
            train(parts, recorder, progress, first=run.first, after=(run.checkpoints.after, check))
        return "finished", 0
    except Interrupted as stop:
        console.print(
            f"{stop}: saving the policy, closing the run. "
            f"Go on with: rlvr train --resume {run.name} --store {parts.config.store}"
        )
        return "stopped", 128 + stop.number
    except (NonFiniteError, RewardError) as error:
        recorder.event("failed", str(error))
        console.print(f"Run {run.name} failed. {error} What was recorded stays: rlvr show {run.name}", style="red")
        return "failed", 1
    except Exception as error:
        recorder.event("failed", f"{type(error).__name__}: {error}")
        recorder.close("failed")
        raise


def _refuse(error: Exception) -> int:
    print(f"rlvr train: {error}", file=sys.stderr)
    return 2


def _policy_folder(config: TrainConfig, name: str) -> Path:
    return Path(config.save) if config.save else Path(config.store) / "policies" / name


def _what_starts(parts: Parts, run: Run) -> str:
    """What is about to run and how much it will write."""
    config, rollout = parts.config, parts.config.rollout
    n = rollout.prompts * rollout.group_size
    upper = n * rollout.max_new_tokens * TOKEN_BYTES / config.record.tokens_every + STEP_BYTES + n * SAMPLE_BYTES
    where = f" goes on at step {run.first}" if run.first > 1 else ""
    parameters = sum(p.numel() for p in parts.policy.model.parameters())
    return (
        f"Run {run.name}{where}: {config.weighting.kind} on {config.task}, {config.model} "
        f"({parameters / 1e6:.1f} M parameters, {parts.policy.device.type}), "
        f"{config.steps} steps of {rollout.prompts} x {rollout.group_size} rollouts. "
        f"Store {config.store}: at most about {upper / 1e3:.0f} kB a step, {upper * config.steps / 1e6:.0f} MB in all."
    )


@contextmanager
def _stops(ranks: Ranks) -> Iterator[Callable[[int], None]]:
    """Inside, SIGINT and SIGTERM raise Interrupted between two bytecodes; a second one kills as usual.

    With several ranks they raise at the end of the step, in the check that is yielded, on all of them: a rank that left
    alone would leave the others waiting.
    """
    met: list[int] = []

    def handler(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        met.append(number)
        if ranks.world == 1:
            raise Interrupted(number)

    def check(step: int) -> None:
        if ranks.any(bool(met)):
            raise Interrupted(met[0] if met else signal.SIGTERM)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
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
