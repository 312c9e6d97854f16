"""Public name of the loss; it is defined in trainer/learning/loss.py."""

from trainer.learning.loss import policy_loss

__all__ = ["policy_loss"]
