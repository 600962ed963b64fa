"""Process-Aware GRPO (VideoP2R, arXiv 2511.11113): perception and reasoning are rewarded apart.

A completion writes down what it sees in <observation> before it reasons in <think>. A judge that reads the
observation alone rewards the first, the recipe's rewards the rest; each is normalised within the group on its
own. Set `policy.perception_weights` to multiply APPO's weights in.
"""

from __future__ import annotations

from collections.abc import Mapping

from appo.policy.base import RewardStream, register
from appo.policy.grpo import GRPO

JUDGED = "perception"


@register("pa_grpo")
class PAGRPO(GRPO):
    """GRPO with two streams of advantages, told apart by token spans."""

    def streams(self, reward_weights: Mapping[str, float]) -> tuple[RewardStream, ...]:
        """Perception for the observation's tokens, the recipe's other rewards for all the others.

        A normalised stream has no use for its scale, so "perception" weighs 1 where the recipe is silent.
        """
        reasoning = {name: weight for name, weight in reward_weights.items() if name != JUDGED}
        return (
            RewardStream("perception", {JUDGED: reward_weights.get(JUDGED, 1.0)}, tags=("observation",)),
            RewardStream("reasoning", reasoning),
        )
