"""Verifiable rewards with TRL's signature, and the pool of killable workers that runs them.

``import grpo_engine.rewards`` never imports torch.
"""

from grpo_engine.rewards.background import BackgroundScoring
from grpo_engine.rewards.code import code_reward
from grpo_engine.rewards.format import format_r1_reward, format_reward
from grpo_engine.rewards.language import language_consistency_reward
from grpo_engine.rewards.length import length_reward
from grpo_engine.rewards.math import accuracy_reward, unusable_solutions
from grpo_engine.rewards.pool import RewardPool
from grpo_engine.rewards.registry import BUILT_IN, RewardSpec, load_reward
from grpo_engine.rewards.repetition import repetition_reward
from grpo_engine.rewards.scores import RewardError, RewardReport
from grpo_engine.rewards.tasks import reasoning_gym_reward

__all__ = [
    "BUILT_IN",
    "BackgroundScoring",
    "RewardError",
    "RewardPool",
    "RewardReport",
    "RewardSpec",
    "accuracy_reward",
    "code_reward",
    "format_r1_reward",
    "format_reward",
    "language_consistency_reward",
    "length_reward",
    "load_reward",
    "reasoning_gym_reward",
    "repetition_reward",
    "unusable_solutions",
]
