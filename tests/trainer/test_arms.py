"""The grammar of arms, and what an arm does to a configuration."""

from __future__ import annotations

import pytest

from trainer.compare.arms import Arm, arm_config, both_normalisations, parse_arm, parse_arms
from trainer.config import ConfigError, TrainConfig


def test_an_arm_is_a_weighting_with_settings():
    arm = parse_arm("ict:keep=0.3,lr=3e-4,loss.kl_coef=0.01")
    assert arm == Arm(
        "ict:keep=0.3,lr=3e-4,loss.kl_coef=0.01",
        "ict",
        (("weighting.keep", "0.3"), ("optim.lr", "3e-4"), ("loss.kl_coef", "0.01")),
    )
    assert arm.slug == "ict-keep0.3-lr3e-4-loss.kl_coef0.01"
    assert parse_arm("ict:normalise=all").slug == "ict-normalise-all"
    assert arm.options()[:4] == ["--weighting.kind", "ict", "--weighting.keep", "0.3"]
    config = arm_config(TrainConfig(steps=7), arm, seed=4)
    assert (config.steps, config.seed, config.weighting.keep, config.optim.lr, config.loss.kl_coef) == (
        7, 4, 0.3, 3e-4, 0.01
    )  # fmt: skip


def test_a_setting_can_go_back_to_the_default_of_the_kind():
    base = TrainConfig(weighting={"keep": 0.3})
    assert arm_config(base, parse_arm("ict_frequent")).weighting.parameters["keep"] == 0.3
    assert arm_config(base, parse_arm("ict_frequent:keep=none")).weighting.parameters["keep"] == 0.9


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["uniform", "itc"], r"Arm 'itc': unknown weighting 'itc'\. Did you mean 'ict'\?"),
        (["uniform", "ict:kep=0.3"], r"unknown key 'kep'\. Did you mean 'keep'\?"),
        (["uniform", "ict:loss.kl_coeff=1"], r"Did you mean 'loss.kl_coef'\?"),
        (["uniform", "ict:keep"], r"'keep' is not key=value\. Expected WEIGHTING or WEIGHTING:key=value"),
        (["uniform", "ict:"], r"'' is not key=value"),
        (["uniform", "ict:keep=0.1,weighting.keep=0.2"], r"sets weighting.keep twice"),
        (["uniform", "ict:steps=5"], r"steps is the same for all arms\. Give it once, as an option: --steps VALUE"),
        (["uniform", "ict:rollout.prompts=5"], r"rollout.prompts is the same for all arms"),
        (["uniform", "ict:weighting.kind=random"], r"unknown key 'weighting.kind'"),
        (["ict"], r"needs at least two arms, got ict"),
        (["ict", "ict"], r"Arms 'ict' and 'ict' are the same"),
        (["ict:keep=0.3,lr=1", "ict:lr=1,keep=0.3"], r"are the same: name each arm once"),
    ],
)
def test_wrong_arms_are_refused_with_what_was_meant(texts, message):
    with pytest.raises(ConfigError, match=message):
        parse_arms(texts)


def test_a_wrong_value_names_the_arm():
    with pytest.raises(ConfigError, match=r"Arm 'ict:keep=2': weighting.keep is 2.0, expected a share in \(0, 1\]"):
        arm_config(TrainConfig(), parse_arm("ict:keep=2"))


def test_matched_step_size_runs_sparse_arms_under_both_normalisations():
    arms = parse_arms(["uniform", "ict:keep=0.3", "random", "ict:keep=1", "ict:normalise=all"])
    assert [arm.text for arm in both_normalisations(arms, TrainConfig())] == [
        "uniform", "ict:keep=0.3,normalise=selected", "ict:keep=0.3,normalise=all", "random:normalise=selected",
        "random:normalise=all", "ict:keep=1", "ict:normalise=all",
    ]  # fmt: skip
