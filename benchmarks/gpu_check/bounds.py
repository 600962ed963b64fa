"""How far kernels may lie from one another: the bounds of the tests and of `make gpu-check`; of trainings those of
`benchmarks.cell_distances`.
"""

from __future__ import annotations

import torch

# Of frame attention by the probe against eager attention, relative: this, or so many times eager's own rounding.
PROBE, PROBE_ROUNDINGS = 2e-3, 1.5
# Of packed completions against float32: so many times the distance of padded ones.
PACKED_ROUNDINGS = 1.5
EXACT = 1e-5  # of sums in float32 against float64
# Float32 against float32: log-probabilities and attention relative to their norm, and gradients.
SAME = 1e-4
WEIGHTS = 1e-5  # token weights of the same rows, largest distance
SAME_GRADIENT = 1e-3


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Distance by the norm of what is exact, in float64 on the CPU."""
    one, other = (x.detach().cpu().double() for x in (found, exact))
    return float((one - other).norm() / other.norm())
