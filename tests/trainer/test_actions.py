"""Actions on alerts: what is wanted and refused, and what real runs then do, record, save and resume."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from monitor.alerts import actions as wanted
from monitor.alerts.engine import AlertEngine
from monitor.alerts.settings import AlertsError, AlertSettings, load_alerts
from monitor.recorder import Recorder
from monitor.records import Alert, StepRecord
from monitor.store.reader import open_store
from monitor.store.runs import get_run
from trainer.commands.train import STOPPED_BY_ALERT, main, parse_config
from trainer.compare.jobs import stopped_by_alert
from trainer.config import ConfigError
from trainer.learning.schedule import learning_rate
from trainer.runtime.action_state import ActionState, Change
from trainer.runtime.actions import Actions, StoppedByAlert, changed_settings, check_actions, with_settings
from trainer.runtime.build import prepare
from trainer.runtime.checkpoint import Checkpoints, checkpoints_of, resume
from trainer.runtime.runs import actions_of, open_run
from trainer.train import train

SMALL = (
    "--threads 1 --rollout.prompts 2 --rollout.group-size 4 --eval.every 0 --steps 6 --weighting.kind uniform "
    "--weighting.warmup-steps 0 --checkpoint.every 2"
).split()
FIRING = Alert("entropy_collapse", "warning", "firing", 4, 4, 0.1, 0.5, 0.2, "Entropy is low.", "Lower the rate.")
RESOLVED = replace(FIRING, state="resolved", step=6)


def told(store, kind: str = "action") -> list[tuple[int, str]]:
    with open_store(store) as opened:
        return [
            tuple(row)
            for row in opened.sql(f"SELECT step, message FROM events WHERE kind = '{kind}' ORDER BY step, ts").rows
        ]


def series(store, run: str, name: str) -> dict[int, float]:
    with open_store(store) as opened:
        return dict(opened.sql(f"SELECT step, value FROM steps WHERE run = '{run}' AND name = '{name}'").rows)


@pytest.fixture
def acting(tmp_path):
    """Actions of a list, on the parts of a small run that is at step 4."""
    recorders = []

    def make(*actions: wanted.Action, options: str = "", state: ActionState | None = None) -> Actions:
        parts = prepare(parse_config([*SMALL, *options.split()]))
        state = state or ActionState()
        recorder = Recorder(tmp_path / "store", f"r{len(recorders)}")
        recorders.append(recorder)
        checkpoints = Checkpoints(tmp_path / "c", parts, recorder, AlertEngine(), parts.config.checkpoint, state)
        return Actions(actions, state, AlertEngine(), parts, recorder, checkpoints)

    yield make
    for recorder in recorders:
        recorder.close()


def test_an_intervention_changes_what_the_updater_uses_and_is_taken_back_when_the_alert_ends(acting, tmp_path):
    """lr 3e-4 / 3 = 1e-4; temperature 1 * 1.2 = 1.2."""
    actions = acting(
        wanted.LowerLr(until="resolved"), wanted.RaiseTemperature(), options="--optim.lr 3e-4 --rollout.temperature 1"
    )
    updater = actions.parts.updater
    actions.take([FIRING])
    assert learning_rate(updater.config, 1) == pytest.approx(1e-4)
    assert updater.control.temperature == pytest.approx(1.2)
    actions.take([RESOLVED])
    assert updater.optimizer.param_groups[0]["lr"] == updater.config.optim.lr == 3e-4
    assert updater.control.temperature == pytest.approx(1.2), "until end"
    actions.recorder.close()
    assert told(tmp_path / "store") == [
        (4, "lower_lr for entropy_collapse (warning): optim.lr 0.0003 -> 0.0001 until it ends."),
        (4, "raise_temperature for entropy_collapse (warning): rollout.temperature 1 -> 1.2."),
    ]
    assert told(tmp_path / "store", "action_undone") == [
        (6, "lower_lr ended with entropy_collapse: optim.lr 0.0001 -> 0.0003.")
    ]


def test_only_the_change_that_was_to_be_taken_back_is(acting):
    """lr 1e-4 / 2 / 5: the second stays, and holds the value that it was given, 1e-5."""
    actions = acting(wanted.LowerLr(factor=2, until="resolved"), wanted.LowerLr(factor=5))
    actions.take([FIRING])
    actions.take([RESOLVED])
    assert [change.temporary for change in actions.state.changes] == [False]
    assert actions.parts.updater.config.optim.lr == pytest.approx(1e-5)


def test_an_action_acts_on_the_alerts_that_it_wants_and_no_more_often_than_said(acting):
    actions = acting(wanted.LowerLr(rules=("entropy_*",), severities=("critical",), times=2, factor=10))
    updater = actions.parts.updater
    before = updater.config.optim.lr
    critical = replace(FIRING, severity="critical")
    for alert in (FIRING, replace(critical, rule="reward_lost"), replace(critical, state="pending")):
        actions.take([alert])
    assert updater.config.optim.lr == before, "a warning, another rule, pending"
    for _ in range(3):
        actions.take([critical])
    assert updater.config.optim.lr == pytest.approx(before / 100), "two of three"


def test_what_each_intervention_sets():
    config = parse_config([*SMALL, "--optim.epochs", "2", "--rollout.temperature", "1.4"])
    for action, baseline, expected in (
        (wanted.LowerLr(factor=4), 0.5, {"optim.lr": 2.5e-5}),
        (wanted.RaiseTemperature(factor=1.2, most=1.5), 0.5, {"rollout.temperature": 1.5}),  # 1.68, but 1.5 at most
        (wanted.ClipHigher(), 0.5, {"loss.clip_high": 0.28}),
        (wanted.HoldEntropy(share=0.7), 0.5, {"loss.entropy_target": 0.35, "loss.entropy_coef": 0.0}),
    ):
        found = changed_settings(action, config, baseline)
        assert found == pytest.approx(expected), action.do
    switched = with_settings(config, changed_settings(wanted.SwitchWeighting(weighting="ict:keep=0.3"), config, 0.5))
    assert (switched.weighting.kind, switched.weighting.parameters, switched.weighting.warmup_steps) == (
        "ict", {"keep": 0.3}, 0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("action", "options", "message"),
    [
        (wanted.ClipHigher(), "", "actions 1, clip_higher: each step has one update, in which no ratio is clipped"),
        (wanted.ClipHigher(), "--optim.epochs 2 --loss.clip-high 0.3", "clip_high is 0.28, but loss.clip_high is 0.3"),
        (wanted.HoldEntropy(), "--loss.entropy-target 0.2", "loss.entropy_target is set"),
        (wanted.RaiseTemperature(), "--rollout.temperature 1.5", "the temperature is 1.5, and most is 1.5"),
        (
            wanted.RaiseTemperature(),
            "--loss.entropy-target 0.2 --loss.entropy-actuator temperature",
            "the entropy control sets the temperature",
        ),
        (wanted.SwitchWeighting(weighting="itc"), "", "unknown weighting 'itc'. Did you mean 'ict'?"),
        (wanted.SwitchWeighting(weighting="ict:keep=2"), "", "weighting.keep is 2.0, expected a share"),
        (wanted.SwitchWeighting(weighting="kl_cov"), "", "acts only once the policy differs"),
        (wanted.GoBack(), "--checkpoint.every 0", "go_back: checkpoint.every is 0, so no checkpoint is there to"),
        (wanted.Checkpoint(), "--checkpoint.every 0", "checkpoint: checkpoint.every is 0, so no checkpoint is ever"),
    ],
)  # fmt: skip
def test_an_action_that_cannot_work_is_refused_before_work_starts(action, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_actions([action], parse_config([*SMALL, *options.split()]))


def test_without_checkpoints_the_default_does_nothing_and_what_was_asked_for_is_refused(tmp_path):
    """Nobody asked for the default. A section of the file, or --guard, must not vanish."""
    alerts = tmp_path / "a.toml"
    never = parse_config([*SMALL, "--checkpoint.every", "0"])
    assert actions_of(never, AlertSettings()) == ()
    assert actions_of(parse_config(SMALL), AlertSettings()) == wanted.DEFAULT_ACTIONS
    alerts.write_text('[[actions]]\ndo = "stop"\n\n[[actions]]\ndo = "checkpoint"\n')
    with pytest.raises(ConfigError, match=r"^actions 2, checkpoint: checkpoint.every is 0, .* leave the action out.$"):
        actions_of(never, load_alerts(alerts))
    with pytest.raises(ConfigError, match=r"^guard is true, and checkpoint.every is 0: .* leave out --guard.$"):
        actions_of(parse_config([*SMALL, "--checkpoint.every", "0", "--guard"]), AlertSettings())


def test_going_back_takes_the_policy_of_the_last_checkpoint_before_anything_was_amiss(acting, tmp_path):
    """Steps 2 and 4 are saved quietly, 6 and 8 while an alert is pending: 4 is kept, and it comes back."""
    actions = acting(wanted.GoBack(), wanted.LowerLr())
    parts, folder = actions.parts, actions.checkpoints.folder
    weight = next(iter(parts.policy.trained().values()))
    for step in (2, 4, 6, 8):
        with torch.no_grad():
            weight.fill_(step / 10)
        if step == 6:
            actions.take([replace(FIRING, state="pending", step=5, first_step=5)])
        actions.recorder.record(StepRecord(step, {"reward": 0.5}))
        actions.checkpoints.after(StepRecord(step, {}))
    assert [int(path.name[5:]) for path in checkpoints_of(folder)] == [4, 6, 8]
    cursor = parts.stream.state_dict()
    actions.take([replace(FIRING, step=8, first_step=5)])
    assert torch.all(weight == 0.4) and parts.stream.state_dict() == cursor
    assert learning_rate(parts.updater.config, 1) == pytest.approx(1e-4 / 3), "the change outlives the return"
    again = prepare(parse_config(SMALL))
    state = ActionState()
    actions.checkpoints.now(8)
    assert resume(folder, again, AlertEngine(), state) == 8
    assert state == actions.state and state.changes == [
        Change("entropy_collapse", 5, "lower_lr", {"optim.lr": pytest.approx(1e-4 / 3)})
    ]
    resumed = Actions(actions.actions, state, AlertEngine(), again, actions.recorder, actions.checkpoints)
    assert resumed.parts.updater.config.optim.lr == pytest.approx(1e-4 / 3)


def test_a_run_that_may_go_back_saves_the_policy_of_its_start(tmp_path):
    """Harm may come before the first regular checkpoint: the policy is then that of the start, its optimizer fresh."""
    alerts = tmp_path / "a.toml"
    alerts.write_text('[[actions]]\ndo = "go_back"\n')
    options = [*SMALL, "--alerts", str(alerts), "--store", str(tmp_path / "s"), "--run", "r"]
    config = parse_config([*options, "--optim.lr", "3e-3", "--checkpoint.every", "6"])
    parts = prepare(config)
    before = {name: p.detach().clone() for name, p in parts.policy.trained().items()}
    run = open_run(config, parts, Console(quiet=True), resume=False)
    assert not parts.updater.optimizer.state, "saving makes no step"
    train(parts, run.recorder, first=1, after=(run.actions.after, run.checkpoints.after))
    assert any(not torch.equal(p, before[name]) for name, p in parts.policy.trained().items())
    run.actions.state.good = 0
    run.checkpoints.restore_policy(0)
    run.recorder.close()
    assert all(torch.equal(p, before[name]) for name, p in parts.policy.trained().items())
    assert not parts.updater.optimizer.state


def test_how_to_record_reaches_the_recorder_and_run_json(tmp_path):
    options = ["--record.fsync", "interval", "--record.mantissa_bits", "9"]
    config = parse_config([*SMALL, "--store", str(tmp_path), "--run", "r", *options])
    open_run(config, prepare(config), Console(quiet=True), resume=False).recorder.close()
    info = json.loads((tmp_path / "runs" / "r" / "run.json").read_text())
    assert info["attempts"][0]["fsync"] == info["config"]["record"]["fsync"] == "interval"
    assert info["attempts"][0]["mantissa_bits"] == info["config"]["record"]["mantissa_bits"] == 9


def test_what_cannot_be_done_is_an_event_and_training_goes_on(acting, tmp_path):
    actions = acting(wanted.GoBack(), wanted.HoldEntropy())
    actions.take([FIRING])
    assert actions.state.taken == {} and actions.state.changes == []
    actions.recorder.close()
    first, second = told(tmp_path / "store", "action_error")
    assert first[1].startswith("go_back for entropy_collapse was not possible: no checkpoint from before it")
    assert second[1].startswith("hold_entropy for entropy_collapse was not possible: the baseline entropy is not known")


def test_a_rule_that_fails_does_not_take_training_down(acting, tmp_path):
    actions = acting(wanted.Checkpoint())
    actions.engine.observe = lambda step, scalars: 1 / 0  # type: ignore[method-assign,return-value,assignment]
    actions.after(StepRecord(3, {"entropy": 0.5}))
    actions.recorder.close()
    assert told(tmp_path / "store", "action_error")[0][1].startswith("judging was not possible: division by zero")


def test_stop_saves_a_checkpoint_first(acting):
    actions = acting(wanted.Stop(), wanted.Checkpoint())
    actions.recorder.record(StepRecord(4, {"reward": 0.5}))
    with pytest.raises(StoppedByAlert, match=r"Step 4: stop for entropy_collapse \(warning\): Entropy is low."):
        actions.take([FIRING])
    assert [path.name for path in checkpoints_of(actions.checkpoints.folder)] == ["step-00000004"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[actions]]\ndo = "lower_rl"', "actions 1: do is 'lower_rl'. Did you mean 'lower_lr'? Expected one of"),
        ("[[actions]]\nfactor = 3", "actions 1: do is None."),
        ('[[actions]]\ndo = "lower_lr"\nfactor = 0.5', "actions 1: factor is 0.5: input should be greater than 1."),
        ('[[actions]]\ndo = "stop"\nuntil = "end"', "actions 1: unknown setting 'until'."),
        ('[[actions]]\ndo = "stop"\nrules = ["entropy_colapse"]', "no rule is called 'entropy_colapse'. Did you mean"),
        ('actions = 3', "actions must be sections, each under its own [[actions]]."),
    ],
)  # fmt: skip
def test_an_alerts_file_with_wrong_actions_is_refused(tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(AlertsError, match=re.escape(message)):
        load_alerts(tmp_path / "a.toml")


def test_a_real_run_lowers_its_rate_stops_and_resumes_with_the_lower_rate(tmp_path, capsys):
    """The rate of 3e-3 ruins the small policy in a few steps. Up to the alert the run is what it is without actions."""
    alerts, store = tmp_path / "alerts.toml", tmp_path / "store"
    alerts.write_text('[[actions]]\ndo = "lower_lr"\nfactor = 10\n\n[[actions]]\ndo = "stop"\n')
    options = (
        "--model builtin-small --threads 1 --rollout.prompts 4 --rollout.group-size 8 --eval.every 0 --steps 12 "
        f"--weighting.kind uniform --weighting.warmup-steps 0 --optim.lr 3e-3 --store {store}"
    ).split()
    assert main([*options, "--run", "acts", "--alerts", str(alerts)]) == STOPPED_BY_ALERT
    assert get_run(store, "acts").status == "stopped"
    (step, lowered), (_, stopped) = told(store)
    assert step < 12 and lowered.startswith("lower_lr for ") and stopped.startswith("stop for ")
    assert f"ACTION Step {step}: {lowered}" in capsys.readouterr().err
    assert stopped_by_alert(store, "acts") == step
    assert main(["--resume", "acts", "--store", str(store)]) == 0
    assert stopped_by_alert(store, "acts") is None
    assert main([*options, "--run", "plain", "--checkpoint.every", "0"]) == 0
    rates, acts, plain = (
        series(store, "acts", "lr"),
        series(store, "acts", "entropy"),
        series(store, "plain", "entropy"),
    )
    assert [rates[step], rates[step + 1], rates[12]] == pytest.approx([3e-3, 3e-4, 3e-4])
    assert [acts[i] for i in range(1, step + 1)] == [plain[i] for i in range(1, step + 1)] and acts[12] != plain[12]
