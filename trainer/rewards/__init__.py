"""Rewards: loading a reward function and checking what it returns, the built-in ones, and scoring a step's rollouts."""

from trainer.rewards.loading import RewardError, checked_rewards, close_to_answer, load_reward

__all__ = ["RewardError", "checked_rewards", "close_to_answer", "load_reward"]
