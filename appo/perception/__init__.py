"""APPO's own mathematics: attention of completion tokens to frames -> a weight for each token's advantage.

In reading order: `probe` (attention without eager attention), `frames`, `tokens`, `selection`, `divergence`,
`weights`. Knows torch only; the formulas and their sources are in docs/algorithm.md.
"""

from appo.perception.selection import Selection, WeightSettings, select
from appo.perception.weights import (
    PerceptionWeights,
    perception_weights,
    perception_weights_from_hidden,
    weights_from_logits,
    weights_from_rows,
)

__all__ = [
    "PerceptionWeights",
    "Selection",
    "WeightSettings",
    "perception_weights",
    "perception_weights_from_hidden",
    "select",
    "weights_from_logits",
    "weights_from_rows",
]
