"""Random draws that belong to a completion, not to a process: rollouts a function of (seed, step, round, completion).

torch's global generator would give other completions when the same step is cut into other micro-batches or spread
over other devices. Here every completion has its own stream, and a token is drawn by the Gumbel-max trick: argmax of
log-probabilities plus Gumbel noise is an exact sample of the distribution (Gumbel 1954; Maddison et al. 2014).
`KeepLogps` looks at what is drawn from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


def stream_seed(*key: int) -> int:
    """63 bits that any change of the key changes throughout."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class DrawPerRow(LogitsProcessor):
    """Last of the logits processors: adds each row's own Gumbel noise, so that taking the largest is sampling.

    seeds: one for each row of the batch. For use with `do_sample=False`, after temperature and truncation.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._noise: Tensor | None = None
        self._broken = torch.zeros(len(seeds), dtype=torch.bool, device=device)

    def broken(self) -> list[int]:
        """Rows that had no distribution to draw from at some token: a NaN, an infinity, or everything ruled out."""
        return self._broken.nonzero().flatten().tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The largest is NaN where any is; -inf alone is what truncation leaves of a token. Asked for at the end only: a
        # device need not wait here.
        self._broken |= ~scores.amax(dim=-1).isfinite()
        if self._noise is None:
            self._noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(self._noise, self._generators, strict=True):
            # -log of an exponential variable is a Gumbel one; unlike -log(-log(u)) it has no u = 0.
            row.exponential_(generator=generator)
        return scores.float() - self._noise.log()


class KeepLogps(LogitsProcessor):
    """Keeps the log-probabilities that each token is about to be drawn from. steps: (B, V) of each token."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.float().log_softmax(dim=-1).cpu())
        return scores
