"""Attention-guided Perception Policy Optimization (arXiv 2602.23823): DAPO with one weight per token.

The weights are `appo.perception`'s; with `perception.max_weight=1` this is DAPO, number for number.
"""

from __future__ import annotations

from appo.policy.base import register
from appo.policy.dapo import DAPO


@register("appo")
class APPO(DAPO):
    """The advantage of a token is multiplied by how much it tells right from wrong perception."""

    uses_perception_weights = True
