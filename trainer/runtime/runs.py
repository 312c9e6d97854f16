"""Opening a run: a new one, or one that continues from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from monitor.alerts.actions import DEFAULT_ACTIONS, RECOMMENDED_ACTIONS, Action, GoBack
from monitor.alerts.engine import AlertEngine
from monitor.alerts.settings import AlertSettings, load_alerts
from monitor.errors import MonitorError
from monitor.recorder import Recorder, Sink
from monitor.records import Alert
from monitor.store.runs import get_run
from trainer.config import ConfigError, TrainConfig
from trainer.runtime import checkpoint
from trainer.runtime.action_state import ActionState
from trainer.runtime.actions import Actions, check_actions
from trainer.runtime.build import Parts, run_info
from trainer.runtime.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Run:
    """An open run: its name, where it is recorded, judged, acted on and checkpointed, and its first step."""

    name: str
    recorder: Recorder
    engine: AlertEngine
    actions: Actions
    checkpoints: checkpoint.Checkpoints
    first: int


def open_run(config: TrainConfig, parts: Parts, console: Console, *, resume: bool) -> Run:
    """Opens the store with alerts and, if asked for, wandb; a resumed run's parts take the checkpoint's state."""
    ranks = parts.ranks
    name = ranks.share(config.run or _free_name(config))
    folder = checkpoint.checkpoint_folder(config.store, name)
    settings = load_alerts(config.alerts) if config.alerts else AlertSettings()
    wanted = actions_of(config, settings)
    engine, acting = (
        AlertEngine(settings.rules, config.weighting.warmup_steps, total_steps=config.steps) for _ in range(2)
    )
    state = ActionState()
    done = checkpoint.resume(folder, parts, engine, state) if resume else 0
    if done:
        acting.load_state_dict(engine.state_dict())
    if done >= config.steps and get_run(config.store, name).status != "failed":  # a failed one may lack its policy
        raise ConfigError(f"Run {name!r} has reached its {done} steps. Raise --steps to go on.")
    attempt = ranks.share(_next_attempt(config.store, name, ranks) if resume and ranks.rank == 0 else None)
    if isinstance(attempt, str):
        raise ConfigError(attempt)
    sinks: list[Any] = []
    if config.wandb != "off":
        from monitor.integrations.wandb import WandbSink

        sink = WandbSink(mode=config.wandb, dir=config.store)  # on every rank, so that all fail without wandb
        sinks += [sink] if ranks.rank == 0 else []

    def open_recorder() -> Recorder:
        routed = [_alert_sink(config, settings)] if settings.routes and ranks.rank == 0 else []
        return Recorder(
            config.store,
            run_info(config, name, ranks.world),
            rank=ranks.rank,
            resume=resume,
            attempt=attempt,
            engine=engine if ranks.rank == 0 else None,
            sinks=[*sinks, *routed],
            on_alert=partial(_print_alert, console, set()),
            max_gb=config.record.max_gb,
            tokens_every=config.record.tokens_every,
            mirror=config.mirror,
            fsync=config.record.fsync,
            mantissa_bits=config.record.mantissa_bits,
        )

    recorder = _rank_0_first(ranks, open_recorder)
    checkpoints = checkpoint.Checkpoints(folder, parts, recorder, engine, config.checkpoint, state)
    if not done and any(isinstance(action, GoBack) for action in wanted):
        checkpoints.now(0)  # harm may come before the first regular checkpoint
    actions = Actions(wanted, state, acting, parts, recorder, checkpoints, partial(_print_action, console))
    return Run(name, recorder, engine, actions, checkpoints, done + 1)


def actions_of(config: TrainConfig, settings: AlertSettings) -> Sequence[Action]:
    """The actions of a run: those of its alerts file, or with `guard` the recommended ones. Raises ConfigError.

    Where checkpoint.every is 0, nothing saves a checkpoint: the default has no action then, and others are refused.
    """
    if config.guard and settings.actions is not DEFAULT_ACTIONS:
        raise ConfigError(
            f"guard is true, and {config.alerts!r} has [[actions]] of its own. Leave out --guard, or the sections."
        )
    if config.guard and not config.checkpoint.every:
        raise ConfigError(
            "guard is true, and checkpoint.every is 0: the guard goes back to a checkpoint, and none is ever saved. "
            "Set checkpoint.every to 1 or more, or leave out --guard."
        )
    actions = RECOMMENDED_ACTIONS if config.guard else settings.actions
    if actions is DEFAULT_ACTIONS and not config.checkpoint.every:
        return ()
    check_actions(actions, config)
    return actions


def _alert_sink(config: TrainConfig, settings: AlertSettings) -> Sink:
    """Imports apprise only where there is a route."""
    from monitor.alerts.delivery import AlertSink

    return AlertSink(config.store, settings.routes)


def _next_attempt(store: str, name: str, ranks: Ranks) -> int | str:
    """The attempt that all ranks open, whatever each of them has had; or why a rank that is no more prevents it."""
    state = get_run(store, name)
    left = [beat for beat in state.heartbeats if beat["rank"] >= ranks.world and beat.get("alive")]
    if left:
        return (
            f"Cannot resume run {name!r} with {ranks.world} processes: rank {left[0]['rank']}, process "
            f"{left[0].get('pid')}, is still writing it. Stop that process first."
        )
    return state.attempt + 1


def _rank_0_first(ranks: Ranks, open_recorder: Callable[[], Recorder]) -> Recorder:
    """Rank 0 opens its recorder first. If it cannot, no other rank starts. Raises MonitorError on all."""
    recorder, refused = None, None
    if ranks.rank == 0:
        try:
            recorder = open_recorder()
        except MonitorError as error:
            refused = error
    message = ranks.share(str(refused) if refused else None)
    if message:
        raise refused or MonitorError(message)
    return recorder or open_recorder()


def _free_name(config: TrainConfig) -> str:
    """<weighting>-s<seed>, with a number appended if the store already has that run."""
    base = f"{config.weighting.kind}-s{config.seed}"
    taken = {path.name for path in (Path(config.store) / "runs").glob(f"{base}*")}
    return next(name for i in count(1) if (name := base if i == 1 else f"{base}-{i}") not in taken)


def _print_action(console: Console, sentence: str) -> None:
    console.print(Text.assemble(("ACTION", "magenta"), f" {sentence}"))


def _print_alert(console: Console, fired: set[tuple[str, int]], alert: Alert) -> None:
    """Prints an alert when it fires, and when it ends after it fired. Pending alerts are only in the store."""
    if alert.state == "firing":
        fired.add((alert.rule, alert.first_step))
        colour = {"critical": "bold red", "warning": "yellow"}.get(alert.severity, "cyan")
        told = f" ({alert.severity}) at step {alert.step}: {alert.message}"
        console.print(Text.assemble((f"ALERT {alert.rule}", colour), told))
    elif alert.state == "resolved" and (alert.rule, alert.first_step) in fired:
        told = f" at step {alert.step}: {alert.message}"
        console.print(Text.assemble((f"RESOLVED {alert.rule}", "green"), told))
