"""The configuration of a run: `settings.py` has every group, `weighting.py` the weightings' names and parameters."""

from trainer.config.base import ConfigError, SettingsGroup
from trainer.config.settings import CheckpointConfig, LoraConfig, LossConfig, OptimConfig, RolloutConfig, TrainConfig
from trainer.config.weighting import (
    OFF_POLICY,
    WEIGHTINGS,
    Budget,
    WeightingConfig,
    changed_weighting,
    make_weighting,
    weightings_help,
)

__all__ = [
    "OFF_POLICY",
    "WEIGHTINGS",
    "Budget",
    "CheckpointConfig",
    "ConfigError",
    "LoraConfig",
    "LossConfig",
    "OptimConfig",
    "RolloutConfig",
    "SettingsGroup",
    "TrainConfig",
    "WeightingConfig",
    "changed_weighting",
    "make_weighting",
    "weightings_help",
]
