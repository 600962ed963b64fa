"""Rewards as TRL calls them: the task's own, PA-GRPO's judge, and DAPO's soft punishment of long completions.

The task's rewards are the very functions that evaluation scores with; here they only learn to find their sample.
"""

from __future__ import annotations

import math
from typing import Any

from appo.config import Recipe
from appo.policy import PolicySettings
from appo.policy.pa_grpo import JUDGED
from appo.rewards import RewardFunction, reward_functions


def task_rewards(recipe: Recipe) -> dict[str, RewardFunction]:
    """`appo.rewards.reward_functions` of what the recipe weighs, but for the judge's, which sees whole batches."""
    weights = {name: w for name, w in recipe.policy.reward_weights.items() if name != JUDGED}
    policy = recipe.policy.model_copy(update={"reward_weights": weights})
    return reward_functions(recipe.model_copy(update={"policy": policy}))


def trl_rewards(
    recipe: Recipe, settings: PolicySettings, rewards: dict[str, RewardFunction], store: Any
) -> tuple[list[Any], list[float]]:
    """Reward functions for TRL with their weights, in one order.

    A reward that no stream names (accuracy, at times, which APPO's S1 and S2 still need) weighs 0.
    """
    functions = [_per_completion(name, function, store) for name, function in rewards.items()]
    if JUDGED in settings.reward_names:
        functions.append(_judged(recipe, store))
    weights = {name: weight for stream in settings.streams for name, weight in stream.rewards.items()}
    if settings.overlong_buffer:
        functions.append(_overlong(recipe, settings))
        weights["overlong"] = 1.0
    return functions, [float(weights.get(function.__name__, 0.0)) for function in functions]


def _per_completion(name: str, function: RewardFunction, store: Any) -> Any:
    def reward(completions: Any, sample_id: list[str], **_: Any) -> list[float | None]:
        return [
            _given(function(completion[0]["content"], store.sample(one)))
            for completion, one in zip(completions, sample_id, strict=True)
        ]

    reward.__name__ = name
    return reward


def _given(value: float | None) -> float | None:
    """A reward for TRL, which reads NaN as none at all: one that was computed is a mistake, and must be seen as one."""
    return math.inf if value is not None and math.isnan(value) else value


def _judged(recipe: Recipe, store: Any) -> Any:
    from appo.policy.judge import judge_for, perception_rewards

    judge = judge_for(recipe.policy.judge)

    def reward(completions: Any, sample_id: list[str], **_: Any) -> list[float | None]:
        texts = [completion[0]["content"] for completion in completions]
        return perception_rewards(judge, texts, [store.sample(one) for one in sample_id])

    reward.__name__ = JUDGED
    return reward


def _overlong(recipe: Recipe, settings: PolicySettings) -> Any:
    from appo.policy.overlong import soft_overlong_punishment

    def reward(completion_ids: Any, **_: Any) -> list[float]:
        import torch

        lengths = torch.tensor([len(ids) for ids in completion_ids])
        found = soft_overlong_punishment(
            lengths, max_length=recipe.policy.max_completion_length, buffer=settings.overlong_buffer
        )
        return [float(value) for value in found]

    reward.__name__ = "overlong"
    return reward
