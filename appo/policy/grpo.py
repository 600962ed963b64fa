"""Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300): the oldest of the baselines.

beta and clip as in the APPO paper's table B and section 4.1.
"""

from __future__ import annotations

from appo.policy.base import Algorithm, register


@register("grpo")
class GRPO(Algorithm):
    """KL to the reference model, symmetric clip, loss averaged per completion first."""

    beta = 0.01
    epsilon_low = 0.2
    epsilon_high = 0.2
    loss = "grpo"
