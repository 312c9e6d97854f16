"""Rewards: `loading.py` finds a reward function, `checking.py` checks what it returns, `builtin.py` has our own,
`math_answers.py` says when an answer is right, `scoring.py` rewards a step's rollouts."""

from trainer.errors import RewardError
from trainer.rewards.builtin import close_to_answer
from trainer.rewards.checking import checked_rewards
from trainer.rewards.loading import load_reward

__all__ = ["RewardError", "checked_rewards", "close_to_answer", "load_reward"]
