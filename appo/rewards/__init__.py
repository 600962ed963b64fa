"""Responses -> rewards: one parser (answers.py) for training and benchmarks, one function a stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from appo.config import Recipe
from appo.data.schema import VideoSample
from appo.errors import SettingError
from appo.rewards.accuracy import accuracy_reward
from appo.rewards.format import format_reward
from appo.rewards.temporal import extract_spans, set_iou

__all__ = ["RewardFunction", "accuracy_reward", "format_reward", "reward_functions", "temporal_iou_reward"]

RewardFunction = Callable[[str, VideoSample], float | None]


def temporal_iou_reward(text: str, sample: VideoSample) -> float | None:
    """Set IoU of the response's `<time>` with the true times, in [0, 1]; None when the sample has none."""
    if not sample.key_times:
        return None
    return set_iou(extract_spans(text) or [], sample.key_times, duration_s=sample.duration_s)


def reward_functions(recipe: Recipe) -> dict[str, RewardFunction]:
    """The reward streams of a recipe by name: those of `policy.reward_weights`, and always `accuracy` first.

    Each takes (completion text, its sample) and returns a value in [0, 1], or None where it does not apply.
    Raises SettingError for a weight whose reward does not exist.
    """
    known: dict[str, RewardFunction] = {
        "accuracy": accuracy_reward,
        "format": partial(_format_of, template=recipe.data.template),
        "temporal_iou": temporal_iou_reward,
    }
    if unknown := sorted(set(recipe.policy.reward_weights) - set(known)):
        raise SettingError(
            f"policy.reward_weights.{unknown[0]}: no such reward; known are {', '.join(known)}"
        )
    # Accuracy decides which completions are right (APPO's S1 and S2), also where it carries no weight.
    return {name: known[name] for name in known if name == "accuracy" or name in recipe.policy.reward_weights}


def _format_of(text: str, sample: VideoSample, *, template: str) -> float:
    return format_reward(text, template=template)
