"""`rlvr train`: parse and check, then train, record, and save; Ctrl-C and SIGTERM end it cleanly."""

from __future__ import annotations

import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from pydantic import create_model

from monitor.alerts.settings import load_alerts
from monitor.commands.parsing import parse_known
from monitor.errors import MonitorError, nearest
from monitor.store.runs import get_run
from trainer.config import ConfigError, SettingsGroup, TrainConfig, changed_weighting, make_weighting, weightings_help
from trainer.policy.sources import BUILTIN

if TYPE_CHECKING:
    from rich.console import Console

    from monitor.recorder import Recorder
    from monitor.records import StepRecord
    from trainer.runtime.build import Parts
    from trainer.runtime.runs import Run

PRESETS = Path(__file__).parents[1] / "presets"
STOPPED_BY_ALERT = 3  # exit code
VERDICT_STYLES = {"too early": "dim", "healthy": "green", "info": "cyan", "warning": "yellow", "critical": "bold red"}
TOKEN_BYTES, SAMPLE_BYTES, STEP_BYTES = 20, 150, 15_000  # on disk, measured by benchmarks/bench_recorder.py

HELP = f"""Train a policy with group-relative policy optimisation, recording every token.

rlvr train [CONFIG.toml or preset] [--dotted.options]: the defaults, then the file, then the options. Presets: demo,
paths, smollm2-chain-sum, paper-gsm8k, paper-math.

rlvr train --resume RUN [--store STORE] [--steps N]: go on from the run's newest checkpoint, as if it had never
stopped; only --steps may be raised.

Weightings (--weighting.kind) and their own parameters (--weighting.NAME); below are those of the chosen kind:
{weightings_help()}"""


SMALL_POLICY = {  # settings whose defaults fit the built-in policy alone -> what others usually take
    ("optim", "lr"): "A language model usually takes --optim.lr 1e-6, with adapters 1e-5.",
    ("rollout", "max_new_tokens"): "Its responses need as many tokens as its answers have, e.g. "
    "--rollout.max-new-tokens 512.",
}  # fmt: skip


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


def check_told(argv: Sequence[str], config: TrainConfig) -> None:
    """Raises ConfigError for a model of one's own with a setting of SMALL_POLICY that nobody gave.

    It would learn little or lose what it knows, which shows only after hours. A slip in a built-in's name is left to
    the loading, which knows better what to say.
    """
    if nearest(config.model, BUILTIN):
        return
    settings = _read_toml(_config_path(argv[0])) if argv and not argv[0].startswith("-") else {}
    flags = [text.partition("=")[0].replace("_", "-") for text in argv]
    silent = [
        (group, name)
        for group, name in SMALL_POLICY
        if name not in settings.get(group, {}) and f"--{group}.{name.replace('_', '-')}" not in flags
    ]
    if silent:
        names = " and ".join(f"{group}.{name} {getattr(getattr(config, group), name):g}" for group, name in silent)
        raise ConfigError(
            f"model is {config.model!r}, but {names} {'are' if len(silent) > 1 else 'is'} meant for the small built-in "
            f"policy. {' '.join(SMALL_POLICY[which] for which in silent)} Set what fits, or begin with a preset: "
            f"`rlvr train paper-gsm8k --model {config.model}`."
        )


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
    """The file that CONFIG means: the name of a preset, whatever lies here under that name, or a path."""
    known = {path.stem: path for path in sorted(PRESETS.glob("*.toml"))}
    if text in known:
        return known[text]
    if text.endswith(".toml") or Path(text).exists():
        return Path(text)
    raise ConfigError(
        f"No preset {text!r}.{nearest(text, known)} Known presets: {', '.join(known)}. A configuration of your own "
        "is a file that ends in .toml."
    )


def _read_toml(path: Path) -> dict[str, Any]:
    """A file's settings; groups are tables, others are not. Raises ConfigError."""
    try:
        settings = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}. Expected a TOML file.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None
    for name, value in settings.items():
        if name in TrainConfig.model_fields:  # others are refused with the options
            _check_shape(path, name, value)
    return settings


def _check_shape(path: Path, name: str, value: Any) -> None:
    """Raises ConfigError for a group that is no table, and for a single setting that is one."""
    group = TrainConfig.model_fields[name].default
    if isinstance(group, SettingsGroup) == isinstance(value, dict):
        return
    first = next(iter(type(group).model_fields)) if isinstance(group, SettingsGroup) else ""
    table, single = f"a table of settings: [{name}], and below it {first} = ...", f"one value: {name} = ... above the"
    raise ConfigError(f"{path}: {name} is {value!r}, expected {table if first else f'{single} first [table].'}")


@dataclass(frozen=True)
class Resume:
    """Continue a run from its newest checkpoint."""

    resume: str  # name of the run
    store: str = "runs"  # folder of the store
    steps: int | None = None  # training steps in all; may only be raised


def resumed_config(argv: list[str]) -> TrainConfig | None:
    """The stored configuration of `--resume RUN [--store STORE] [--steps N]`; None without --resume."""
    if not any(text == "--resume" or text.startswith("--resume=") for text in argv):
        return None
    options, others = parse_known(Resume, argv, "train")
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
    try:
        config = TrainConfig.of_run(stored, run=options.resume, store=options.store)
    except ConfigError as error:
        raise ConfigError(f"The configuration that run {options.resume!r} has stored cannot be used: {error}") from None
    steps = options.steps or config.steps
    if steps < config.steps:
        raise ConfigError(f"--steps is {steps} but the run is to have {config.steps}: it may only be raised.")
    return TrainConfig.of_run(stored, run=options.resume, store=options.store, steps=steps)


def main(argv: list[str]) -> int:
    """Exit codes: 0 trained to the end, 1 the run failed, 2 wrong use, 3 an action stopped it, 128 + n signal n did."""
    try:
        resumed = resumed_config(argv)
        config = resumed or parse_config(argv)
        if resumed is None:
            check_told(argv, config)
    except (ConfigError, MonitorError) as error:
        return _refuse(error)
    from rich.console import Console
    from rich.text import Text

    from trainer.runtime.ranks import join_ranks, leave_ranks

    ranks = join_ranks()
    quiet = ranks.rank > 0
    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=quiet)
    with console.status(Text(f"Loading {config.model} and {config.task}")):
        from trainer.runtime.build import prepare
        from trainer.runtime.runs import open_run

        try:
            _check_save(config)
            _check_alerts(config, ranks.rank)
            parts = prepare(config, ranks)
            run = open_run(config, parts, console, resume=resumed is not None)
        except (ValueError, MonitorError, OSError) as error:  # OSError: a hub id that cannot be loaded
            return _refuse(error)
    console.print(_what_starts(parts, run))
    if config.rollout.backend == "auto":
        console.print(_what_auto_means(parts))
    status, code = _guarded_run(parts, run, console)
    if status != "failed" or parts.ranks.world == 1:  # ranks that failed do not meet any more
        run.checkpoints.finish()
    if status != "failed" and not _saved(parts, run, console, status):
        status, code = "failed", 1
    run.recorder.close(status)
    verdict = run.engine.verdict()
    console.print(verdict.sentence, style=VERDICT_STYLES[verdict.health])
    if run.recorder.lost_steps:
        lost = f"{run.recorder.lost_steps} steps could not be written to the store {config.store} and are lost"
        console.print(f"Run {run.name} failed: {lost}. `rlvr store check` lists them.", style="red")
        code = code or 1
    if status == "stopped":
        parts.ranks.any(False)  # torchrun ends the others as soon as one leaves with a code: all must be done
    leave_ranks(parts.ranks)
    return code


def _saved(parts: Parts, run: Run, console: Console, status: str) -> bool:
    """Saves the policy; says where, or why not."""
    from trainer.runtime.disk import attempt

    folder, store = _policy_folder(parts.config, run.name), parts.config.store
    error = attempt(lambda: parts.policy.save(folder))
    if not parts.ranks.any(error is not None):
        console.print(f"Run {run.name} {status}. Policy: {folder}  Look at it: rlvr dashboard {store}")
        return True
    message = f"The policy cannot be written to {folder}: {error}. What was there before is as it was."
    run.recorder.event("failed", message)
    again = f"Make room, then: rlvr train --resume {run.name} --store {store}"
    console.print(f"Run {run.name} failed. {message} {again}", style="red")
    return False


def _guarded_run(parts: Parts, run: Run, console: Console) -> tuple[str, int]:
    """(status, exit code) of the training; only unforeseen errors propagate, recorded like the foreseen ones."""
    from trainer.errors import NonFiniteError, RewardError
    from trainer.runtime.actions import StoppedByAlert
    from trainer.runtime.stops import Interrupted, Stops
    from trainer.train import train

    recorder, stops = run.recorder, Stops(parts.ranks)
    try:
        with stops.installed(), _progress(console, parts.config, recorder) as progress:
            after = (run.actions.after, run.checkpoints.after)  # a checkpoint holds what the actions of its step did
            train(parts, recorder, progress, first=run.first, after=after, stops=stops)
        return "finished", 0
    except Interrupted as stop:
        console.print(
            f"{stop}: saving the policy, closing the run. "
            f"Go on with: rlvr train --resume {run.name} --store {parts.config.store}"
        )
        return "stopped", 128 + stop.number
    except StoppedByAlert as stop:
        console.print(f"{stop} Go on with: rlvr train --resume {run.name} --store {parts.config.store}", style="yellow")
        return "stopped", STOPPED_BY_ALERT
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


def _check_save(config: TrainConfig) -> None:
    """Raises ConfigError, before the hours of training, for a folder that cannot be made or written to."""
    if config.save:
        try:
            Path(config.save).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=config.save):
                pass
        except OSError as error:
            raise ConfigError(
                f"save is {config.save!r}, where nothing can be written: {error.strerror}. Expected a folder for the "
                "final policy that can be made or written to; none: STORE/policies/RUN."
            ) from None


def _check_alerts(config: TrainConfig, rank: int) -> None:
    """Raises MonitorError for an alerts file, or an address that it names, that cannot be used; rank 0 delivers."""
    if config.alerts:
        routes = load_alerts(config.alerts).routes
        for route in routes if rank == 0 else ():
            route.address()


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


def _what_auto_means(parts: Parts) -> str:
    from trainer.rollout.sampling import auto_backend

    rollout = parts.config.rollout
    rows = rollout.prompts * rollout.group_size // parts.ranks.world
    backend, why = auto_backend(parts.policy, rows, rollout.max_new_tokens)
    return f"rollout.backend auto is {backend}: {why}."


@contextmanager
def _progress(console: Console, config: TrainConfig, recorder: Recorder) -> Iterator[Callable[[StepRecord], None]]:
    """A progress bar with rate, time left, reward and entropy; a line every tenth of the run without a terminal.

    What speaks against the run, by its first rollouts, is said once (`rlvr preflight` says it before).
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from trainer.preflight import FirstRollouts

    judge, steps = FirstRollouts(config), config.steps
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
            if told := judge(record):
                recorder.event("preflight", told, record.step)
                console.print(told, style="yellow")

        yield show
