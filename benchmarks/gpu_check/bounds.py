"""How far one way of computing may lie from another: the bounds of the tests and of `make gpu-check`, once.

Two processes, kernels or layouts sum up in another order; bfloat16 holds eight bits of each product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gpu_check.rows import Measure

# Of a training against the float32 one-process training on the same completions, by type.
LOGPS = {"float32": 1e-5, "bfloat16": 0.03}  # mean distance of log-probabilities
GRADIENT = {"float32": 1e-3, "bfloat16": 0.05}  # relative distance of the gradient's norm in the first update
MOVED = 0.99  # share of the trained entries that have changed
WAY = 0.02  # relative distance of the norm of (weights after - before)
# Of frame attention by the probe against eager attention, relative: this, or so many times eager's own rounding.
PROBE, PROBE_ROUNDINGS = 2e-3, 1.5
# Of packed completions against float32: so many times the distance of padded ones.
PACKED_ROUNDINGS = 1.5
# Float32 against float32: log-probabilities and attention relative to their norm, and gradients.
SAME = 1e-4
WEIGHTS = 1e-5  # token weights of the same rows, largest distance
SAME_GRADIENT = 1e-3


def training(cell: Mapping[str, Any], reference: Mapping[str, Any], dtype: str) -> tuple[Measure, ...]:
    """A training (see `cells`) against the reference: its log-probabilities, first gradient and way."""
    finite = all(torch.tensor(step["loss"]).isfinite() for step in cell["steps"])
    logps = float((cell["logps"] - reference["logps"]).abs().mean())
    # Of the first update: later ones are of other weights.
    ours, theirs = (found["steps"][0]["grad_norm"] for found in (cell, reference))
    moved = {k: cell["after"][k] - cell["before"][k] for k in reference["before"]}
    expected = {k: reference["after"][k] - reference["before"][k] for k in reference["before"]}
    # An entry without a gradient (a word that no prompt holds) does not move in float32 either.
    trained = {k: delta != 0 for k, delta in expected.items()}
    changed = sum(int((moved[k] != 0)[at].sum()) for k, at in trained.items())
    total = sum(int(at.sum()) for at in trained.values())
    way, expected_way = (
        float(torch.cat([d.double().flatten() for d in deltas.values()]).norm())
        for deltas in (moved, expected)
    )
    return (
        Measure("log-probabilities off by", logps if finite else float("nan"), LOGPS[dtype]),
        Measure("gradient", abs(ours - theirs) / abs(theirs), GRADIENT[dtype]),
        Measure("entries moved", changed / total if total else 0.0, MOVED, at_most=False),
        Measure("way", abs(way - expected_way) / expected_way if expected_way else float("nan"), WAY),
    )


def wanted_types(layout: str, dtype: str, lora: bool) -> list[str]:
    """Of the model's own parameters: float32 masters, or the frozen base with float32 adapters."""
    if dtype == "float32" or not (lora or layout.startswith("zero")):
        return ["torch.float32"]
    return ["torch.bfloat16"] if layout.startswith("zero") else ["torch.bfloat16", "torch.float32"]


def wanted_reference(dtype: str, algorithm: str, lora: bool) -> list[str] | None:
    """Of the reference model's parameters; None where there is none."""
    return [f"torch.{dtype}"] if algorithm in ("grpo", "pa_grpo") and not lora else None


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Distance by the norm of what is exact, in float64 on the CPU."""
    one, other = (x.detach().cpu().double() for x in (found, exact))
    return float((one - other).norm() / other.norm())
