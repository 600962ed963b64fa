"""Decoupled Clip and Dynamic sAmpling Policy Optimization (arXiv 2503.14476): APPO's parent and baseline.

Dynamic sampling, overlong masking and the soft overlong punishment are switches of the recipe's `policy`
section, off by default as in the APPO paper's comparison.
"""

from __future__ import annotations

from appo.policy.base import Algorithm, register


@register("dapo")
class DAPO(Algorithm):
    """No KL, clip-higher, loss averaged over all tokens of the batch."""

    beta = 0.0
    epsilon_low = 0.2
    epsilon_high = 0.28
    loss = "dapo"
