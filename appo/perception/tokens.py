"""Intra-group perception tokens: crucial frames -> the tokens that look at them, aligned (APPO step 6).

Reads `frames`, feeds `divergence`. For each crucial frame every completion gives the tokens that attend to it
most, in the order in which they were written; the j-th of one completion is compared with the j-th of the
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from appo.perception.frames import valid_tokens


@dataclass(frozen=True, slots=True)
class PerceptionTokens:
    """Which tokens were chosen for K crucial frames; J is the most that any completion could give."""

    positions: Tensor  # (K, G, J) int64, ascending along J; where `mask` is false, 0
    mask: Tensor  # (K, G, J) bool: completion i has a j-th token


def perception_tokens(
    attention: Tensor, lengths: Tensor, frames: Sequence[int], *, k3: int
) -> PerceptionTokens:
    """For each frame, each completion's k3 tokens with the largest attention to it (APPO section 3.2, eq. 1
    of A.2).

    attention: (G, N, T) float; lengths: (G,) int. Ties go to the earlier position; a completion shorter than
    k3 gives all its tokens. Raises ValueError when k3 < 1.
    """
    if k3 < 1:
        raise ValueError(f"perception.k3={k3}: must be at least 1")
    num_tokens = attention.shape[1]
    per_frame = attention[:, :, list(frames)].permute(2, 0, 1)  # (K, G, N)
    masked = per_frame.masked_fill(~valid_tokens(lengths, num_tokens), -torch.inf)
    best_first = masked.sort(dim=-1, descending=True, stable=True).indices[..., :k3]  # (K, G, J)
    counted = torch.arange(best_first.shape[-1], device=attention.device) < lengths[:, None]
    mask = counted.expand_as(best_first)
    # Padding sorted last by attention must stay last by position.
    in_order = best_first.masked_fill(~mask, num_tokens).sort(dim=-1).values
    return PerceptionTokens(positions=in_order.masked_fill(~mask, 0), mask=mask)
