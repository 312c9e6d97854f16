"""Public name of ICT's weights; all weightings are defined in trainer/learning/weightings."""

from trainer.learning.weightings.deviation import ict_weights

__all__ = ["ict_weights"]
