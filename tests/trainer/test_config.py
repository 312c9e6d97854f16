"""Settings: precedence, limits, messages; --help without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.commands.train import check_told, main, parse_config
from trainer.config import ConfigError, TrainConfig
from trainer.config.weighting import Ict

ROOT = Path(__file__).parents[2]


def test_options_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('steps = 7\n[optim]\nlr = 0.5\n[weighting]\nkind = "random"\n')
    config = parse_config([str(file), "--optim.lr", "0.25", "--weighting.warmup_steps", "3"])
    assert (config.steps, config.optim.lr, config.weighting.kind) == (7, 0.25, "random")
    assert config.weighting.warmup_steps == 3 and config.rollout == TrainConfig().rollout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": {"kind": "itc"}}, "Unknown weighting 'itc'. Did you mean 'ict'? Known: uniform, ict,"),
        ({"weighting": {"keep": 0.0}}, "weighting.keep is 0.0, expected a share in (0, 1]"),
        ({"weighting": {"keep": 1.2}}, "weighting.keep is 1.2, expected a share in (0, 1]"),
        ({"rollout": {"group_size": 1}}, "rollout.group_size is 1: the advantage compares the rollouts of one prompt"),
        ({"optim": {"mini_batches": 20}}, "optim.mini_batches is 20 but a step has 16 groups"),
        ({"eval": {"k": 32}}, "eval.k is 32 but eval.samples is 16"),
        ({"optim": {"lr": -1}}, "lr is -1: input should be greater than 0."),
        ({"optim": {"lrr": 1}}, "Unknown setting 'lrr'. Did you mean 'lr'?"),
        (
            {"loss": {"clip_delta": 1.1}},
            "loss.clip_delta is 1.1 with loss.kind grpo and clip_high 0.2: expected more than",
        ),
        ({"loss": {"clip_delta": 4.0, "kind": "cispo"}}, "a kind other than cispo"),
        ({"loss": {"kl_coef": 0.1, "kl_estimator": "k1"}}, "loss.kl_estimator k1 has a mean gradient of 0"),
        (
            {"loss": {"kl_coef": 0.1, "kl_reference": "old"}},
            "each step has one update, and it starts from the policy that sampled",
        ),
        (
            {"loss": {"entropy_target": 0.3, "entropy_coef": -0.1}},
            "loss.entropy_coef is -0.1, but the entropy control starts there",
        ),
        (
            {"loss": {"entropy_target": 0.3, "entropy_actuator": "temperature"}, "rollout": {"temperature": 2.0}},
            "rollout.temperature is 2.0, but the entropy control starts there: expected loss.temperature_min",
        ),
        (
            {"loss": {"entropy_target": 0.3, "entropy_actuator": "budget"}},
            "loss.entropy_actuator is 'budget', but weighting.kind is 'ict', which has no budget. Set "
            "weighting.kind to entropy_budget or ict_budget or ict_soft_budget or random_budget,",
        ),
        (
            {
                "loss": {"entropy_target": 0.3, "entropy_actuator": "budget", "budget_min": 0.5},
                "weighting": {"kind": "ict_budget"},
            },
            "weighting.share is 0.3, but the entropy control starts there: expected loss.budget_min to",
        ),
        ({"record": {"fsync": "always"}}, "fsync is 'always': input should be 'every-step', 'interval' or 'none'."),
        ({"stepps": 1}, "Unknown setting 'stepps'. Did you mean 'steps'?"),
    ],
)
def test_wrong_settings_are_explained(settings, message):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**settings)
    assert message in str(error.value)


def test_wrong_options_end_with_code_2_and_no_traceback(capsys):
    assert main(["--weighting.kind", "itc"]) == 2
    assert "Did you mean 'ict'?" in capsys.readouterr().err
    assert main(["--weighting.kind", "uniform", "--weighting.keep=0.3"]) == 2
    assert "weighting.keep is 0.3, but weighting.kind is 'uniform', which does not use it" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main(["--stepps", "3"])
    assert error.value.code == 2 and "--steps" in capsys.readouterr().err


def test_options_and_help_are_those_of_the_chosen_weighting(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text("[weighting]\nkeep = 0.3\nwarmup_steps = 5\n")
    assert parse_config([str(file), "--weighting.kind", "random"]).weighting.parameters == {"keep": 0.3}
    assert parse_config([str(file), "--weighting.kind", "uniform"]).weighting.parameters == {}
    assert parse_config(["--weighting.kind=rsi", "--weighting.low", "-2", "--weighting.high=.9"]).weighting.low == -2
    with pytest.raises(SystemExit):
        main(["--weighting.kind", "stare", "--help"])
    told = capsys.readouterr().out
    assert "--weighting.boost" in told and "--weighting.keep" not in told
    assert "- clip_cov: low=1.0, high=5.0, share=0.0002" in told  # every kind with its parameters


def test_a_bad_file_ends_with_code_2(tmp_path, capsys):
    assert main([str(tmp_path / "missing.toml")]) == 2
    assert "Cannot read the configuration" in capsys.readouterr().err
    (tmp_path / "bad.toml").write_text("steps = = 3")
    assert main([str(tmp_path / "bad.toml")]) == 2
    assert "is not valid TOML" in capsys.readouterr().err
    (tmp_path / "bad.toml").write_text("weighting = 3")
    assert main([str(tmp_path / "bad.toml")]) == 2
    assert "weighting is 3, expected a table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("weighting = 3", "weighting is 3, expected a table of settings: [weighting], and below it kind = ..."),
        ("optim = 3", "optim is 3, expected a table of settings: [optim], and below it lr = ..."),
        ('lora = "16"', "lora is '16', expected a table of settings: [lora], and below it rank = ..."),
        ("[steps]\nn = 3", "steps is {'n': 3}, expected one value: steps = ... above the first [table]."),
        ("[save]", "save is {}, expected one value: save = ... above the first [table]."),
    ],
)
def test_a_group_that_is_no_table_and_a_value_that_is_one_are_refused(tmp_path, line, message):
    """`optim = 3` was left out in silence and `weighting = 3` ended in a traceback."""
    (tmp_path / "bad.toml").write_text(line)
    with pytest.raises(ConfigError, match=re.escape(f"bad.toml: {message}")):
        parse_config([str(tmp_path / "bad.toml")])


def test_help_documents_every_setting_and_loads_no_torch():
    code = (
        "import sys\nfrom trainer.commands.train import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, field in TrainConfig.model_fields.items():
        inner = getattr(Ict if name == "weighting" else field.annotation, "model_fields", {})
        for option, spec in inner.items() or {"": field}.items():
            flag = f"--{name}.{option}".rstrip(".").replace("_", "-")
            assert flag in done.stdout, flag
            assert spec.description or option == "kind", flag


@pytest.mark.parametrize(
    "path", sorted((ROOT / "sample_runs" / "runs").glob("[!_]*/run.json")), ids=lambda p: p.parent.name
)
def test_runs_of_earlier_versions_give_their_configuration(path):
    stored = json.loads(path.read_text())["config"]
    config = TrainConfig.of_run(stored, steps=1000)
    assert (config.weighting.kind, config.optim.lr, config.steps) == (
        stored["weighting"]["kind"], stored["optim"]["lr"], 1000
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--model ./mine", "optim.lr 0.0001 and rollout.max_new_tokens 56 are"),
        ("--model ./mine --optim.lr 1e-6", "but rollout.max_new_tokens 56 is"),
        ("--model ./mine --rollout.max_new_tokens=9", "but optim.lr 0.0001 is"),
    ],
)
def test_a_model_of_one_s_own_with_the_small_policy_s_defaults_is_refused(capsys, options: str, names: str) -> None:
    assert main(options.split()) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"model is './mine', but {names.removeprefix('but ')} meant for the small built-in policy." in said
    assert "`rlvr train paper-gsm8k --model ./mine`" in said


def test_settings_of_a_file_or_a_preset_are_told(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[optim]\nlr = 1e-6\n[rollout]\nmax_new_tokens = 64\n")
    for argv in (["paper-gsm8k", "--model", "./mine"], [str(file), "--model", "./mine"], ["--model", "builtin-small"]):
        check_told(argv, parse_config(argv))
    with pytest.raises(ConfigError, match="max_new_tokens 56 is meant"):
        file.write_text("[optim]\nlr = 1e-6\n")
        check_told([str(file), "--model", "./mine"], parse_config([str(file), "--model", "./mine"]))
