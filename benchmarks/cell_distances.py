"""How far a cell of the matrix is from the float32 one-process cell on the same completions, and how far it may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

# Two processes sum in another order; bfloat16 holds eight bits of each product.
LOGPS = {"float32": 1e-5, "bfloat16": 0.03}  # mean distance
GRADIENT = {"float32": 1e-3, "bfloat16": 0.05}  # relative distance of its norm
CHANGED, MOVED = 0.99, 0.02


@dataclass(frozen=True)
class Distances:
    """finite: all losses. logps: mean distance of log-probabilities. gradient: relative distance of the first update's
    norm (later ones are of other weights). changed: share of the trained entries. moved: relative distance of the
    norm of (weights after - before).
    """

    finite: bool
    logps: float
    gradient: float
    changed: float
    moved: float

    def problems(self, dtype: str) -> list[str]:
        """What is out of bounds; empty where nothing is."""
        found = [
            (not self.finite, "a loss is not finite"),
            (not self.logps <= LOGPS[dtype], f"log-probabilities are {self.logps:.1e} off on average"),
            (not self.gradient <= GRADIENT[dtype], f"the gradient's norm is {self.gradient:.1e} off"),
            (not self.changed >= CHANGED, f"{self.changed:.2%} of the trained entries moved"),
            (not self.moved <= MOVED, f"the weights moved by {self.moved:.1e} more or less"),
        ]
        return [text for broken, text in found if broken]


def distances(cell: dict[str, Any], reference: dict[str, Any]) -> Distances:
    """cell, reference: as `benchmarks.cells.read` gives them. Raises KeyError where they train other parameters."""
    if cell["before"].keys() != reference["before"].keys():
        raise KeyError(f"trained parameters differ: {cell['before'].keys() ^ reference['before'].keys()}")
    moved = {k: cell["after"][k] - cell["before"][k] for k in reference["before"]}
    expected = {k: reference["after"][k] - reference["before"][k] for k in reference["before"]}
    # An entry without a gradient (a word that no prompt holds) does not move in float32 either.
    trained = {k: delta != 0 for k, delta in expected.items()}
    changed = sum(int((moved[k] != 0)[at].sum()) for k, at in trained.items())
    ours, theirs = (found["steps"][0]["grad_norm"] for found in (cell, reference))
    norm, expected_norm = (
        float(torch.cat([d.double().flatten() for d in deltas.values()]).norm())
        for deltas in (moved, expected)
    )
    return Distances(
        finite=all(math.isfinite(step["loss"]) for step in cell["steps"]),
        logps=float((cell["logps"] - reference["logps"]).abs().mean()),
        gradient=abs(ours - theirs) / theirs,
        changed=changed / sum(int(at.sum()) for at in trained.values()),
        moved=abs(norm - expected_norm) / expected_norm,
    )


def wanted_types(layout: str, dtype: str, lora: bool) -> list[str]:
    """Of the model's own parameters: float32 masters, or the frozen base with float32 adapters."""
    if dtype == "float32" or not (lora or layout.startswith("zero")):
        return ["torch.float32"]
    return ["torch.bfloat16"] if layout.startswith("zero") else ["torch.bfloat16", "torch.float32"]


def wanted_reference(dtype: str, algorithm: str, lora: bool) -> list[str] | None:
    """Of the reference model's parameters; None where there is none."""
    return [f"torch.{dtype}"] if algorithm in ("grpo", "pa_grpo") and not lora else None
